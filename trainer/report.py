"""`python -m trainer.report`: write a page about runs."""

import sys

from trainer.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
