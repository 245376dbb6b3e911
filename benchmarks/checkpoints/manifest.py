"""Size of a manifest, and what ranks tell each other for it, against the number of ranks.

All ranks of ZeRO-3 are made up in one process: each holds an equal part of every parameter, as
DeepSpeed cuts it, and no values. "listed" is what the slices alone would take, named one by one;
"first" is what the first rank receives when a run begins and at a save, "others" what every other
rank receives when a run begins and when it resumes; a save tells them no more than that it went
well. The peak is of the first rank's planning.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from benchmarks import command
from benchmarks.checkpoints.memory import resident_bytes, watch_peak
from benchmarks.checkpoints.state import KINDS, MIB, RUN, parameter_shapes
from benchmarks.command import Cell
from trainer.checkpoint import layout
from trainer.checkpoint.manifest import BYTES_PER_ELEMENT, Manifest, ObjectEntry
from trainer.checkpoint.objects import BLOCK_BYTES
from trainer.checkpoint.save_plan import RankState, SavePlan, plan_save
from trainer.checkpoint.saver import versions
from trainer.checkpoint.slices import slices_of

_ATTEMPT = "0123456789ab"
_HEADER_BYTES = 128  # of a slice of one kind, about


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("checkpoints manifest", description=__doc__ or "", rounds=1)
    command.add_size(parser, size="XL/2", depth=None, batch=None)
    parser.add_argument("--scales", type=command.positive, default=3, help="default 3")
    parser.add_argument(
        "--ranks",
        type=command.whole_numbers,
        default=(64, 512, 1000, 4096),
        help="comma-separated; default 64,512,1000,4096",
    )
    options = parser.parse_args(arguments)
    setting = command.setting("checkpoints manifest", options)
    shapes = parameter_shapes(options)
    for ranks in options.ranks:
        setting.report.add(**_row(shapes, ranks))
    setting.deliver()
    return 0


def announcements(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> Iterator[RankState]:
    """What each of so many ranks announces under ZeRO-3."""
    whole = np.array([math.prod(shape) for shape in shapes.values()])
    part = -(-whole // ranks)
    for rank in range(ranks):
        numel = np.minimum(part, whole - rank * part)
        held = numel > 0
        yield RankState.of(
            [sorted(KINDS)],
            {name: shape for (name, shape), mine in zip(shapes.items(), held, strict=True) if mine},
            np.column_stack([rank * part, numel])[held],
        )


def make_manifest(plan: SavePlan, ranks: int) -> Manifest:
    """The manifest of a checkpoint by so many ranks, with hashes of nothing."""
    objects = []
    for rank in range(ranks):
        spans = slices_of(rank, plan.cuts)
        values = sum(span.numel for span in spans.values()) * BYTES_PER_ELEMENT * len(plan.kinds)
        size = _HEADER_BYTES * len(spans) * len(plan.kinds) + values
        objects.append(
            ObjectEntry(
                rank=rank,
                key=layout.object_key(RUN, 0, _ATTEMPT, rank),
                size_bytes=size,
                block_sha256=("0" * 64,) * -(-size // BLOCK_BYTES),
            )
        )
    return Manifest(
        run=RUN,
        images=0,
        attempt=_ATTEMPT,
        saved_at="2026-01-01T00:00:00+00:00",
        world_size=ranks,
        config_fingerprint="0" * 64,
        science={},
        train_state={},
        kinds=plan.kinds,
        parameters=plan.parameters,
        cuts=plan.cuts,
        block_bytes=BLOCK_BYTES,
        objects=tuple(objects),
        versions=versions(),
    )


def _row(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> dict[str, Cell]:
    announced = list(announcements(shapes, ranks))
    tables = [each.parameters for each in announced]
    spans = [each.spans for each in announced]
    began, before = time.perf_counter(), resident_bytes()
    with watch_peak() as peak:
        plan = plan_save(tables, spans)
    plan_s = time.perf_counter() - began
    manifest = make_manifest(plan, ranks)
    began = time.perf_counter()
    data = manifest.to_json()
    write_s = time.perf_counter() - began
    began = time.perf_counter()
    assert Manifest.from_json(data, run=RUN, images=0) == manifest
    read_s = time.perf_counter() - began
    listed = sum(
        len(json.dumps([name, *span], separators=(",", ":"))) + 1
        for rank in range(ranks)
        for name, span in slices_of(rank, plan.cuts).items()
    )
    return {
        "ranks": ranks,
        "manifest MiB": len(data) / MIB,
        "listed MiB": listed / MIB,
        "write s": write_s,
        "read s": read_s,
        "plan s": plan_s,
        "plan peak MiB": (peak[0] - before) / MIB,
        "first MiB begin": sum(map(len, [*tables, *spans])) / MIB,
        "first KiB save": sum(len(json.dumps(each.to_json())) for each in manifest.objects) / 1024,
        "others KiB begin": len(plan.to_json()) / 1024,
        "others MiB resume": len(data) / MIB,
    }
