"""`python -m trainer.track`: send MLflow what it has not taken of a run."""

import sys

from trainer.cli.track import main

if __name__ == "__main__":
    sys.exit(main())
