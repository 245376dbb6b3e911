"""Bytes that one optimizer update reads and writes, against those that it cannot do without."""

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import command
from benchmarks.experts.full_size import apart, join_alone, stay
from benchmarks.experts.training import Training
from trainer.config.composition import compose_job
from trainer.config.job import JobConfig
from trainer.config.reading import from_dict, to_dict
from trainer.planning.placing import resolve_placement, workload, zero_stage

_DESCRIPTION = """\
The engine itself trains as the first of its ranks, on tensors that have a size and no memory; the
other ranks are not there. Every operation of torch is looked at as it comes: what it reads and what
it writes, views aside. That it runs at all shows that nothing waits for a value of the device.

bound: the gradient read once for its norm, which decides whether it is applied, and once to be
applied; fp32 weights, two moments and the average read and written once; the weights that the model
computes with written once. `once` has the gradient read once, as if its norm were known.
`reducing` is what a backward pass reads and writes for each gradient of the model more than on one
device, to have gradients added up over ranks; collectives themselves are not in it.

  python -m benchmarks.update
  python -m benchmarks.update --model b_2 --scales 2 --ranks 4"""

_FULL_BYTES = 4
_WRITES_ALONE = ("copy_", "fill_", "zero_", "_foreach_copy_")


@dataclass(frozen=True, kw_only=True)
class _Variant:
    name: str
    ranks: int
    words: tuple[str, ...]


def _variants(ranks: int) -> list[_Variant]:
    bf16 = "engine.precision=bf16"
    clipped = "optim.clip_norm=1.0"
    return [
        _Variant(name="one device", ranks=1, words=("engine=auto", bf16)),
        _Variant(name="one device, fp32", ranks=1, words=("engine=auto", "engine.precision=fp32")),
        _Variant(name="ZeRO-1", ranks=ranks, words=("engine=zero1", bf16)),
        _Variant(name="ZeRO-2", ranks=ranks, words=("engine=zero2", bf16)),
        _Variant(name="ZeRO-1, clipped", ranks=ranks, words=("engine=zero1", bf16, clipped)),
    ]


class MovedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what operations read and write.

    Attributes:
        bytes: By name of the operation.
        calls: Operations that moved anything.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Carry an operation out, and count it."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("aten::"):
            moved = _moved(func._schema, args, kwargs or {}, out)
            self.bytes[name.removeprefix("aten::")] += moved
            self.calls += moved > 0
        return out


def _moved(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operation reads and writes; those of a view are none."""
    name = schema.name.removeprefix("aten::")
    written = [each for each in schema.arguments if each.alias_info and each.alias_info.is_write]
    is_view = any(each.alias_info and not each.alias_info.is_write for each in schema.arguments)
    if (is_view and not written) or name.startswith("empty"):
        return 0
    given = dict(zip([each.name for each in schema.arguments], args, strict=False)) | kwargs
    total = 0
    for argument in schema.arguments:
        numbers = _bytes(given.get(argument.name))
        if argument in written:
            is_only_written = argument.name == "out" or name in _WRITES_ALONE
            # A gradient that is divided as it is read is written where there is a divisor.
            is_only_read = argument.name == "grads" and given.get("grad_scale") is None
            total += numbers * (1 if is_only_written or is_only_read else 2)
        else:
            total += numbers
    if not written:
        total += _bytes(out)
    return total


def _bytes(value: Any) -> int:
    return sum(each.nbytes for each in tree_leaves(value) if isinstance(each, Tensor))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("update", description=_DESCRIPTION, rounds=1)
    parser.add_argument("--model", default="xl_2", help="of configs/model; default xl_2")
    parser.add_argument("--scales", type=command.positive, default=3, help="default 3")
    parser.add_argument("--ranks", type=command.positive, default=8, help="default 8")
    parser.add_argument("--top", type=command.positive, default=3, help="operations named")
    names = [each.name for each in _variants(2)]
    parser.add_argument(
        "--engines", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    options = parser.parse_args(arguments)
    setting = command.setting("update", options)
    alone = 0
    for variant in _variants(options.ranks):
        if variant.name not in options.engines:
            continue
        job = compose_job(
            [
                "+exp=imagenet_xl",
                f"model={options.model}",
                f"flow.scales={options.scales}",
                "flow.critical_times=null",
                "data.classes=1000",
                f"cluster.workers={variant.ranks}",
                f"train.global_batch={variant.ranks * options.scales}",
                *variant.words,
            ]
        )
        found = apart(_measure, {"job": to_dict(job), "top": options.top})
        backward, weights = found.pop("backward"), found.pop("weights")
        alone = alone or backward
        known = variant.ranks > 1 and options.engines[0] == names[0]
        reducing = (backward - alone) / weights if known else None
        setting.report.add(**{"engine": variant.name, "reducing": reducing, **found})
    setting.deliver()
    return 0


def _measure(payload: dict[str, Any]) -> dict[str, Any]:
    """Count the second update of a job on its first rank."""
    job = from_dict(JobConfig, payload["job"])
    context = join_alone(job)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(patch.object(nn.Module, "to", stay))
        training = Training(payload["job"], context)
        training.update()
        with MovedBytes() as backward:
            training.backward(last=True)
        decays = torch.tensor([0.999], dtype=torch.float64)
        with MovedBytes() as update:
            training.engine.update(learning_rate=1e-4, ema_decays=decays)
    return _row(job, backward, update, top=payload["top"])


def _row(job: JobConfig, backward: MovedBytes, update: MovedBytes, *, top: int) -> dict[str, Any]:
    work, placement = workload(job), resolve_placement(job)
    held = (
        work.split(placement)
        if zero_stage(job)
        else sum(weights for weights, _ in work.shards(placement))
    )
    copied = work.element_bytes if zero_stage(job) or work.element_bytes < _FULL_BYTES else 0
    state = 2 * _FULL_BYTES * (3 + work.averages)
    once = work.gradient_bytes + state + copied
    moved = sum(update.bytes.values())
    return {
        "backward": sum(backward.bytes.values()),
        "weights": sum(weights for weights, _ in work.shards(placement)),
        "parameters_M": held / 1e6,
        "bytes_each": moved / held,
        "bound": once + work.gradient_bytes,
        "ratio": moved / held / (once + work.gradient_bytes),
        "once": moved / held / once,
        "operations": update.calls,
        "most": ", ".join(
            f"{name} {100 * number / moved:.0f} %" for name, number in update.bytes.most_common(top)
        ),
    }


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
