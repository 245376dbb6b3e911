"""`python -m trainer.checkpoints`: list, verify, export and prune the checkpoints of a run."""

import sys

from trainer.cli.checkpoints import main

if __name__ == "__main__":
    sys.exit(main())
