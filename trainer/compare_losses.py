"""`python -m trainer.compare_losses`: tell whether two runs have the same losses."""

import sys

from trainer.cli.compare_losses import main

if __name__ == "__main__":
    sys.exit(main())
