"""`python -m trainer.inpaint`: fill in what is missing of a picture."""

import sys

from trainer.cli.inpaint import main

if __name__ == "__main__":
    sys.exit(main())
