"""Benchmarks of the data path: ``python -m benchmarks.data NAME --help``."""

import sys
from collections.abc import Sequence

from benchmarks import command
from benchmarks.data import decoding, starting, streaming, waiting

_BENCHMARKS = {
    "decoding": decoding.main,
    "streaming": streaming.main,
    "starting": starting.main,
    "waiting": waiting.main,
}
_USAGE = """\
usage: python -m benchmarks.data NAME [options]

  decoding   encoded images to bands, against Pillow + torch and the fastest decoder there is
  streaming  an epoch from an S3 server against the same from local files; memory along the way
  starting   time to the first batch, at the start and amid an epoch
  waiting    share of a training step that is spent waiting for data

Each takes --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names."""
    return command.dispatch(_BENCHMARKS, _USAGE, arguments)


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
