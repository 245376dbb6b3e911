"""Documents that were changed and have a right checksum again, as who may write there can do."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.documents import INDEX_SHA256, canonical, seal
from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.damage.readers import READERS, Reader
from tests.fuzz.damage.roles import by_role
from tests.fuzz.hostile.judging import judged
from tests.fuzz.material import copied_home, run_of
from tests.fuzz.verdict import Seen, worst
from tests.fuzz.watched import Watched, commanded
from trainer.checkpoint.layout import object_key
from trainer.checkpoint.slices import Run
from trainer.cli.sample import main as sample
from trainer.metrics.tracker import Point

_ASKED = 4
"""How many readers are asked in one try."""
_HUGE = (2**20, 2**30, 10**9, 10**12, 2**44, 2**62)


def _sampled(home: Path, scratch: Path) -> Watched:
    words = [f"output={scratch / 'grid.png'}", "columns=1", "device=cpu", "sampler.steps=2"]
    return commanded(sample, [f"checkpoint={run_of(home)}", *words])


_RUN = ("manifest", "report of the run")
_READERS: Mapping[str, Reader] = {**READERS, "sample": Reader(_sampled, _RUN)}
_ROLES = (*["manifest"] * 4, *_RUN, "report of evaluate", "ingest.json", "index of shards")
_SHARES = {"launch": 0.25, "evaluate": 0.4, "evaluate anew": 0.25, "checkpoints verify": 0.3}
"""How often a reader is asked that takes longer; the others read whenever they may."""


def resealed(attempt: Try) -> Seen:
    """Change a document, make its checksum right, and have everything read that may read it.

    Any result will do: who can write there can replace all of it. But nothing may be raw, no file
    elsewhere be read, and no memory be taken that is not there.
    """
    chance = attempt.chance
    home = copied_home(attempt.material, attempt.sandbox.inside / "home")
    files = by_role(home)
    files["learned features"] = [p for p in files["learned features"] if p.suffix == ".json"]
    role = chance.choice((*_ROLES, "learned features"))
    path = chance.choice(files[role][-1:] if role == "manifest" else files[role])
    body = json.loads(path.read_bytes())
    before = _aged(body, chance) if role == "manifest" else ""
    changed, done = _changed(body, attempt)
    write_sealed(path, changed)
    target, attack = f"resealed: {role}", f"{path.relative_to(home)}: {before}{done}"
    announce(target, attack)
    mine = [name for name, reader in _READERS.items() if role in reader.roles]
    asked = {name for name in mine if chance.random() < _SHARES.get(name, 1.0)}
    seen = {}
    for name in chance.sample(sorted(asked), min(_ASKED, len(asked))):
        reader = _READERS[name]
        scratch = attempt.sandbox.inside / f"scratch-{name.replace(' ', '-')}"
        scratch.mkdir()
        there = Path(shutil.copytree(home, scratch / "home")) if reader.tidies else home
        seen[name] = judged(attempt, role, attack, reader.read(there, scratch))
    said = "\n".join(f"[{name}] {each.verdict}: {each.said}" for name, each in seen.items())
    verdict = worst(each.verdict for each in seen.values())
    return Seen(verdict=verdict, target=target, attack=attack, said=said)


def _aged(body: dict[str, Any], chance: random.Random) -> str:
    """Make a manifest one of an older format, or of a run whose tracker was away."""
    done = ""
    if chance.random() < 0.5:
        points = [Point(16 * number, {"loss/total": 1 / (1 + number)}) for number in range(3)]
        body["train_state"]["unsent_points"] = [point.to_json() for point in points]
        done += "with unsent points, "
    if chance.random() < 0.35:
        version = chance.choice((2, 2, 2, 2, 1))
        body.update(_former(body), format_version=version)
        done += f"in format {version}, "
    return done


def _former(body: dict[str, Any]) -> dict[str, Any]:
    """Say of a manifest's content what format 2 said."""
    names = [(name, [Run(*run) for run in runs]) for name, _, runs in body["parameters"]]
    objects = []
    for entry in body["objects"]:
        rank = entry.pop("rank")
        held = [(name, run.slice_of(rank)) for name, runs in names for run in runs]
        key = object_key(body["run"], body["images"], body["attempt"], rank)
        fragments = [[name, span.start, span.numel] for name, span in held if span is not None]
        objects.append({**entry, "key": key, "fragments": fragments})
    shapes = {name: shape for name, shape, _ in body["parameters"]}
    return {"objects": objects, "parameters": shapes}


