"""An ingest that was broken off, and what it left is damaged before it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipelines.ingest.__main__ import main as ingest
from tests.fuzz.attempt import Try, announce
from tests.fuzz.damage.strikes import strike
from tests.fuzz.hostile.judging import judged
from tests.fuzz.unfinished import words
from tests.fuzz.verdict import Seen, worst
from tests.fuzz.watched import commanded


def resumed(attempt: Try) -> Seen:
    """Damage what an ingest has left, have it go on, and look at all that it has written."""
    chance = attempt.chance
    begun = attempt.material.unfinished
    out = Path(shutil.copytree(begun / "out", attempt.sandbox.inside / "out"))
    files = sorted(path for path in (out / ".train.building").iterdir() if path.is_file())
    attacks = []
    # The first shard is written again in any case: the damaged image is there.
    others = [each for each in files if each.stem != "shard.00000"]
    for path in chance.sample(chance.choice((files, others, others)), chance.choice((1, 1, 2))):
        alike = [each for each in files if each.suffix == path.suffix and each != path]
        if not path.is_file() or not all(each.is_file() for each in alike):
            continue
        attacks.append(f"{path.name}: {strike(path, chance, alike or files)}")
    attack = "; ".join(attacks)
    target = f"resumed ingest: {path.suffix[1:]}"
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


def _complaint(out: Path, undisturbed: Path) -> str | None:
    done = commanded(ingest, ["verify", str(out / "train"), "--workers", "1"], codes=(0, 1))
    if done.raw or done.value != 0:
        return f"what was written is found bad by verify: {done.said[-1500:]}"
    # With the hash of each shard, the index decides everything.
    for name in ("index.json", "ingest.json"):
        if (out / "train" / name).read_bytes() != (undisturbed / "train" / name).read_bytes():
            return f"{name} is another than that of an undisturbed ingest"
    return None
