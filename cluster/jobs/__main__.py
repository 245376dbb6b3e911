"""`python -m cluster.jobs`: jobs of a Ray cluster, sent, followed and stopped."""

import sys

from trainer.cli.jobs import main

if __name__ == "__main__":
    sys.exit(main())
