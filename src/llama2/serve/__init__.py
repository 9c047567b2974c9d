"""HTTP and what it plugs into the engine."""
