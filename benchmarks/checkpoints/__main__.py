"""Benchmarks of checkpoints: ``python -m benchmarks.checkpoints NAME --help``."""

import sys
from collections.abc import Sequence

from benchmarks import command
from benchmarks.checkpoints import blocked, manifest, memory, transfer

_BENCHMARKS = {
    "blocked": blocked.main,
    "transfer": transfer.main,
    "memory": memory.main,
    "manifest": manifest.main,
}
_USAGE = """\
usage: python -m benchmarks.checkpoints NAME [options]

  blocked   time for which a save keeps training waiting, against a copy of the same bytes
  transfer  saving to and restoring from S3, against boto3's own transfer of the same bytes
  memory    host memory of a save, against the bytes that are saved
  manifest  size of manifests, and what ranks tell each other, against the number of ranks

Each takes --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names."""
    return command.dispatch(_BENCHMARKS, _USAGE, arguments)


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
