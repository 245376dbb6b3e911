"""A plan in words and as a table: what is chosen, what binds it, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.hardware import HardwareConfig
from pipelines.formats import format_bytes, format_table
from trainer.engine.zero_config import KEEP_WEIGHTS
from trainer.planning.device_work import update_bytes_each
from trainer.planning.planner import USABLE, Candidate, Choices, best, choose
from trainer.planning.queues import simulate
from trainer.planning.whole_scale import (
    break_even_flops_per_byte,
    fastest_whole_scale,
    flops_per_byte,
)
from trainer.planning.workload import Workload

_GIB = 2**30


def explain(
    found: Sequence[Candidate],
    workload: Workload,
    hardware: HardwareConfig,
    choices: Choices,
    *,
    one_scale: Workload | None = None,
    changes: Mapping[str, tuple[Workload, HardwareConfig, Sequence[int]]],
) -> list[str]:
    """Say in words what is chosen, what binds it, what it costs, and what would change it.

    Args:
        found: All candidates, best first.
        workload: The training step.
        hardware: What it runs on.
        choices: What to choose from.
        one_scale: The step with one scale and the same images, to compare with.
        changes: By what is changed, the step, the hardware and the ZeRO stages to choose from with
            the change, which are planned anew.

    Returns:
        Sentences.

    Raises:
        HardwareError: The memory of the GPUs is not known.
    """
    chosen = best(found, choices.aim)
    if chosen is None:
        words = [_nothing_fits(found[0])]
    else:
        words = [_decision(chosen), *_describe_passed_over(found, chosen)]
        if one_scale is not None:
            single = choose(one_scale, hardware, choices)
            words.append(_compare_one_scale(chosen, single, scales=len(workload.scales)))
        words += _describe_whole_scale(workload, hardware, choices, chosen)
    for change, (changed, on, stages) in changes.items():
        other = choose(changed, on, replace(choices, zero_stages=stages))
        words.append(f"With {change}: {_describe_change(chosen, other)}.")
    return words


def assumptions(workload: Workload, hardware: HardwareConfig, *, zero_stage: int) -> str:
    """Say in a sentence what times stand on, and how far from it measured steps were.

    Args:
        workload: The training step.
        hardware: What it runs on.
        zero_stage: 0 (no ZeRO) to 3.
    """
    counted = [
        f"matrix products at {hardware.matmul_tflops:g} TFLOP/s",
        f"what is sent, at {hardware.node_link_gb_per_s:g} GB/s inside a node and "
        f"{hardware.network_gb_per_s:g} between nodes",
    ]
    if not workload.offload:
        moved = update_bytes_each(workload, zero_stage=zero_stage)
        counted.append(
            f"an update of {moved} bytes for each parameter of a rank at "
            f"{hardware.memory_gb_per_s:g} GB/s of its memory"
        )
    if workload.encoder_flops:
        kind = "fp32" if workload.encodes_in_fp32 else "bf16"
        rate = hardware.fp32_tflops if workload.encodes_in_fp32 else hardware.matmul_tflops
        counted.append(
            f"{workload.encoder_flops / 1e12:.3f} TFLOP to encode an image, in {kind} at {rate:g} "
            "TFLOP/s"
        )
    if workload.launches:
        counted.append(
            f"at least {hardware.launch_us:g} us of the host for each of the {workload.launches:,} "
            "kernels of a pass"
        )
    return (
        f"Times count {'; '.join(counted)} (cluster.hardware). Norms, activations and what "
        "DeepSpeed does beside are left out: one H200 took 1.9 to 2.4 times as long where products "
        "are many, and 3 to 7 times where they are few (docs/benchmarks.md)."
    )


def _describe_whole_scale(
    workload: Workload, hardware: HardwareConfig, choices: Choices, chosen: Candidate
) -> list[str]:
    """Tell if a scale whole on one rank would be faster, where arithmetic does not rule it out."""
    if flops_per_byte(hardware) < break_even_flops_per_byte(
        replace(workload, regathers=True), ranks=2
    ):
        return []
    if choices.keeps_weights:
        workload = replace(workload, kept_parameters=max(KEEP_WEIGHTS.values()))
    whole = fastest_whole_scale(workload, hardware, zero_stages=choices.zero_stages)
    if whole is None or whole.time.busy >= chosen.time.busy:
        return []
    return [
        f"With {whole}, ZeRO-{whole.zero_stage}, a step would take {_ms(whole.time.total)} at "
        "best; no engine can do that."
    ]


def simulated_ms(one: Candidate) -> float:
    """Simulate the queues of a GPU in a step of a candidate; milliseconds."""
    return 1000 * one.predict_time(timing=simulate).total


def _compare_one_scale(chosen: Candidate, single: Candidate | None, *, scales: int) -> str:
    """What separate weights cost against one scale with the same images."""
    if single is None:
        return "One scale with the same images does not fit."
    held = chosen.memory.total - single.memory.total
    time = chosen.time.total - single.time.total
    return (
        f"Against one scale with the same images ({single}: {_format_held(single)}, "
        f"{_ms(single.time.total)}) the separate weights of {scales} scales take "
        f"{_compare(held, format_bytes(abs(held)), 'memory')} of a rank, and "
        f"{_compare(time, _ms(abs(time)), 'time')} a step."
    )


def _compare(difference: float, shown: str, of: str) -> str:
    """How much more or less it is, as shown; what is shown as nothing is neither."""
    if not any(digit in shown for digit in "123456789"):
        return f"as much {of}"
    return f"{shown} {'more' if difference > 0 else 'less'}"


def _decision(chosen: Candidate) -> str:
    stage = f"with ZeRO-{chosen.zero_stage}" if chosen.zero_stage else "without ZeRO"
    how = ", ".join(filter(None, (stage, chosen.extras)))
    parts = [
        f"scale {k}'s experts over {ranks} ranks" for k, ranks in chosen.placement.sharded.items()
    ]
    words = f"Shard {' and '.join(parts)}, {how}."
    if not parts:
        words = f"No sharding is needed: every rank holds all experts, {how}."
    if chosen.keeps_weights:
        settings = ",".join(f"{name}:{value}" for name, value in KEEP_WEIGHTS.items())
        words += (
            " Weights that are gathered stay for the backward pass, by "
            f"engine.deepspeed.zero_optimization={{{settings}}}."
        )
    if chosen.device_limit is not None:
        words += (
            f" A rank holds {_format_held(chosen)}, and may hold "
            f"{format_bytes(chosen.device_limit)}: {USABLE:.0%} of its GPU."
        )
    return words


def _describe_passed_over(found: Sequence[Candidate], chosen: Candidate) -> list[str]:
    """What would be faster if it fitted, and the best of the other kind: sharded or replicated."""
    words = []
    faster = [one for one in found if not one.fits and one.time.total < chosen.time.total]
    if faster:
        quick = min(faster, key=lambda one: one.time.total)
        words.append(
            f"{quick} would take {_ms(quick.time.total)}, but needs {_format_held(quick)}."
        )
    sharded = bool(chosen.placement.sharded)
    others = [one for one in found if one.fits and bool(one.placement.sharded) != sharded]
    if others:
        kind = "holds all experts on every rank" if sharded else "shards"
        other = min(others, key=lambda one: one.time.total)
        words.append(
            f"The fastest that {kind} is {other}: {_ms(other.time.total)} and "
            f"{_format_held(other)}."
        )
    return [each[0].upper() + each[1:] for each in words]


def _format_held(one: Candidate) -> str:
    return format_bytes(one.memory.total)


def _nothing_fits(smallest: Candidate) -> str:
    words = f"Nothing fits: the smallest, {smallest}, needs {_format_held(smallest)} a rank"
    if smallest.device_limit is not None:
        words += f" and may have {format_bytes(smallest.device_limit)}"
    if smallest.host_limit is not None and smallest.memory.host > smallest.host_limit:
        words += (
            f"; {format_bytes(smallest.memory.host)} of host memory, of which there are "
            f"{format_bytes(smallest.host_limit)}"
        )
    return f"{words}."


def _describe_change(before: Candidate | None, after: Candidate | None) -> str:
    if after is None:
        return "nothing fits" if before else "still nothing fits"
    figures = f"{after.images_per_second:,.0f} images/s, {_format_held(after)}"
    if before is None:
        return f"{after} fits ({figures})"
    same = str(before) == str(after)
    was = f"now {before.images_per_second:,.0f} images/s"
    return f"{'the same choice' if same else after} ({figures}; {was})"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


_SHORT = {
    "gradients": "grads",
    "activations": "activ.",
    "reduction": "reduce",
    "encoding": "encode",
    "launching": "launch",
}


def placement_table(
    shown: Sequence[Candidate], *, chosen: Candidate | None = None, left_out: int = 0
) -> str:
    """Render one row for each candidate: GiB of a rank by part, ms of a step by part, images/s.

    Args:
        shown: The candidates, at least one.
        chosen: The one to mark.
        left_out: How many more there are.
    """
    offload = any(one.memory.host for one in shown)
    head = ["", "placement", "ZeRO"]
    head += [_SHORT.get(name, name) for name in shown[0].memory.parts]
    head += ["GiB", *(["host"] if offload else []), "fits"]
    timed = _timed(shown)
    head += [_SHORT.get(name, name) for name in timed]
    head += ["ms", "images/s"]
    rows = [head]
    for one in shown:
        held_as = ", ".join(filter(None, (str(one.placement), one.extras)))
        row = ["*" if one == chosen else "", held_as, str(one.zero_stage or "-")]
        row += [f"{value / _GIB:.2f}" for value in one.memory.parts.values()]
        row += [f"{one.memory.total / _GIB:.2f}"]
        row += [f"{one.memory.host / _GIB:.2f}"] if offload else []
        row += ["yes" if one.fits else "no"]
        row += [f"{1000 * value:.1f}" for value in (one.time.parts[name] for name in timed)]
        row += [f"{1000 * one.time.total:.1f}", f"{one.images_per_second:,.0f}"]
        rows.append(row)
    table = format_table(rows, align=f"<<{'>' * (len(head) - 2)}")
    return f"{table}\n… and {left_out} more (--all)" if left_out else table


def as_json(one: Candidate) -> dict[str, Any]:
    """Return a candidate as plain values: bytes and seconds."""
    return {
        "placement": {str(k): ranks for k, ranks in one.placement.sharded.items()},
        "zero_stage": one.zero_stage,
        "regather_tokens": one.regathers,
        "zero_optimization": dict(KEEP_WEIGHTS) if one.keeps_weights else {},
        "activation_checkpointing": list(one.recomputed),
        "bytes_per_rank": {
            **one.memory.parts,
            "total": one.memory.total,
            "host": one.memory.host,
        },
        "fits": one.fits,
        "seconds_per_step": {**one.time.parts, "total": one.time.total},
        "images_per_second": one.images_per_second,
    }


def _timed(shown: Sequence[Candidate]) -> list[str]:
    """The parts of a step's time to show: of those that few steps have, the ones that some has."""
    seldom = ("offload", "encoding", "launching")
    return [
        name
        for name in shown[0].time.parts
        if name not in seldom or any(one.time.parts[name] for one in shown)
    ]
