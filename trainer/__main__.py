"""`python -m trainer COMMAND`: what the console script `lapflow` does."""

import sys

from trainer.cli.lapflow import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m trainer"))
