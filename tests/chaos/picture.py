"""The picture of a campaign: how far the run was at each time, and what befell it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.chaos.campaign import Story

_BLUE, _RED, _ORANGE = "#4C72B0", "#C44E52", "#DD8452"
_STILL_S = 3.0
"""Times without an update are shown as such from this length on."""


def timeline(story: Story) -> Figure:
    """Draw progress over time, each fault, and the times without an update."""
    whole = (story.ended - story.began) / 60
    figure = Figure(figsize=(11, 3 + 0.2 * len(story.incidents)), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(
        2, 1, sharex=True, height_ratios=(6, max(2, len(story.incidents)))
    )
    minutes = [(mark.time - story.began) / 60 for mark in story.marks]
    above.plot(minutes, [mark.images / 1000 for mark in story.marks], color=_BLUE)
    above.set_ylabel("thousand images")
    told = [when for when, mark in zip(minutes, story.marks, strict=True) if not mark.resumed]
    for before, after in pairwise([0.0, *told]):
        if after - before > _STILL_S / 60:
            for panel in (above, below):
                panel.axvspan(before, after, color="0.92", linewidth=0, zorder=0)
    for row, incident in enumerate(story.incidents):
        begin = (incident.time - story.began) / 60
        length = (incident.recovered - incident.time) / 60
        above.axvline(begin, color=_RED, linewidth=0.8, zorder=1)
        below.barh(row, length, left=begin, height=0.7, color=_ORANGE)
        is_left = begin < whole - begin - length
        below.text(
            *(begin + length if is_left else begin, row, f"  {incident.cost()}  "),
            ha="left" if is_left else "right",
            va="center",
            fontsize="x-small",
        )
    below.set_yticks(range(len(story.incidents)), [each.name for each in story.incidents])
    below.tick_params(axis="y", labelsize="small", length=0)
    below.invert_yaxis()
    below.set_xlabel("minutes; grey: no update")
    for panel in (above, below):
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(0, whole)
    return figure


def save_timeline(story: Story, path: Path) -> None:
    """Write the picture as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the program's version the same picture is the same file.
    timeline(story).savefig(path, dpi=80, metadata={"Software": None})
