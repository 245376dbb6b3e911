"""`python -m trainer.evaluate`: measure checkpoints after the fact."""

import sys

from trainer.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
