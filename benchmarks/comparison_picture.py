"""The picture of a comparison: distance against images seen, and against the cost of training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

_COLOURS = ("#4C72B0", "#DD8452", "#55A868", "#C44E52", "#8172B3")


class Curves(Protocol):
    """What is drawn of an arm."""

    @property
    def name(self) -> str:
        """What the picture calls it."""
        ...

    @property
    def runs(self) -> Mapping[str, Sequence[Any]]:
        """Reports of each run's checkpoints, oldest first."""
        ...

    def curve(self, run: str, features: str) -> list[tuple[int, float]]:
        """Images and distance along one run."""
        ...

    def mean(self, features: str) -> list[tuple[int, float]]:
        """Images and distance, averaged over runs."""
        ...

    def teraflops(self, images: float) -> float:
        """Cost of training on so many images."""
        ...


def draw_picture(arms: Sequence[Curves], features: Sequence[str], file: Path) -> None:
    """Draw one row for each extractor: seeds as thin lines, their mean as a thick one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8 * len(features)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(features), 2, squeeze=False, sharey="row")
    for name, (by_images, by_cost) in zip(features, axes, strict=True):
        real = next(iter(arms[0].runs.values()))[-1].distance(name).real
        for panel in (by_images, by_cost):
            panel.set_yscale("log")
            panel.grid(which="both", color="0.93")
        for arm, colour in zip(arms, _COLOURS, strict=False):
            _draw(by_images, arm, name, colour, lambda images: images / 1000)
            _draw(by_cost, arm, name, colour, arm.teraflops)
        by_images.set_ylabel(f"Fréchet distance ({name})")
        by_images.set_title(
            "" if real is None else f"real training images: {real.frechet:.3g}",
            fontsize="medium",
            loc="left",
        )
        by_images.set_xlabel("images seen, thousands")
        by_cost.set_xlabel("training cost, TFLOP (6 FLOP for each multiply-add)")
        by_images.legend(frameon=False)
    figure.savefig(file, dpi=110)


def _draw(
    panel: Any, arm: Curves, features: str, colour: str, place: Callable[[float], float]
) -> None:
    for run in arm.runs:
        xs, ys = zip(*arm.curve(run, features), strict=True)
        panel.plot([place(x) for x in xs], ys, color=colour, linewidth=0.8, alpha=0.6)
    if mean := arm.mean(features):
        xs, ys = zip(*mean, strict=True)
        panel.plot(
            [place(x) for x in xs],
            ys,
            color=colour,
            linewidth=2.4,
            marker="o",
            markersize=4,
            label=f"{arm.name}, mean of {len(arm.runs)}",
        )
