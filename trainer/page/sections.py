"""The parts of a page: figures at a glance, samples, curves, time and cost, settings, origin."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial

from pipelines.formats import format_duration
from trainer.evaluation.reports import CheckpointReport, EvaluationReport
from trainer.page.arms import Arm, Curve, flattened, lines
from trainer.page.chart import compact, line_chart, number_field, share_bar, swatch
from trainer.page.markup import Html, join, tag
from trainer.page.pictures import picture
from trainer.page.story import RunStory
from trainer.page.tables import pairs, table
from trainer.training.goodput import KINDS, goodput

_MAX_GRIDS = 6
_WEIGHTS = {"ema": "EMA", "master": "trained"}
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_BIN = re.compile(r"loss_by_time/(scale_\d+)_(\d\.\d-\d\.\d)")
_CHARTS = (
    ("optim/gradient_norm", "Gradient norm", "of the whole model, before clipping", True, False),
    ("optim/learning_rate", "Learning rate", "of AdamW", False, True),
    ("speed/images_per_s", "Speed", "images per second, all workers together", False, True),
    ("speed/data_wait_share", "Waiting for data", "share of the time, 0 to 1", False, True),
    ("time/goodput", "Goodput", "share of the time in steps that count, 0 to 1", False, True),
    ("system/memory_device_gib", "Device memory", "GiB at most, of the fullest", False, True),
    ("system/memory_host_gib", "Host memory", "GiB of the largest worker", False, True),
)


def overview_section(arms: Sequence[Arm]) -> Html:
    """Return the figures at a glance: tiles of one run, a table of several."""
    stories = [story for arm in arms for story in arm.stories]
    if len(stories) == 1:
        tiles = [
            tag("div", tag("dt", name), tag("dd", value), class_="tile")
            for name, value in _glance(stories[0], with_distance=True).items()
        ]
        return tag("dl", *tiles, class_="tiles")
    alike = len({_protocol(story) for story in stories if story.final is not None}) == 1
    glances = [_glance(story, with_distance=alike) for story in stories]
    names = list(dict.fromkeys(name for glance in glances for name in glance))
    of_arm = [(arm, story) for arm in arms for story in arm.stories]
    rows = [
        [
            join(swatch(arm.colour), story.name),
            arm.label if len(arms) > 1 else "",
            "" if story.seed is None else str(story.seed),
            *(glance.get(name, "") for name in names),
        ]
        for (arm, story), glance in zip(of_arm, glances, strict=True)
    ]
    head = ["run", "what differs", "seed", *names]
    return tag("section", tag("h2", "At a glance"), table(head, rows, numbers_from=2), id="glance")


def _protocol(story: RunStory) -> tuple[str, str]:
    """Return what figures of the end of runs must have in common to stand in one table."""
    assert story.final is not None
    features = story.final.features
    return features, story.final.measurement.protocol(features)


def _glance(story: RunStory, *, with_distance: bool) -> dict[str, str]:
    total = story.total_images
    of = f" of {compact(total)}" if total is not None and not story.is_complete else ""
    told = {"images": f"{compact(story.images)}{of}"}
    final = story.final
    if with_distance and final is not None and final.frechet is not None:
        told[f"Fréchet, {final.features}"] = f"{final.frechet:.4g}"
        if final.real is not None and final.real.frechet > 0:
            told["times real images"] = f"{final.frechet / final.real.frechet:.3g}"
    if story.parameters is not None:
        told["parameters"] = compact(story.parameters)
    if story.images_per_s is not None:
        told["images per second"] = compact(story.images_per_s)
    if story.mfu is not None:
        told["MFU"] = f"{story.mfu:.1%}"
    if story.launches:
        told["wall time"] = format_duration(story.wall_s)
        told["goodput"] = f"{goodput(story.time):.0%}"
    return told


def samples_section(arms: Sequence[Arm]) -> Html:
    """Return grids of samples; of a single run how they came about too."""
    stories = [story for arm in arms for story in arm.stories]
    grids = [(story, grid) for story in stories if (grid := story.pictures.grid) is not None]
    parts = [
        tag(
            "figure",
            picture(grid.content, about=f"Grid of samples of {story.name}", class_="grid-picture"),
            tag("figcaption", _grid_words(story.name, grid.report, alone=len(stories) == 1)),
        )
        for story, grid in grids[:_MAX_GRIDS]
    ]
    if len(stories) == 1:
        shown = [tag("div", *parts, *_film(stories[0]), class_="hero"), *_on_the_way(stories[0])]
        shown = shown if parts or stories[0].pictures.film else shown[1:]
    else:
        shown = [tag("div", *parts, class_="grids")] if parts else []
    if len(grids) > _MAX_GRIDS:
        shown.append(tag("p", f"and of {len(grids) - _MAX_GRIDS} more runs", class_="note"))
    return tag("section", tag("h2", "Samples"), *shown, id="samples") if shown else Html()


def _grid_words(name: str, report: EvaluationReport | CheckpointReport, *, alone: bool) -> str:
    weights = _WEIGHTS.get(report.measurement.weights, report.measurement.weights)
    if not alone:
        other = "" if report.measurement.weights == "ema" else f", {weights} weights"
        return f"{name}, {report.images:,} images{other}"
    return (
        f"Samples of the {weights} weights after {report.images:,} images, a class in each row, "
        f"{report.network_evaluations:g} network evaluations each. None is chosen: they are the "
        "first by number."
    )


def _on_the_way(story: RunStory) -> list[Html]:
    if len(story.pictures.on_the_way) < 2:
        return []
    figures = [
        tag(
            "figure",
            picture(content, about=f"Samples after {images:,} images", class_="grid-picture"),
            tag("figcaption", f"{images:,} images"),
        )
        for images, content in story.pictures.on_the_way.items()
    ]
    words = "The same noise and classes, by the weights of the time."
    return [tag("h3", "In the course of training"), tag("div", *figures, class_="strip"),
            tag("p", words, class_="note")]  # fmt: skip


def _film(story: RunStory) -> list[Html]:
    if (film := story.pictures.film) is None:
        return []
    words = (
        "What each scale held at each time, from noise (t = 0) to the picture (t = 1), and what "
        "the scales add up to. A finer scale enters once the coarser ones have taken shape. After "
        f"{film.report.images:,} images."
    )
    shown = picture(
        film.content, about="How samples come into being, scale by scale", class_="film"
    )
    return [tag("figure", shown, tag("figcaption", words))]


def curves_section(arms: Sequence[Arm]) -> Html:
    """Return the curves of training."""
    loss = lines(arms, partial(_curve, name="loss/total"))
    charts = [line_chart("Loss", "of all scales together, on training images", loss, log=True)]
    scales = _scales(arms)
    if len(arms) == 1 and len(scales) > 1:
        charts.append(_loss_of_scales(arms[0], scales))
    else:
        for name in scales:
            drawn = lines(arms, partial(_curve, name=name))
            charts.append(line_chart(_in_words(name), "0 is the finest scale", drawn, log=True))
    if len(arms) == 1 and len(arms[0].stories) == 1:
        charts.append(_loss_by_time(arms[0].stories[0]))
    for name, title, words, log, zero in _CHARTS:
        drawn = lines(arms, partial(_curve, name=name))
        if any(len({y for _, y in each.points}) > 1 for each in drawn):
            charts.append(line_chart(title, words, drawn, log=log, from_zero=zero))
    shown = [chart for chart in charts if chart]
    if not shown:
        return Html()
    return tag("section", tag("h2", "Training"), tag("div", *shown, class_="charts"), id="training")


def _curve(story: RunStory, *, name: str) -> Curve:
    return story.curves.get(name, {})


def _scales(arms: Sequence[Arm]) -> list[str]:
    """Return the names of the losses of single scales, coarse to fine."""
    names = {name for arm in arms for story in arm.stories for name in story.curves}
    return sorted((name for name in names if name.startswith("loss/scale_")), reverse=True)


def _in_words(name: str) -> str:
    return f"Loss of {name.removeprefix('loss/').replace('_', ' ')}"


def _loss_of_scales(arm: Arm, scales: Sequence[str]) -> Html:
    series = []
    for number, name in enumerate(scales):
        of_scale = Arm(name.removeprefix("loss/").replace("_", " "), number, arm.stories)
        series += lines([of_scale], partial(_curve, name=name))
    return line_chart("Loss by scale", "each by itself; 0 is the finest scale", series, log=True)


def _loss_by_time(story: RunStory) -> Html:
    found: dict[str, dict[str, float]] = {}
    for name, points in story.curves.items():
        newest = [value for value in points.values() if math.isfinite(value)]
        if (match := _BIN.fullmatch(name)) and newest:
            found.setdefault(match[1], {})[match[2]] = newest[-1]
    columns = sorted({time for row in found.values() for time in row})
    rows = [
        (scale.replace("_", " "), [found[scale].get(time) for time in columns])
        for scale in sorted(found, reverse=True)
    ]
    about = "at the end, by fifths of the time from noise (0) to data (1)"
    return number_field("Loss by scale and time", about, rows, columns)


def cost_section(arms: Sequence[Arm]) -> Html:
    """Return what the time went into, and what training took."""
    stories = [story for arm in arms for story in arm.stories]
    bars = [
        share_bar(
            "Where the time went" if len(stories) == 1 else story.name,
            f"{format_duration(story.wall_s)} of wall time in {_launches(story)}",
            [(kind.replace("_", " "), story.time[kind], format_duration(story.time[kind]))
             for kind in KINDS],
        )
        for story in stories
        if story.launches
    ]  # fmt: skip
    costs = [_cost(story) for story in stories]
    names = list(dict.fromkeys(name for cost in costs for name in cost))
    rows = [[name, *(cost.get(name, "") for cost in costs)] for name in names]
    head = ["cost", *(story.name for story in stories)]
    costs_table = pairs(costs[0]) if len(stories) == 1 else table(head, rows, numbers_from=1)
    note = (
        "FLOPs are counted by formula: six for each multiply-add of the forward pass, averaged "
        "over the stages of training. MFU is their rate as a share of the dense bfloat16 peak of "
        "all devices."
    )
    words = tag("p", note, class_="note")
    body = [*bars, costs_table, words]
    return tag("section", tag("h2", "Time and cost"), *body, id="cost")


def _launches(story: RunStory) -> str:
    launches, starts = len(story.launches), sum(len(each.attempts) for each in story.launches)
    words = "1 launch" if launches == 1 else f"{launches} launches"
    return words if starts <= launches else f"{words}, {starts} starts of workers"


def _cost(story: RunStory) -> dict[str, str]:
    told = {"workers": f"{story.workers}", "images": f"{story.images:,}"}
    if (device := story.about.get("device")) is not None:
        told["device"] = device
    if story.launches:
        told["device hours"] = f"{story.device_hours:.3g}"
    if (flops := story.flops_per_image) is not None:
        told["training an image"] = _flops(flops)
        told["training in all"] = _flops(flops * story.images)
    if story.flops_per_s is not None:
        told["rate of all devices"] = f"{_flops(story.flops_per_s)}/s"
    told["MFU"] = "peak not known" if story.mfu is None else f"{story.mfu:.1%}"
    for name, title in (
        ("system/memory_device_gib", "device memory, GiB"),
        ("system/memory_host_gib", "host memory, GiB"),
        ("speed/checkpoint_size_gib", "checkpoint, GiB"),
        ("speed/checkpoint_blocked_s", "training held up by a checkpoint, s"),
    ):
        known = [each for each in story.curves.get(name, {}).values() if math.isfinite(each)]
        if known:
            told[title] = f"{max(known):.3g}"
    return told


def _flops(count: float) -> str:
    power = max(0, min(len(_PREFIXES) - 1, int(math.log10(max(count, 1.0)) // 3)))
    return f"{count / 1000**power:.3g} {_PREFIXES[power]}FLOP"


def settings_section(arms: Sequence[Arm]) -> Html:
    """Return what differs between runs, and all settings of each."""
    stories = [story for arm in arms for story in arm.stories]
    flat = [flattened(story.settings) for story in stories]
    parts = []
    if len(stories) > 1:
        names = sorted({name for each in flat for name in each})
        apart = [name for name in names if len({each.get(name) for each in flat}) > 1]
        rows = [[name, *(each.get(name, "") for each in flat)] for name in apart]
        if rows:
            head = ["setting", *(story.name for story in stories)]
            parts += [tag("h3", "What differs"), table(head, rows)]
    for story, settings in zip(stories, flat, strict=True):
        title = "All settings" if len(stories) == 1 else f"All settings of {story.name}"
        if settings:
            summary = tag("summary", f"{title} ({len(settings)})")
            parts.append(tag("details", summary, pairs(settings)))
    if not parts:
        return Html()
    return tag("section", tag("h2", "Settings"), *parts, id="settings")


def origin_section(arms: Sequence[Arm]) -> Html:
    """Return what is needed to train the runs again."""
    parts = []
    for story in (story for arm in arms for story in arm.stories):
        about: Mapping[str, str] = {
            name.removeprefix("version."): value
            for name, value in story.about.items()
            if name != "command"
        }
        told = {"run": story.uri, **about}
        if story.newest is not None:
            told["newest checkpoint"] = f"{story.newest.images:,} images, {story.newest.saved_at}"
            told["settings' fingerprint"] = story.newest.config_fingerprint
        command = story.about.get("command", "")
        if command:
            parts.append(tag("pre", tag("code", command)))
        parts.append(pairs(told))
    return tag("section", tag("h2", "To train it again"), *parts, id="origin")
