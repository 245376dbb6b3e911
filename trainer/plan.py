"""`python -m trainer.plan`: predict what each placement of a job's experts costs."""

import sys

from trainer.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
