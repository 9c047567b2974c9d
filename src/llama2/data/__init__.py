"""Documents → clean → deduplicated → mixed → token shards."""
