"""`python -m trainer.doctor`: look at an installation."""

import sys

from trainer.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
