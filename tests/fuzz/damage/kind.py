"""A try of damage: one file of a finished run, and all that reads it."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz.attempt import Try, announce
from tests.fuzz.damage.readers import READERS, Reader, at_position
from tests.fuzz.damage.right import RIGHT, Case, Struck
from tests.fuzz.damage.roles import by_role, role_of
from tests.fuzz.damage.strikes import strike
from tests.fuzz.material import INTERVAL, LAST, Material, copied_home
from tests.fuzz.verdict import Seen, Verdict, worst
from tests.fuzz.watched import Watched

_OTHERS = 0.1  # how often a reader is asked that does not read what was struck


def damage(attempt: Try) -> Seen:
    """Damage one file, or confuse two, and have everything read that may read them."""
    chance = attempt.chance
    home = copied_home(attempt.material, attempt.sandbox.inside / "home")
    files = by_role(home)
    role = chance.choice(sorted(files))
    path = chance.choice(files[role])
    before = {each: each.read_bytes() for every in files.values() for each in every}
    # What is most alike is what is confused.
    alike = files[role] if len(files[role]) > 1 else list(before)
    others = [each for each in alike if each != path]
    done = strike(path, chance, others)
    name = str(path.relative_to(home))
    target, attack = f"damage: {role}", f"{name}: {done}"
    announce(target, attack)
    changed = [each for each in before if _changed(each, before[each])]
    names, gone = (
        [str(each.relative_to(home)) for each in some]
        for some in (changed, [each for each in changed if not each.is_file()])
    )
    struck = Struck(home, names, gone)
    if not struck.names:
        return Seen(verdict=Verdict.HARMLESS, target=target, attack=attack, said="the same bytes")
    roles = {role_of(each) for each in struck.names}
    asked = [name for name, reader in READERS.items() if _is_asked(reader, roles, chance.random())]
    seen = [
        judged_reading(reader, struck, attempt.sandbox.inside, usual_results(attempt.material))
        for reader in asked
    ]
    said = "\n".join(text for _, text in seen)
    if problems := attempt.sandbox.problems(""):
        return Seen(verdict=Verdict.WRONG, target=target, attack=attack, said="\n".join(problems))
    verdict = worst(verdict for verdict, _ in seen)
    return Seen(verdict=verdict, target=target, attack=attack, said=said)


def judged_reading(
    name: str, struck: Struck, folder: Path, usual: dict[str, Any]
) -> tuple[Verdict, str]:
    """Have one reader read the damaged home, and judge what comes of it."""
    scratch = folder / f"scratch-{name.replace(' ', '-')}"
    scratch.mkdir()
    home = struck.home
    if READERS[name].tidies:
        home = scratch / "home"
        # Unlike shutil, it copies pipes and files that are mostly holes.
        subprocess.run(["cp", "-a", "--sparse=always", struck.home, home], check=True)
    done = READERS[name].read(home, scratch)
    value = plain(done.value)
    verdict = _verdict(
        name, done, Case(value, usual, struck, struck.is_named(done.said), done.said)
    )
    return verdict, f"[{name}] {verdict}: {_shown(done, value, usual[name], verdict)}"


def _verdict(name: str, done: Watched, case: Case) -> Verdict:
    if done.raw:
        return Verdict.RAW
    if done.refusal:
        return Verdict.DETECTED
    if case.value == case.usual[name]:
        return Verdict.HARMLESS
    return Verdict.DETECTED if name in RIGHT and RIGHT[name](case) else Verdict.WRONG


def _shown(done: Watched, value: Any, usual: Any, verdict: Verdict) -> str:
    if verdict is Verdict.WRONG:
        return (
            f"\n  instead of {usual}\n  there was  {value}\n  and it said: {done.err or done.out}"
        )
    return done.raw or done.refusal or done.err.strip()[-500:]


def usual_results(material: Material) -> dict[str, Any]:
    """Return what the readers give of the undamaged home, as `learn` has written it."""
    return _usual(material.folder)


@cache
def _usual(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "usual.json").read_text())
    return found


def learn(attempt: Try) -> Seen:
    """Write down what every reader gives of an undamaged home, and of its older checkpoints.

    Raises:
        RuntimeError: A reader fails although nothing is damaged.
    """
    found: dict[str, Any] = {}
    folder = attempt.sandbox.inside
    for name, reader in READERS.items():
        home = _copied(attempt, name)
        found[name] = _sound(name, reader.read(home, home.parent))
    for images in range(INTERVAL, LAST, INTERVAL):
        home = _copied(attempt, f"at {images}")
        for name, read in at_position(images).items():
            scratch = folder / f"{name} of {images}"
            scratch.mkdir()
            found[f"{name} at {images}"] = _sound(name, read(home, scratch))
    (attempt.material.folder / "usual.json").write_text(json.dumps(found))
    return Seen(verdict=Verdict.HARMLESS, target="nothing", attack="none", said="")


def _copied(attempt: Try, name: str) -> Path:
    folder = attempt.sandbox.inside / name
    return copied_home(attempt.material, folder / "home")


def _sound(name: str, done: Watched) -> Any:
    if done.raw or done.refusal:
        raise RuntimeError(f"{name} fails although nothing is damaged: {done.said}")
    return plain(done.value)


def plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    return json.loads(json.dumps(value))


def _changed(path: Path, before: bytes) -> bool:
    # A pipe must not be opened, and a sparse file not be read.
    if path.is_symlink() or not path.is_file() or path.stat().st_size != len(before):
        return True
    return path.read_bytes() != before


def _is_asked(reader: Reader, roles: set[str], chance: float) -> bool:
    if roles.isdisjoint(reader.roles):
        return chance < _OTHERS * reader.share
    return chance < (1 if "MLflow's database" in roles else reader.share)
