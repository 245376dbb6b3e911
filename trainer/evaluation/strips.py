"""Strips of samples: how one comes into being, scale by scale, and what lies between two noises."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from models.axes import Bands
from models.pyramid import merge, up
from trainer.evaluation.grid import pixels_of
from trainer.evaluation.samples import ImageSampler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL_INCHES = 0.85
_DOTS_PER_INCH = 110


class Moment(NamedTuple):
    """What the scales of one image held at a time."""

    time: float
    """From 0, noise, to 1, data."""
    bands: Bands
    """Of the scales that were there, coarse to fine, each [1, c, h, w], on the host."""


def film(
    sampler: ImageSampler, model: nn.Module, label: int, *, index: int, moments: int
) -> list[Moment]:
    """Draw one sample, and keep what its scales held on the way.

    Args:
        sampler: Decides the sample.
        model: Velocity model.
        label: Its class.
        index: Its index, which decides its noise.
        moments: How many to keep at most, evenly spread over time; the first, the last and those at
            which a scale enters always are.

    Raises:
        SolverError: The solver comes to no end.
    """
    seen: dict[float, Bands] = {}

    def observe(time: float, states: Bands) -> None:
        # Where a scale enters, what comes second is with it.
        seen[time] = tuple(state.float().cpu() for state in states)

    noise = sampler.noise(first=index, count=1)
    sampler.from_noise(model, noise, torch.tensor([label]), observe=observe)
    entering = sampler.flow.stages.activation_times
    even = torch.linspace(0, 1, max(2, moments + 1 - len(entering))).tolist()
    times = sorted({min(seen, key=lambda time: abs(time - want)) for want in (*entering, *even)})
    return [Moment(time, seen[time]) for time in times]


def picture_of(sampler: ImageSampler, bands: Bands) -> Tensor:
    """Return the picture that scales add up to, missing ones left out, [1, c, h, w], on the host.

    Args:
        sampler: Knows the scales, and the codec.
        bands: The coarsest scales, as many as there are.
    """
    image = merge(bands)
    for _ in range(sampler.flow.stages.scales - len(bands)):
        image = up(image)
    return sampler.decoded(image.to(sampler.device)).cpu()


def film_picture(
    sampler: ImageSampler, films: Sequence[Sequence[Moment]], labels: Sequence[int]
) -> Figure:
    """Draw films: a row for each scale, one for what they add up to, and a column for each time.

    Bands are shown as they are, grey for 0; of latents the first three channels, or the first.

    Args:
        sampler: The one that drew them.
        films: One for each image.
        labels: Their classes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = sampler.flow.stages
    rows, columns = stages.scales + 1, max(map(len, films))
    size = (_CELL_INCHES * columns + 1.3, (_CELL_INCHES * rows + 0.3) * len(films))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(films), 1, squeeze=False)[:, 0]
    for part, moments, label in zip(parts, films, labels, strict=True):
        part.set_edgecolor("0.8")
        part.set_linewidth(1)
        panels = part.subplots(rows, columns, squeeze=False)
        for panel in panels.flat:
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_color("0.8")
        for row, name in enumerate([*_scale_names(sampler), f"class {label}"]):
            panels[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
        for column, moment in enumerate(moments):
            panels[0, column].set_title(f"t = {moment.time:.2f}", fontsize="small")
            for row, band in enumerate(moment.bands):
                _show(panels[row, column], band)
            for row in range(len(moment.bands), stages.scales):
                _say_absent(panels[row, column], stages.activation_times[row])
            _show(panels[-1, column], picture_of(sampler, moment.bands))
    return figure


def png_of(figure: Figure) -> bytes:
    """Return a figure as a PNG, the same bytes whenever it is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DOTS_PER_INCH, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _scale_names(sampler: ImageSampler) -> list[str]:
    scales, size = sampler.flow.stages.scales, sampler.shape.size
    kind = "" if sampler.codec.factor == 1 else "\nlatent"
    sides = [size >> k for k in reversed(range(scales))]
    return [f"scale {scales - 1 - p}\n{side} x {side}{kind}" for p, side in enumerate(sides)]


def _show(panel: Any, image: Tensor) -> None:
    shown = image if image.shape[1] in (1, 3) else image[:, : 3 if image.shape[1] > 3 else 1]
    pixels = pixels_of(shown)[0]
    grey = pixels.shape[-1] == 1
    panel.imshow(pixels.squeeze(-1) if grey else pixels, cmap="gray", vmin=0, vmax=255)


def _say_absent(panel: Any, enters: float) -> None:
    panel.set_facecolor("0.96")
    panel.set_aspect("equal", adjustable="box")
    panel.text(
        *(0.5, 0.5, f"not yet,\nfrom {enters:.2f}"),
        transform=panel.transAxes,
        ha="center",
        va="center",
        color="0.45",
        fontsize="x-small",
    )


def between(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Turn noise into other noise, along the circle on which normal numbers stay normal.

    Args:
        start: Shape [b, n].
        end: Shape [b, n].
        steps: How many there are, both ends among them.

    Returns:
        Shape [b, steps, n]; the first and the last are the ends to the bit.
    """
    a, b = start.double(), end.double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = torch.arccos(cosine.clamp(-1, 1))[:, None, None]
    share = torch.linspace(0, 1, steps, dtype=torch.float64, device=a.device)[None, :, None]
    # The angle of equal noises is 0, and any weights that add up to 1 will do.
    sine = torch.sin(angle)
    is_flat = sine < 1e-6
    safe = torch.where(is_flat, torch.ones_like(sine), sine)
    first = torch.where(is_flat, 1 - share, torch.sin((1 - share) * angle) / safe)
    last = torch.where(is_flat, share, torch.sin(share * angle) / safe)
    mixed = (first * a[:, None] + last * b[:, None]).to(start.dtype)
    mixed[:, 0] = start
    if steps > 1:
        mixed[:, -1] = end
    return mixed


def interpolation(
    sampler: ImageSampler,
    model: nn.Module,
    labels: Sequence[int],
    *,
    ends: tuple[ImageSampler, ImageSampler],
    steps: int,
) -> Tensor:
    """Draw what lies between the samples of two seeds.

    Args:
        sampler: Decides how to draw, and in which batches.
        model: Velocity model.
        labels: Class of each row; row i begins and ends with the i-th sample of both seeds.
        ends: Samplers of the two seeds.
        steps: Samples in a row, both ends among them.

    Returns:
        The samples row by row, [rows * steps, c, h, w], on the host.

    Raises:
        SolverError: The solver comes to no end.
    """
    start, end = (each.noise(first=0, count=len(labels)) for each in ends)
    noise = between(start, end, steps).flatten(0, 1)
    classes = torch.tensor(labels).repeat_interleave(steps)
    parts = []
    for first in range(0, len(noise), sampler.batch):
        some = slice(first, first + sampler.batch)
        drawn = sampler.from_noise(model, noise[some], classes[some]).images
        parts.append(sampler.decoded(drawn).cpu())
    return torch.cat(parts)
