"""Benchmarks of expert shards: ``python -m benchmarks.experts NAME --help``."""

import sys
from collections.abc import Sequence

from benchmarks import command
from benchmarks.experts import building, full_size, memory, step, wire

_BENCHMARKS = (memory, wire, step, full_size, building)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names."""
    return command.dispatch("benchmarks.experts", _BENCHMARKS, arguments)


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
