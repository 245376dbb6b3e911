"""`python -m trainer.launch`: train a model."""

import sys

from trainer.cli.launch import main

if __name__ == "__main__":
    sys.exit(main())
