"""Coverage-guided fuzz of the GGUF reader (needs `atheris`).

    python tests/fuzz/fuzz_gguf.py -runs=1000000

Whatever the file, it opens or is refused by an error of ours. Other options are libFuzzer's.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
# The loader of an editable installation would hide the sources from atheris.
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]

with atheris.instrument_imports(include=["llama2"]):
    from gguf_bytes import write_seed
    from llama2.checkpoint import gguf
    from llama2.errors import CheckpointError, ConfigError


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        seeds = Path(folder, "seeds")
        seeds.mkdir()
        write_seed("sentencepiece", seeds / "sentencepiece")
        write_seed("bpe", seeds / "bpe")
        path = Path(folder, "model.gguf")

        def one_input(data: bytes) -> None:
            path.write_bytes(data)
            try:
                model = gguf.read(path)
                model.check_finite()
                for value in model.metadata.values():
                    if isinstance(value, Sequence):
                        list(value)
            except (CheckpointError, ConfigError):
                pass

        atheris.Setup([sys.argv[0], "-max_len=16384", *sys.argv[1:], str(seeds)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
