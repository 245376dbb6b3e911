"""Benchmarks of the data path: ``python -m benchmarks.data NAME --help``."""

import sys
from collections.abc import Sequence

from benchmarks import command
from benchmarks.data import decoding, starting, streaming, waiting

_BENCHMARKS = (decoding, streaming, starting, waiting)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names."""
    return command.dispatch("benchmarks.data", _BENCHMARKS, arguments)


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
