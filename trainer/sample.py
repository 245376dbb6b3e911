"""`python -m trainer.sample`: draw samples from a checkpoint, as a grid or a set."""

import sys

from trainer.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
