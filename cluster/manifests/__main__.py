"""`python -m cluster.manifests`: files that have Kubernetes, Slurm or AWS run a job."""

import sys

from trainer.cli.manifests import main

if __name__ == "__main__":
    sys.exit(main())
