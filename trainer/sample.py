"""`python -m trainer.sample`: draw a grid of samples from a checkpoint."""

import sys

from trainer.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