def write_sealed(path: Path, body: dict[str, Any]) -> None:
    """Write a document with a checksum that is right, in its own or beside it."""
    if path.name == "index.json":  # has no sum of its own; what lies beside it tells one
        data = json.dumps(body, sort_keys=True).encode()
        path.write_bytes(data)
        beside = path.with_name("ingest.json")
        about = json.loads(beside.read_bytes())
        del about["sha256"]
        about[INDEX_SHA256] = hashlib.sha256(data).hexdigest()
        beside.write_text(json.dumps(seal(about), indent=1))
    elif path.name == "MANIFEST.json":
        path.write_bytes(canonical(seal(body)))
    else:
        path.write_text(json.dumps(seal(body), indent=1))


def _changed(body: dict[str, Any], attempt: Try) -> tuple[dict[str, Any], str]:
    """Change one or two places, so that it can be sealed again."""
    body.pop("sha256", None)
    while True:
        changed = copy.deepcopy(body)
        number = attempt.chance.choice((1, 1, 2))
        done = "; ".join(_edit(changed, attempt) for _ in range(number))
        try:
            seal(changed)
        except (TypeError, ValueError):  # such a document cannot be
            continue
        return changed, done


def _edit(body: dict[str, Any], attempt: Try) -> str:
    chance = attempt.chance
    way, parent = _place(body, chance)
    if parent is None:
        return "nothing"
    last, old = way[-1], parent[way[-1]]
    done = chance.choice(
        ("value", "value", "remove", "rename", "number", "number", "place", "kind")
    )
    name = ".".join(map(str, way))[:80]
    if done == "remove":
        del parent[last]
        return f"without {name}"
    if done == "rename" and isinstance(parent, dict):
        parent[new := mutation.text(chance)] = parent.pop(last)
        return f"{name} renamed {new!r:.40}"
    if done == "number":
        made = _number(old, chance)
    elif done == "place" and not isinstance(old, dict | list):
        made = _elsewhere(attempt)
    elif done == "kind":
        made = chance.choice((None, [], {}, "x", [old], {"x": old}, str(old)[:50], True))
    else:
        made = mutation.value(chance)
    parent[last] = made
    return f"{name} = {made!r:.60}"


def _place(body: Any, chance: random.Random) -> tuple[list[Any], Any]:
    """Walk down by chance, so that a part with many values is no likelier than one with few."""
    way: list[Any] = []
    parent, here = None, body
    while isinstance(here, dict | list) and here:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not way and "science" in here:  # the part that nobody looks into before it is used
            keys += ["science"] * 24 + ["train_state"] * 12
        way.append(chance.choice(keys))
        parent, here = here, here[way[-1]]
        if len(way) > 1 and chance.random() < 0.2:
            break
    return way, parent


def _number(old: Any, chance: random.Random) -> Any:
    if isinstance(old, str):
        return chance.choice(
            ("9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "-0x1p9999")
        )
    return chance.choice((*_HUGE, -1, 0, 1, 2, 0.5, 1e308, 5e-324, True))


def _elsewhere(attempt: Try) -> str:
    outside = attempt.sandbox.outside
    return attempt.chance.choice(
        (
            str(attempt.sandbox.bait),
            str(outside / "private.txt"),
            str(outside),
            f"file://{attempt.sandbox.bait}",
            "../../outside/private.txt",
            f"{'../' * 9}{str(attempt.sandbox.bait)[1:]}",
            "/dev/zero",
            "http://127.0.0.1:9/x",
            "${oc.env:AWS_SECRET_ACCESS_KEY}",
        )
    )
