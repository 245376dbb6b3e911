"""Draws the pictures of docs/method.md from the code itself: `python docs/pictures.py`.

Everything shown is computed by `models`: stages, paths, pyramids, attention pairs. With
`--checkpoint URI` it also draws how the samples of a trained model come into being.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from models.axes import Bands
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.path import LinearPath
from models.flow.sampler_config import SamplerConfig
from models.pyramid import merge, split, up
from models.transformer.config import preset
from models.transformer.cost import ModelShape

FOLDER = Path(__file__).parent / "images"
_COLOURS = {0: "#4C72B0", 1: "#DD8452", 2: "#55A868", 3: "#8172B3"}
_PHOTO_SIZE = 128
_TIMES = (0.0, 0.33, 0.5, 0.67, 0.83, 1.0)


def time_and_scale() -> Figure:
    """Draw when each scale is active, and how much signal and noise its state holds."""
    figure = _figure(10, 5.4)
    columns = figure.subplots(2, 2, height_ratios=(1, 1.25), sharex="col")
    for scales, (bars, levels) in zip((2, 3), columns.T, strict=True):
        stages = Flow(FlowConfig(scales=scales)).stages
        for position, tau in enumerate(stages.activation_times):
            k = scales - 1 - position
            bars.barh(position, 1 - tau, left=tau, height=0.62, color=_COLOURS[k])
            grid = "the full grid" if k == 0 else f"1/{2**k} of its side"
            bars.text(1 - 0.02, position, grid, color="white", ha="right", va="center")
            times = torch.linspace(tau, 1, 50)
            ones = torch.ones(50, 1, 1, 1)
            signal = LinearPath().state(ones, torch.zeros_like(ones), times, tau).flatten()
            levels.plot(times, signal, color=_COLOURS[k], label=f"signal of scale {k}")
            levels.plot([tau], [1 - tau], "o", color=_COLOURS[k], markersize=6, zorder=3)
        levels.plot([0, 1], [1, 0], "--", color="0.35", label="noise, all scales")
        for time in stages.critical_times:
            for panel in (bars, levels):
                panel.axvline(time, color="0.6", linestyle=":", linewidth=1, zorder=0)
        bars.set_yticks(range(scales), [f"scale {k}" for k in reversed(range(scales))])
        bars.set_title(f"K = {scales}: sampling goes from left to right")
        bars.tick_params(bottom=False)
        levels.set_xticks([0, *reversed(stages.critical_times), 1])
        levels.set_xlabel("time t: 0 is noise, 1 is data")
        levels.legend(frameon=False, loc="upper center", fontsize="small")
        levels.set_xlim(-0.02, 1.02)
        levels.set_ylim(-0.04, 1.08)
    columns[1, 0].set_ylabel("level in the state")
    for panel in columns.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def pyramid_and_path() -> Figure:
    """Draw a photograph's pyramid, and each scale's state along time."""
    flow = Flow(FlowConfig(scales=3))
    taus = flow.stages.activation_times
    bands = split(_photo(), 3)
    noise = torch.randn(
        1, flow.noise_size(channels=3, image_size=_PHOTO_SIZE), generator=_generator(1)
    )
    noise_bands = flow.noise_bands(noise, channels=3, image_size=_PHOTO_SIZE)

    figure = _figure(11, 6.7)
    cells = figure.subplots(4, len(_TIMES) + 1, gridspec_kw={"wspace": 0.04, "hspace": 0.06})
    for panel in cells.flat:
        _bare(panel)
    cells[0, 0].set_title("pyramid")
    for row, band in enumerate(bands):
        k = 2 - row
        _show(cells[row, 0], band, gain=1 if row == 0 else 3)
        cells[row, 0].set_ylabel(f"scale {k}", color=_COLOURS[k])
        if row:
            cells[row, 0].set_xlabel("contrast x 3", fontsize="small", color="0.5", labelpad=2)
    _show(cells[3, 0], merge(bands))
    cells[3, 0].set_ylabel("merged")
    for column, time in enumerate(_TIMES, 1):
        cells[0, column].set_title(f"t = {time:g}")
        active = sum(tau <= time for tau in taus)
        states = tuple(
            flow.path.state(bands[p], noise_bands[p], torch.tensor([time]), taus[p])
            for p in range(active)
        )
        for row, state in enumerate(states):
            _show(cells[row, column], state)
        for row in range(active, 3):
            cells[row, column].text(
                0.5, 0.5, "not yet", color="0.6", ha="center", va="center",
                transform=cells[row, column].transAxes,
            )  # fmt: skip
        _show(cells[3, column], _on_full_grid(states, 3))
    return figure


def attention() -> Figure:
    """Draw which tokens see which, with areas to scale, at 256 pixels (32 x 32 latents)."""
    figure = _figure(9.2, 4.9)
    for scales, panel in zip((2, 3), figure.subplots(1, 2), strict=True):
        shape = ModelShape.of(preset("B/2"), scales=scales, channels=4, image_size=32, classes=1000)
        edges = [0, *np.cumsum(shape.tokens).tolist()]
        total = edges[-1]
        panel.add_patch(_rectangle(0, 0, total, total, "0.93"))
        for position, (top, bottom) in enumerate(pairwise(edges)):
            k = scales - 1 - position
            panel.add_patch(_rectangle(0, top, bottom, bottom - top, _COLOURS[k]))
        for edge in edges[1:-1]:
            panel.axvline(edge, color="white", linewidth=1)
            panel.axhline(edge, color="white", linewidth=1)
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        names = [
            f"scale {scales - 1 - p}\n{tokens} tokens" for p, tokens in enumerate(shape.tokens)
        ]
        panel.set_yticks(middles, names)
        panel.set_xticks(middles, [f"{scales - 1 - p}" for p in range(scales)])
        panel.tick_params(length=0)
        panel.set_xlim(0, total)
        panel.set_ylim(total, 0)
        panel.set_aspect("equal")
        panel.set_xlabel("keys of scale")
        panel.set_ylabel("queries of")
        keys = shape.keys(scales)
        prefix = sum(own * seen for own, seen in zip(shape.tokens, keys, strict=True))
        dense = sum(shape.tokens) ** 2
        panel.set_title(
            f"K = {scales}: {prefix:,} of {dense:,} pairs ({prefix / dense:.0%})",
            fontsize="medium",
        )
        panel.text(
            (edges[-2] + total) / 2, edges[-2] / 2, "never computed", color="0.35",
            ha="center", va="center", fontsize="small" if scales == 2 else "x-small",
        )  # fmt: skip
        for spine in panel.spines.values():
            spine.set_visible(False)
    return figure


def sampling(checkpoint: str, *, images: int = 10, steps: int = 48) -> Figure:
    """Draw samples of a checkpoint as they come into being: one image in each column."""
    from trainer.evaluation.config import ModelSource
    from trainer.evaluation.loading import load_model
    from trainer.evaluation.strips import picture_of

    trained = load_model(ModelSource(checkpoint=checkpoint, device="cpu"))
    flow = trained.flow
    euler = SamplerConfig(solver="euler", steps=steps)
    sampler = trained.image_sampler(euler, seed=1, batch=images)
    seen: dict[float, Tensor] = {}

    def observe(time: float, states: Bands) -> None:
        seen[time] = picture_of(sampler, states)

    labels = torch.arange(images) % trained.shape.classes
    noise = sampler.noise(first=0, count=images)
    sampler.from_noise(trained.model, noise, labels, observe=observe)
    starts = [*flow.stages.activation_times, 1.0]
    wanted = [
        start + share * (end - start)
        for start, end in pairwise(starts)
        for share in (0, 0.34, 0.67)
    ]  # fmt: skip
    times = [min(seen, key=lambda time: abs(time - want)) for want in (*wanted, 1.0)]

    figure = _figure(0.85 * images + 0.8, 0.85 * len(times))
    cells = figure.subplots(
        len(times), images, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02}
    )
    for row, time in zip(cells, times, strict=True):
        entering = flow.stages.activation_times.index(time) if time in starts[:-1] else None
        for panel, image in zip(row, seen[time], strict=True):
            _bare(panel)
            _show(panel, image[None])
        colour = "black" if entering is None else _COLOURS[flow.stages.scales - 1 - entering]
        name = f"t = {time:.2f}"
        row[0].set_ylabel(name, color=colour, rotation=0, ha="right", va="center")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="URI of a checkpoint whose samples are drawn too")
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"folder, default {FOLDER}")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    figures = {
        "time_and_scale": time_and_scale(),
        "pyramid_and_path": pyramid_and_path(),
        "attention": attention(),
    }
    if options.checkpoint:
        figures["sampling"] = sampling(options.checkpoint)
    for name, figure in figures.items():
        # Without the program's version and date the same picture is the same file.
        figure.savefig(options.output / f"{name}.png", dpi=80, metadata={"Software": None})


def _photo() -> Tensor:
    """The middle of a photograph that ships with scikit-learn, in [-1, 1]."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    pixels = load_sample_image("china.jpg")
    side = min(pixels.shape[:2])
    left = (pixels.shape[1] - side) // 2
    square = Image.fromarray(pixels[:side, left : left + side])
    small = np.asarray(square.resize((_PHOTO_SIZE, _PHOTO_SIZE), Image.Resampling.BOX))
    return torch.from_numpy(small / 127.5 - 1).permute(2, 0, 1)[None].float()


def _on_full_grid(states: Bands, scales: int) -> Tensor:
    image = merge(states)
    for _ in range(scales - len(states)):
        image = up(image)
    return image


def _show(panel: Any, image: Tensor, *, gain: float = 1.0) -> None:
    pixels: NDArray[np.float32] = (image[0] * gain / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    panel.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)


def _bare(panel: Any) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_visible(False)


def _rectangle(left: float, top: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, top), width, height, facecolor=colour, edgecolor="none")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    main()
