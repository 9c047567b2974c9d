"""`python -m llama2` is the program `llama2`."""

from llama2.cli.main import run

if __name__ == "__main__":
    run()
