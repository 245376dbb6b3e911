"""The page itself: one HTML file without scripts, which asks no network for anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.page.arms import Arm, arms_of
from trainer.page.markup import Html, document, join, style_sheet, tag
from trainer.page.quality import quality_section
from trainer.page.sections import (
    cost_section,
    curves_section,
    origin_section,
    overview_section,
    samples_section,
    settings_section,
)
from trainer.page.story import RunStory
from trainer.page.style import STYLE

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MAX_TITLE = 60


def make_page(stories: Sequence[RunStory]) -> str:
    """Return the page of runs, the same whenever it is made.

    Args:
        stories: The runs, at least one; those that differ in their seed alone are drawn as one.
    """
    arms = arms_of(stories)
    body = [
        overview_section(arms),
        samples_section(arms),
        quality_section(arms),
        curves_section(arms),
        cost_section(arms),
        settings_section(arms),
        origin_section(arms),
    ]
    names = ", ".join(story.name for story in stories)
    title = names if len(names) <= _MAX_TITLE else f"{len(stories)} runs"
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        style_sheet(STYLE),
    )
    whole = join(_header(arms, stories), tag("main", *body), _footer())
    return document(title=f"{title} · LapFlow", head=head, body=whole)


def _header(arms: Sequence[Arm], stories: Sequence[RunStory]) -> Html:
    first = stories[0]
    if len(stories) == 1:
        heading, status = first.name, _status(first)
    else:
        heading = f"{len(stories)} runs"
        seeds = len({story.uri if story.seed is None else story.seed for story in stories})
        one = "one arm, several seeds" if seeds > 1 else "one training, several times"
        status = f"{len(arms)} arms" if len(arms) > 1 else one
    chip = tag("span", status, class_="chip")
    words = tag("p", _in_short(first) if len(arms) == 1 else "side by side", class_="lead")
    return tag("header", tag("p", "LapFlow", class_="brand"), tag("h1", heading, " ", chip), words)


def _status(story: RunStory) -> str:
    if story.is_complete:
        return "complete"
    total = story.total_images
    return "under way" if not total else f"{story.images / total:.0%} of its images"


def _in_short(story: RunStory) -> str:
    """Say in a line what the run is."""
    settings = story.settings

    def value(group: str, key: str) -> object:
        part = settings.get(group)
        return part.get(key) if isinstance(part, Mapping) else None

    words = []
    if (data := value("data", "name")) is not None:
        words.append(f"trained on {data}")
    if (count := story.about.get("training images", "")).isdecimal():
        words.append(f"{int(count):,} images of {value('data', 'image_size')} pixels a side")
    depth, width = value("model", "depth"), value("model", "width")
    if depth is not None:
        words.append(f"depth {depth}, width {width}")
    if (scales := value("flow", "scales")) is not None:
        words.append("1 scale" if scales == 1 else f"{scales} scales")
    if story.newest is not None:
        words.append(f"last saved {story.newest.saved_at[:10]}")
    return " · ".join(words)


def _footer() -> Html:
    words = (
        "Made from the run's own records by python -m trainer.report. "
        "This file has no scripts and loads nothing."
    )
    return tag("footer", tag("p", words))
