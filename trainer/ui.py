"""`python -m trainer.ui`: show the runs of a home folder as MLflow's pages."""

import sys

from trainer.cli.ui import main

if __name__ == "__main__":
    sys.exit(main())
