"""Benchmarks of checkpoints: ``python -m benchmarks.checkpoints NAME --help``."""

import sys
from collections.abc import Sequence

from benchmarks import command
from benchmarks.checkpoints import blocked, manifest, memory, transfer

_BENCHMARKS = (blocked, transfer, memory, manifest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names."""
    return command.dispatch("benchmarks.checkpoints", _BENCHMARKS, arguments)


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
