"""`python -m pipelines.ingest.latents`: encode images once, or take in latents."""

import sys

from trainer.cli.latents import main

if __name__ == "__main__":
    sys.exit(main())
