"""Draws the picture of docs/design/expert-shards.md: `python docs/placement_picture.py`.

Who holds what of LapFlow-XL/2 with three scales on eight GPUs, replicated and with the coarse
scales' experts sharded; and what a rank's memory comes to, beside one scale with the same images.
All figures are those of the planner.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from cluster.placement import Placement, replica_ranks
from trainer.config.composition import compose_job
from trainer.planning.memory import RankMemory, rank_memory
from trainer.planning.placing import workload
from trainer.planning.workload import Workload

FOLDER = Path(__file__).parent / "images"
_JOB = ("+exp=imagenet_xl", "cluster=h100_8", "train.global_batch=264")
_SCALES = 3
_SHARDED = {2: 8, 1: 8}
_STAGE = 1
_COLOURS = {0: "#4C72B0", 1: "#DD8452", 2: "#55A868", None: "0.35"}
_MEMORY_COLOURS = {
    "weights": "#7A4B9A",
    "gradients": "#B08CC8",
    "optimizer": "#C4A000",
    "ema": "#E5D27A",
    "activations": "#5B9BA8",
    "buffers": "#B9D4D9",
}
_GIB = 2**30
_PALE = 0.5
_STRIP, _GAP = 0.34, 0.06
"""Height of a strip and what is between two, in rows."""


def placement() -> Figure:
    """Draw what each rank holds of each part, and the memory of a rank."""
    work = workload(compose_job([*_JOB, "flow=three_scales"]))
    placements = (Placement.of({}, scales=_SCALES), Placement.of(_SHARDED, scales=_SCALES))

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.6, 1))
    grids, bars = halves
    panels = grids.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.06})
    for panel, where in zip(panels, placements, strict=True):
        _draw_replicas(panel, work, where)
    grids.legend(
        handles=[
            Patch(facecolor="0.35", label="weights"),
            Patch(facecolor="0.35", alpha=_PALE, label="gradients, optimizer state and EMA"),
            Patch(facecolor="0.93", label="on other ranks"),
        ],
        loc="outside lower center", ncols=3, frameon=False,
    )  # fmt: skip
    panel = bars.subplots()
    memories = _memories()
    _draw_memory(panel, memories)
    panel.set_title(_heading(*memories.values()), pad=24, fontsize="medium", fontweight="bold")
    return figure


def _memories() -> dict[str, RankMemory]:
    """Predict a rank's memory: of three scales in three ways, and of one scale."""
    whole, sharded = (Placement.of(where, scales=_SCALES) for where in ({}, _SHARDED))
    held = {
        f"{_SCALES} scales, {whole}": ("three_scales", "device", whole),
        f"{sharded}": ("three_scales", "device", sharded),
        f"{sharded},\nEMA on the host": ("three_scales", "host", sharded),
        "one scale,\nthe same images": ("one_scale", "device", Placement.of({}, scales=1)),
    }
    return {
        name: rank_memory(
            workload(compose_job([*_JOB, f"flow={flow}", f"train.ema.device={ema}"])),
            where,
            zero_stage=_STAGE,
        )
        for name, (flow, ema, where) in held.items()
    }


def _heading(whole: RankMemory, sharded: RankMemory, host: RankMemory, single: RankMemory) -> str:
    """Say what sharding does to a rank's memory, and what is left against one scale."""
    weights, activations = (
        (getattr(sharded, part) - getattr(whole, part)) / _GIB
        for part in ("weights", "activations")
    )
    return (
        f"sharding: weights {weights:+.1f} GiB, activations {activations:+.1f} GiB, together "
        f"{_change(whole, sharded)}; with the EMA on the host {_change(whole, host)}\n"
        f"against one scale: {_change(single, sharded)}, and {_change(single, host)}"
    )


def _change(before: RankMemory, after: RankMemory) -> str:
    return f"{(after.total - before.total) / _GIB:+.1f} GiB"


