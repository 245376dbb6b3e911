"""Benchmarks of expert shards: ``python -m benchmarks.experts NAME --help``."""

import sys
from collections.abc import Sequence

from benchmarks import command
from benchmarks.experts import building, full_size, memory, step, wire

_BENCHMARKS = {
    "memory": memory.main,
    "wire": wire.main,
    "step": step.main,
    "full_size": full_size.main,
    "building": building.main,
}
_USAGE = """\
usage: python -m benchmarks.experts NAME [options]

  memory     bytes of live tensors on a rank, against the prediction, by placement and ZeRO stage
  wire       bytes that leave a rank in one step, by kind of collective, against the formula
  step       time of an update by placement and ZeRO stage, against replicated experts
  full_size  bytes of XL's state on one of eight ranks, in the engine itself but without memory
  building   most memory that building XL takes, against what a rank keeps of it

Each takes --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names."""
    return command.dispatch(_BENCHMARKS, _USAGE, arguments)


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
