"""Samplers that nobody expects, typed or recorded: no end, no step, no number."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from models.flow.tableaus import SOLVERS
from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.damage.resealed import write_sealed
from tests.fuzz.damage.roles import by_role
from tests.fuzz.hostile.judging import judged
from tests.fuzz.material import copied_home, run_of
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import commanded
from trainer.cli.sample import main as sample

_BOUNDS: dict[str, tuple[float, float]] = {
    "steps": (1, 10_000),
    "absolute_tolerance": (1e-9, 1),
    "relative_tolerance": (1e-9, 1),
}
_TOLERANCES = (1e-300, 5e-324, 1e-12, 1e-10, 1e-6, 1e-3, 1, 7.5, 1e308)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "solver": (*SOLVERS, *["dopri5"] * len(SOLVERS)),
    "steps": (1, 2, 3, 40, 10_001, 10**9, 2**62, -1),
    "absolute_tolerance": _TOLERANCES,
    "relative_tolerance": _TOLERANCES,
    "adaptive_group": (1, 2, 0, 2**62),
    "guidance_scale": (1.0, 2.5, 1e38, 1e308, -1.0),
    "guidance_interval": ([0.5, 0.5], [0.2, 0.6], [0, 1e-300], [0.9999999999999999, 1], [1, 0]),
}


def samplers(attempt: Try) -> Seen:
    """Draw with a hostile sampler that was typed, or that the checkpoint's documents record."""
    chance = attempt.chance
    home = copied_home(attempt.material, attempt.sandbox.inside / "home")
    names = chance.sample(sorted(_CHOICES), chance.randrange(1, 5))
    values = {name: chance.choice(_CHOICES[name]) for name in names}
    typed = chance.random() < 0.5
    if typed and chance.random() < 0.3:
        values[names[0]] = mutation.value(chance)
    attack = f"{'typed' if typed else 'recorded'}: {values!r:.300}"
    announce("hostile: samplers", attack)
    picture = attempt.sandbox.inside / "grid.png"
    words = [f"checkpoint={run_of(home)}", f"output={picture}", "columns=2", "device=cpu"]
    if typed:
        words += [f"sampler.{name}={json.dumps(value)}" for name, value in values.items()]
    else:
        _record(home, values)
    done = commanded(sample, words)
    return judged(attempt, "samplers", attack, done, partial(_complaint, picture, values))


def _record(home: Path, values: dict[str, Any]) -> None:
    """Have the last manifest, and the report that goes before it, name the sampler."""
    files = by_role(home)
    manifest = files["manifest"][-1]
    for path, way in ((manifest, ("science", "eval")), (files["report of the run"][-1], ())):
        body = json.loads(path.read_bytes())
        del body["sha256"]
        holder = body
        for key in way or ("settings",):
            holder = holder.setdefault(key, {})
        holder.setdefault("sampler", {}).update(values)
        write_sealed(path, body)


def _complaint(picture: Path, values: dict[str, Any]) -> str | None:
    """What was taken is within its domain, and there is a picture of it."""
    with Image.open(picture) as opened:
        opened.load()
    for name, (least, most) in _BOUNDS.items():
        value = values.get(name)  # null is none
        if value is not None and not least <= value <= most:
            return f"{name}={value!r} was taken"
    return None