def _draw_replicas(panel: Any, work: Workload, where: Placement) -> None:
    """A cell for each rank and part; its width is the whole part, filled as far as it is held."""
    ranks, scales = work.world_size, len(work.scales)
    # Each part with the share of it that is on every rank, and over how many ranks the rest is.
    rows: list[tuple[int | None, int, float, int]] = [(None, work.shared_parameters, 1, 1)]
    for position, (load, size) in enumerate(zip(work.scales, where.ranks, strict=True)):
        whole = load.unpartitioned / load.parameters if size > 1 else 1
        rows.append((scales - 1 - position, load.parameters, whole, size))
    for row, (k, _, whole, size) in enumerate(rows):
        for rank in range(ranks):
            shard = rank % size
            weights = [(0, whole), (whole + (1 - whole) * shard / size, (1 - whole) / size)]
            # Of what its replica group has in common each rank keeps the state of an equal part.
            part = shard / size + replica_ranks(rank, size, ranks).index(rank) / ranks
            state = [
                (whole * rank / ranks, whole / ranks),
                (whole + (1 - whole) * part, (1 - whole) / ranks),
            ]
            top = row - _STRIP - _GAP / 2
            _strip(panel, (rank, top), weights, colour=_COLOURS[k])
            _strip(panel, (rank, row + _GAP / 2), state, colour=_COLOURS[k], alpha=_PALE)
    panel.set_yticks(
        range(len(rows)),
        [
            f"shared\n{weights / 1e6:.1f} M" if k is None else f"scale {k}\n{weights / 1e6:.0f} M"
            for k, weights, *_ in rows
        ],
    )
    panel.set_xticks([rank + 0.5 for rank in range(ranks)], [f"{rank}" for rank in range(ranks)])
    panel.xaxis.set_ticks_position("top")
    panel.xaxis.set_label_position("top")
    panel.set_xlabel("rank")
    panel.tick_params(length=0)
    panel.set_xlim(0, ranks)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_title(f"{where}, ZeRO-{_STAGE}", pad=10, fontweight="bold")
    for spine in panel.spines.values():
        spine.set_visible(False)


def _strip(
    panel: Any,
    cell: tuple[int, float],
    held: Sequence[tuple[float, float]],
    *,
    colour: str,
    alpha: float = 1.0,
) -> None:
    """One part of a model as a bar in a rank's cell, of which the rank holds stretches."""
    width, (rank, top) = 0.86, cell
    left = rank + (1 - width) / 2
    stretches = [(0.0, 1.0, "0.93", 1.0), *((*stretch, colour, alpha) for stretch in held)]
    for start, size, face, opacity in stretches:
        panel.add_patch(
            Rectangle(
                (left + start * width, top),
                size * width,
                _STRIP,
                linewidth=0,
                facecolor=face,
                alpha=opacity,
            )
        )


def _draw_memory(panel: Any, memories: dict[str, RankMemory]) -> None:
    for row, memory in enumerate(memories.values()):
        left = 0.0
        for name, size in memory.parts.items():
            gib = size / _GIB
            panel.barh(
                row, gib, left=left, height=0.62, color=_MEMORY_COLOURS[name],
                label=name.replace("ema", "EMA") if row == 0 else None,
            )  # fmt: skip
            if gib > 0.5:
                ink = "white" if name == "weights" else "black"
                panel.text(left + gib / 2, row, f"{gib:.2f}", color=ink, ha="center", va="center")
            left += gib
        panel.text(
            left + 0.1, row, f"{left:.1f} GiB", va="center", fontweight="bold",
            bbox={"facecolor": "white", "linewidth": 0, "pad": 1},
        )  # fmt: skip
    *_, single = memories.values()
    panel.axvline(single.total / _GIB, color="0.3", linewidth=1, linestyle="--", zorder=0)
    panel.set_yticks(range(len(memories)), list(memories))
    panel.set_ylim(len(memories) - 0.5, -0.5)
    panel.set_xlim(0, 1.12 * max(memory.total for memory in memories.values()) / _GIB)
    panel.set_xlabel("GiB of a rank, predicted: bf16, 33 images")
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.legend(ncols=6, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"folder, default {FOLDER}")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    # Without the program's version and date the same picture is the same file.
    placement().savefig(options.output / "placement.png", dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
