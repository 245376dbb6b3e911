"""Bytes that leave a rank in one step, by kind of collective, against the formula.

They are counted where torch hands a collective to its backend, whoever asked for it: expert groups
for their tokens, the engine for gradients and weights. A ring is assumed where it matters: of n
ranks, (n - 1)/n of a buffer leaves each of them in an all-gather or reduce-scatter, and twice that
in an all-reduce.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import command
from benchmarks.experts.training import Training, add_ranks, run_on_ranks
from benchmarks.experts.variant import Variant, variants
from cluster.contract import WorkerContext
from trainer.config.job import JobConfig, micro_batch
from trainer.config.reading import to_dict
from trainer.planning.exchange import exchange_bytes, exchange_calls
from trainer.planning.placing import resolve_placement, workload, zero_stage

_KIB = 2**10
_KINDS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::broadcast_": "broadcast",
    "c10d::reduce_": "reduce",
}
"""The operators of collectives, by the kind they are."""


class WireCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what leaves this rank in collectives.

    Attributes:
        bytes: By kind of collective.
        calls: By kind of collective.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count a collective and carry it out."""
        name = func._schema.name
        if name.startswith("c10d::") and name in _KINDS:
            group = next(
                dist.ProcessGroup.unbox(each)
                for each in args
                if isinstance(each, torch.ScriptObject)
            )
            self._count(_KINDS[name], _buffer_bytes(name, args), group.size())
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, whole: int, ranks: int) -> None:
        share = 2 if kind == "all_reduce" else 1
        self.bytes[kind] += share * (ranks - 1) * whole // ranks
        self.calls[kind] += 1


def _buffer_bytes(name: str, args: tuple[Any, ...]) -> int:
    """Bytes of the whole buffer of a collective: what all ranks of it have, or get, together."""
    first = args[0]
    tensors: list[Tensor] = first if isinstance(first, list) else [first]
    if name == "c10d::_reduce_scatter_base_":
        tensors = [args[1]]
    if name == "c10d::allgather_":
        (tensors,) = first
    return sum(each.numel() * each.element_size() for each in tensors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("experts wire", description=__doc__ or "", rounds=1)
    add_ranks(parser, model="s_2", ranks=2)
    parser.add_argument("--scales", type=command.whole_numbers, default=(3,), help="default 3")
    parser.add_argument("--images", type=command.positive, default=6, help="of a rank; default 6")
    options = parser.parse_args(arguments)
    setting = command.setting("experts wire", options)
    for scales in options.scales:
        for variant in variants(scales, ranks=options.ranks, stages=(1, 2, 3)):
            job = variant.job(model=options.model, ranks=options.ranks, images=options.images)
            for row in measure(variant, job):
                setting.report.add(**row)
    setting.deliver()
    return 0


def measure(variant: Variant, job: JobConfig) -> list[dict[str, Any]]:
    """Count one variant; a row for each kind of collective."""
    (counted,) = run_on_ranks(send, {"job": to_dict(job)}, ranks=job.cluster.workers)
    expected, calls = predict_bytes(job), predict_calls(job)
    return [
        {
            "held as": variant.name,
            "collective": kind,
            "calls": counted["calls"].get(kind, 0),
            "of tokens": calls.get(kind, 0),
            "KiB": counted["bytes"].get(kind, 0) / _KIB,
            "predicted": expected[kind] / _KIB,
            "ratio": counted["bytes"].get(kind, 0) / expected[kind] if expected[kind] else None,
        }
        for kind in expected
        if expected[kind] or counted["bytes"].get(kind, 0)
    ]


def predict_bytes(job: JobConfig) -> Counter[str]:
    """Bytes that leave a rank in one update: tokens of experts, gradients, and weights."""
    work, placement, stage = workload(job), resolve_placement(job), zero_stage(job)
    scales = job.flow.scales
    images = [micro_batch(job) * (k + 1) // scales for k in reversed(range(scales))]
    bytes_by_kind = Counter(exchange_bytes(work, placement, images=images))
    ring = sum(
        (replicas - 1) * weights * work.element_bytes // replicas
        for weights, ranks in work.shards(placement)
        for replicas in [work.world_size // ranks]
    )
    if stage == 3:
        bytes_by_kind["all_gather"] += round(work.weight_gathers(placement) * ring)
        bytes_by_kind["reduce_scatter"] += ring
    elif stage and work.reduces_to_owners:
        bytes_by_kind["reduce"] += ring
        bytes_by_kind["all_gather"] += ring
    else:
        bytes_by_kind["all_reduce"] += 2 * ring
        bytes_by_kind["all_gather"] += ring
    return bytes_by_kind


def predict_calls(job: JobConfig) -> dict[str, int]:
    """Collectives of expert groups in one update of one pass."""
    return exchange_calls(workload(job), resolve_placement(job))


def send(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Count the collectives of the third update, when nothing is done for the first time."""
    training = Training(payload["job"], context)
    for _ in range(2):
        training.update()
    with WireCounter() as counter:
        training.update()
    if context.rank == 0:
        context.report({"bytes": dict(counter.bytes), "calls": dict(counter.calls)})
