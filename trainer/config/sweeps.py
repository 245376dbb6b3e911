"""A sweep: words of which some give several values, taken apart into the runs that they stand for.

Names of runs and of the sweep follow from the words alone, so the same words mean the same runs.
"""

from __future__ import annotations

import hashlib
import os.path
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from trainer.config.composition import compose_job
from trainer.config.groups import experiment
from trainer.config.job import JobConfig
from trainer.config.overrides import MAX_POINTS, swept_words
from trainer.config.reading import ConfigError

SEED = "train.seed"
_UNNAMED = re.compile(r"[^A-Za-z0-9_.-]+")  # what no run may be called
_MAX_EXPERIMENTS = 60


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One run of a sweep.

    Attributes:
        words: The words of its launch.
        varied: What tells it from the others: keys with several values, and its own.
        job: The configuration.
    """

    words: tuple[str, ...]
    varied: Mapping[str, str]
    job: JobConfig


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Runs that are made by one command.

    Attributes:
        name: What the tracker calls it.
        points: The runs, of which no two have the same name.
    """

    name: str
    points: tuple[SweepPoint, ...]


def expand_sweep(words: Sequence[str]) -> Sweep:
    """Compose all runs that words with several values stand for, the last word varying fastest.

    A run is named after `run` or its experiment, and what tells it from the others. A `run` that
    differs from run to run, as `run='digits-${train.seed}'` does, is taken as it is.

    Args:
        words: As for one run; see `swept_words`.

    Raises:
        UnknownMember: For no experiment, or an unknown one, or an unknown member of a group.
        ConfigError: For a value that cannot be read, too many runs, or two of the same name.
    """
    choices = [swept_words(word) for word in words]
    if (count := prod(map(len, choices))) > MAX_POINTS:
        raise ConfigError(
            f"these words make {count:,} runs, and a sweep has at most {MAX_POINTS:,}; give fewer "
            "values, or make several sweeps"
        )
    swept = [_key(options[0]) for options in choices if len(options) > 1]
    given = {_key(word): word.partition("=")[2] for word in words}
    name = given.get("tracking.sweep") or _sweep_name(swept, given, choices)
    points = [
        _point(chosen, swept, given_run=given.get("run"), sweep=name)
        for chosen in product(*choices)
    ]
    _check_names(points)
    return Sweep(name=name, points=tuple(points))


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _point(
    words: Sequence[str], swept: Sequence[str], *, given_run: str | None, sweep: str
) -> SweepPoint:
    values = {_key(word): word.partition("=")[2] for word in words}
    varied = {key: values[key] for key in swept}
    told = [word for word in words if _key(word) != "tracking.sweep"] + [f"tracking.sweep={sweep}"]
    if "run" not in swept and "${" not in (given_run or ""):
        told = [word for word in told if _key(word) != "run"]
        told.append(f"run={_run_name(varied, given_run, experiment(words) or '')}")
    return SweepPoint(words=tuple(told), varied=varied, job=compose_job(told))


def _run_name(varied: Mapping[str, str], given_run: str | None, chosen: str) -> str:
    parts = [given_run] if given_run is not None else []
    if given_run is None or "exp" in varied:
        parts.append(chosen.replace("/", "-"))
    settings = [key for key in varied if key != "exp"]
    parts += [f"{short}-{varied[key]}" for key, short in _short(settings).items()]
    return "-".join(_UNNAMED.sub("_", part).strip("_.") for part in parts)


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Give each key its last part, unless that is another's too."""
    last = {key: key.rpartition(".")[2] for key in keys}
    counted = Counter(last.values())
    return {key: short if counted[short] == 1 else key for key, short in last.items()}


def _sweep_name(
    swept: Sequence[str], given: Mapping[str, str], choices: Sequence[Sequence[str]]
) -> str:
    """Name a sweep after its experiments, or their folder, and the keys that vary."""
    chosen = [
        word.partition("=")[2] for options in choices for word in options if _key(word) == "exp"
    ]
    folders = {os.path.dirname(each) for each in chosen}
    base = chosen[0] if len(chosen) == 1 else folders.pop() if len(folders) == 1 else ""
    base = base or _all_of(chosen)
    own = given.get("run", "")
    if own and "run" not in swept and "${" not in own:
        base = own
    parts = [base or "sweep", *_short([key for key in swept if key != "exp"]).values()]
    return "-".join(_UNNAMED.sub("-", part) for part in parts)


def _all_of(experiments: Sequence[str]) -> str:
    """Name experiments of no common folder so that others are not called alike."""
    names = sorted({each.replace("/", "-") for each in experiments})
    if len(joined := "-".join(names)) <= _MAX_EXPERIMENTS:
        return joined
    digest = hashlib.sha256(joined.encode()).hexdigest()[:8]
    return f"{names[0]}-and-{len(names) - 1}-more-{digest}"


def _check_names(points: Sequence[SweepPoint]) -> None:
    """Refuse two runs of the same name, of which one would continue the other.

    Raises:
        ConfigError: There are.
    """
    first: dict[str, SweepPoint] = {}
    for point in points:
        other = first.setdefault(point.job.run, point)
        if other is not point:
            one, two = (
                " ".join(f"{key}={value}" for key, value in each.varied.items())
                for each in (other, point)
            )
            if one == two:
                raise ConfigError(f"{one} is given twice, which would be one run; give it once")
            raise ConfigError(
                f"run={point.job.run} would be the name of two runs, of {one} and of {two}; name "
                "them by what differs, as in run='NAME-${train.seed}'"
            )
