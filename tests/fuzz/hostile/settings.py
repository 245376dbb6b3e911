"""Settings: words of the command line, with values that nobody expects."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import yaml

from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.hostile.judging import judged
from tests.fuzz.material import SETTINGS
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import Watched, commanded
from tests.support.commands import leaves
from trainer.cli.launch import main as launch
from trainer.config.job import JobConfig

_INTERPOLATIONS = (
    "${oc.env:AWS_SECRET_ACCESS_KEY}",
    "${oc.env:HOME}",
    "${oc.decode:${oc.env:AWS_SECRET_ACCESS_KEY}}",
    "${.run}",
    "${run}",
    "${data}",
    "${oc.create:{a: 1}}",
    "${hydra:runtime.cwd}",
    "${",
    "\\${oc.env:HOME}",
)


def settings(attempt: Try) -> Seen:
    """Compose a configuration with a hostile value, and show it."""
    chance = attempt.chance
    keys = [each.key for each in leaves(JobConfig)]
    words = []
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        key = chance.choice(keys) if chance.random() < 0.9 else _odd_key(attempt, keys)
        words.append(f"{chance.choice(('', '', '', '+', '++', '~'))}{key}={_value(attempt)}")
    words = [word.replace("\x00", "") for word in words]
    announce("hostile: settings", " ".join(words)[:500])
    home = f"home={attempt.sandbox.inside / 'home'}"
    given = [*(s for s in SETTINGS if s != "data.classes=0"), home, *words]
    how = chance.choice((["--cfg", "job"], ["dry_run=true"]))
    done = commanded(launch, [*how, *given])
    return judged(attempt, "settings", " ".join(words)[:500], done, lambda: _complaint(done, words))


def _complaint(done: Watched, words: list[str]) -> str | None:
    """What is shown is YAML again, with finite numbers, and the plain values that were given."""
    shown = yaml.safe_load(done.out)
    bad = [number for number in numbers_in(shown) if not math.isfinite(number)]
    if bad:
        return f"numbers that are not finite were taken: {bad}"
    # A place is shown as an absolute one.
    located = {each.key for each in leaves(JobConfig) if each.place}
    for word in words:
        key, _, given = word.partition("=")
        if key in located:
            continue
        if not given.lstrip("-").isdigit() or not key[:1].isalpha():
            continue
        found: Any = shown
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if f"{found}" not in (given, f"{float(given)}", f"{int(given)}") and words.count(word) == 1:
            later = [each for each in words if each.partition("=")[0].lstrip("+") == key]
            if later == [word]:
                return f"{key} is {found!r} instead of {given}"
    return None


def numbers_in(value: Any) -> Iterator[float]:
    """Give all floats of plain values."""
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, float):
        yield value


def _odd_key(attempt: Try, keys: list[str]) -> str:
    chance = attempt.chance
    key = chance.choice(keys)
    return chance.choice(
        (
            key + ".more",
            key.partition(".")[0],
            "hydra.run.dir",
            "hydra/job_logging",
            "exp",
            "_target_",
            key.upper(),
            "model@data",
            mutation.text(chance).replace("=", ""),
        )
    )


def _value(attempt: Try) -> str:
    chance = attempt.chance
    made = chance.choice(
        (
            lambda: chance.choice(_INTERPOLATIONS),
            lambda: mutation.text(chance),
            lambda: json.dumps(mutation.value(chance)),
            lambda: str(chance.choice((0, 1, 2, 3, 7, 64, 10**6))),
            lambda: str(chance.choice((-1, 2**31, 2**63, 10**400, 1e400, "1e-320", "nan", "-inf"))),
            lambda: chance.choice(
                ("[1,2", "{a:1", "{a:{b:[}", "'", '"', "[", "\\", "!!python/x y")
            ),
            lambda: chance.choice(("null", "true", "auto", "yes", "0x10", "1_000", "1e3", "٣")),
            lambda: "[" * 3000 + "]" * 3000,
        )
    )()
    return str(made)
