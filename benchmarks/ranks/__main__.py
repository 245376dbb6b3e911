"""Messages, bytes and seconds against the number of ranks: ``python -m benchmarks.ranks --help``.

One process plays all ranks. The code is that of a run; what is between the ranks is counted. "KiB"
are of all ranks together, "to the first" is what comes to the first rank alone, "requests" those to
the store by all of them. The seconds of a save and a restore are the first rank's own work.

``python -m benchmarks.ranks balance`` simulates how evenly ranks are busy.
"""

import sys
from collections.abc import Sequence

from benchmarks import command
from benchmarks.checkpoints.state import parameter_shapes
from benchmarks.ranks import balance
from benchmarks.ranks.checkpoint import measure_checkpoints, measure_deletes
from benchmarks.ranks.cluster import (
    measure_mailbox,
    measure_probing,
    measure_stop,
    measure_votes,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or the one that the first argument names."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["balance"]:
        return balance.main(given[1:])
    parser = command.parser("ranks", description=__doc__ or "", rounds=1)
    command.add_size(parser, size="tiny", depth=None, batch=None)
    parser.add_argument("--scales", type=command.positive, default=2, help="default 2")
    parser.add_argument(
        "--ranks",
        type=command.whole_numbers,
        default=(1, 8, 64, 512, 1000, 4096),
        help="comma-separated; default 1,8,64,512,1000,4096",
    )
    parser.add_argument("--ranks-per-node", type=command.positive, default=8, help="default 8")
    options = parser.parse_args(given)
    setting = command.setting("ranks", options)
    shapes, per_node = parameter_shapes(options), options.ranks_per_node
    checkpoints = {ranks: measure_checkpoints(shapes, ranks) for ranks in options.ranks}
    for rows in (
        [measure_mailbox(ranks, per_node) for ranks in options.ranks],
        [measure_stop(ranks, per_node) for ranks in options.ranks],
        [measure_votes(ranks) for ranks in options.ranks],
        [measure_probing(ranks, per_node) for ranks in options.ranks],
        *([rows[number] for rows in checkpoints.values()] for number in range(3)),
        [measure_deletes(ranks) for ranks in options.ranks],
    ):
        for row in rows:
            setting.report.add(**row)
    setting.deliver()
    return 0


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
