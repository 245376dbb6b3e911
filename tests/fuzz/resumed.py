"""An ingest that was broken off, and what it left is damaged, or joined, before it goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pipelines.ingest.__main__ import main as ingest
from tests.fuzz.attempt import Try, announce
from tests.fuzz.damage.strikes import strike
from tests.fuzz.hostile.judging import judged
from tests.fuzz.unfinished import words
from tests.fuzz.verdict import Seen, worst
from tests.fuzz.watched import commanded


def resumed(attempt: Try) -> Seen:
    """Attack what an ingest has left, have it go on, and look at all that it has written."""
    begun = attempt.material.unfinished
    out = Path(shutil.copytree(begun / "out", attempt.sandbox.inside / "out"))
    attack_it = attempt.chance.choice((_damage, _damage, _plant))
    what, attack = attack_it(out / ".train.building", attempt)
    target = f"resumed ingest: {what}"
    announce(target, attack)
    again = words(begun, out, max_skipped=1)
    # The second start has nothing to do, and must not find anything else.
    seen = [
        judged(
            attempt,
            "",
            attack,
            commanded(ingest, again),
            lambda: _complaint(out, begun / "whole"),
            told="WARNING",
        )
        for _ in range(2)
    ]
    said = "\n".join(each.said for each in seen)
    return Seen(
        verdict=worst(each.verdict for each in seen), target=target, attack=attack, said=said
    )


def _damage(work: Path, attempt: Try) -> tuple[str, str]:
    """Damage shards, records or the plan; say what, and how."""
    chance = attempt.chance
    files = sorted(path for path in work.iterdir() if path.is_file())
    attacks = []
    # The first shard is written again in any case: the damaged image is there.
    others = [each for each in files if each.stem != "shard.00000"]
    for path in chance.sample(chance.choice((files, others, others)), chance.choice((1, 1, 2))):
        alike = [each for each in files if each.suffix == path.suffix and each != path]
        if not path.is_file() or not all(each.is_file() for each in alike):
            continue
        attacks.append(f"{path.name}: {strike(path, chance, alike or files)}")
    return path.suffix[1:], "; ".join(attacks)


_OTHERS = ("shard.00099.mds", "shard.00099.record", "shard.00001.mds.bak", ".hidden", "notes")
_OWN = ("part.00001", "index.json", "ingest.json", "latents.json", f".tmp-{'0' * 32}", ".tmp-x")
_MOVED = ("shard.00001.mds", "shard.00001.record", "plan.json", "")


def _plant(work: Path, attempt: Try) -> tuple[str, str]:
    """Put something into the folder, or a link in the place of what is there."""
    chance = attempt.chance
    if chance.random() < 0.4:
        name = chance.choice(_MOVED)
        moved = (work / name).rename(attempt.sandbox.inside / "moved")
        (work / name).symlink_to(moved)
        return "planted", f"{name or work.name} is a link to itself elsewhere"
    attacks = []
    for name in chance.sample((*_OTHERS, *_OWN), chance.choice((1, 2))):
        kind = chance.choice(list(_PLANTS))
        _PLANTS[kind](work / name, attempt)
        attacks.append(f"{name} is {kind}")
    return "planted", "; ".join(attacks)


def _copy_shard(place: Path, _attempt: Try) -> None:
    shutil.copy(place.with_name("shard.00001.mds"), place)


def _make_folder(place: Path, _attempt: Try) -> None:
    (place / "inside").mkdir(parents=True)
    (place / "inside" / "file").write_bytes(b"any")


def _link_elsewhere(place: Path, attempt: Try) -> None:
    sandbox = attempt.sandbox
    place.symlink_to(attempt.chance.choice((sandbox.bait, sandbox.outside, place, "nowhere")))


_PLANTS: dict[str, Callable[[Path, Try], object]] = {
    "a shard": _copy_shard,
    "a folder": _make_folder,
    "a link": _link_elsewhere,
    "a pipe": lambda place, _: os.mkfifo(place),
    "empty": lambda place, _: place.touch(),
}


def _complaint(out: Path, undisturbed: Path) -> str | None:
    done = commanded(ingest, ["verify", str(out / "train"), "--workers", "1"], codes=(0, 1))
    if done.raw or done.value != 0:
        return f"what was written is found bad by verify: {done.said[-1500:]}"
    # With the hash of each shard, the index decides everything.
    for name in ("index.json", "ingest.json"):
        if (out / "train" / name).read_bytes() != (undisturbed / "train" / name).read_bytes():
            return f"{name} is another than that of an undisturbed ingest"
    names = [{path.name for path in (each / "train").iterdir()} for each in (out, undisturbed)]
    if names[0] != names[1]:
        return f"beside the shards lie {names[0] ^ names[1]}"
    if linked := [
        path for path in (out / "train", *(out / "train").iterdir()) if path.is_symlink()
    ]:
        return f"{linked[0].name} is a link"
    return None
