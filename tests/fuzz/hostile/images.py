"""Images: damaged, lying, of rare kinds, with names that bite."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from pipelines.console import visible
from pipelines.ingest.__main__ import main as ingest
from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.hostile.datasets import LEFT_OUT, complaint
from tests.fuzz.hostile.judging import judged
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import commanded
from tests.unit.pipelines import pictures

_SUFFIXES = (b".png", b".jpg", b".jpeg", b".JPG", b".gif", b".webp", b".txt", b".png.jpg", b"")
_PLACES = ("image", "link", "pipe", "folder", "sparse", "image", "image", "image")


def images(attempt: Try) -> Seen:
    """Ingest a folder of good images with some hostile ones among them."""
    chance = attempt.chance
    source = attempt.sandbox.inside / "source"
    given: dict[bytes, set[str]] = {}
    must: dict[bytes, str] = {}
    names = [b"ant", mutation.name(chance) if chance.random() < 0.4 else b"bee"]
    for number, folder in enumerate(names):
        place = Path(os.fsdecode(os.fsencode(source) + b"/" + folder))
        place.mkdir(parents=True, exist_ok=True)
        for each in range(2):
            data = pictures.png(8, 8, seed=10 * number + each)
            (place / f"good{each}.png").write_bytes(data)
            given[data], must[data] = {_class_of(folder)}, _class_of(folder)
    attacks = []
    files = len(must)
    for _ in range(chance.randrange(1, 4)):
        folder = chance.choice(names)
        attacks.append(_plant(attempt, source, folder, given))
        files += 1
    attack = "; ".join(attacks)
    announce("hostile: images", attack)
    words = ["image-folder", str(source), str(attempt.sandbox.inside / "out"), "--workers", "1"]
    words += ["--max-skipped-fraction", "1"]
    if chance.random() < 0.3:
        words += ["--follow-links"] if "link" not in attack else []
    target = attempt.sandbox.inside / "out"
    return judged(
        attempt,
        "images",
        attack,
        commanded(ingest, words),
        lambda: complaint(target, given=given, must=must, left_out=None),
        told=LEFT_OUT,
    )


def _plant(attempt: Try, source: Path, folder: bytes, given: dict[bytes, set[str]]) -> str:
    chance = attempt.chance
    kind = chance.choice(_PLACES)
    stem = mutation.name(chance) if chance.random() < 0.4 else b"%d" % chance.randrange(10**6)
    suffix = chance.choice(_SUFFIXES if chance.random() < 0.4 else (b".png", b".jpg"))
    path = os.fsencode(source) + b"/" + folder + b"/" + stem.replace(b"/", b"") + suffix
    if os.path.lexists(path):
        return "nothing"
    if kind == "link":
        os.symlink(chance.choice((str(attempt.sandbox.bait), "/dev/zero", "loop", "..")), path)
        return f"link {path[-40:]!r}"
    if kind == "pipe":
        os.mkfifo(path)
        return f"pipe {path[-40:]!r}"
    if kind == "folder":
        os.mkdir(path)
        return f"folder {path[-40:]!r}"
    if kind == "sparse":
        with open(path, "wb") as file:
            file.write(pictures.png(8, 8))
            os.truncate(file.fileno(), chance.choice((1 << 29, 1 << 40)))
        return f"sparse {path[-40:]!r}"
    what = chance.choice([*pictures.GOOD, *pictures.BAD])
    data = {**pictures.GOOD, **pictures.BAD}[what]
    done = ""
    if chance.random() < 0.25:
        what, data = _long_jpeg(attempt)
    elif chance.random() < 0.6:
        data, done = mutation.edited_bytes(data, chance)
    with open(path, "wb") as file:
        file.write(data)
    given.setdefault(data, set()).add(_class_of(folder))
    return f"{what} {done} as {path[-40:]!r}"


def _long_jpeg(attempt: Try) -> tuple[str, bytes]:
    """A JPEG of markers or scans without end, where what reads them twice would not come back."""
    chance = attempt.chance
    if chance.random() < 0.3:
        return _many_scans(attempt)
    good = pictures.jpeg(8, 8)
    runs = {
        "fill bytes": b"\xff" * chance.choice((40_000, 400_000)),
        "markers without content": b"\xff\xd0" * 200_000,
        "empty comments": b"\xff\xfe\x00\x02" * 100_000,
        "tables": b"\xff\xdb\x00\x02" * 100_000,
        "Exif": b"\xff\xe1\x00\x08Exif\x00\x00" * 50_000,
        "no markers": b"\x00\xff" * 200_000,
        "frames": b"\xff\xc0\x00\x0b\x08\x00\x08\x00\x08\x01\x01\x11\x00" * 20_000,
        "segments of 64 KiB": (b"\xff\xe2\xff\xff" + bytes(65533)) * 40,
    }
    what = chance.choice(list(runs))
    run = runs[what]
    where = chance.choice(("alone", "first", "among", "last"))
    place = {"first": 2, "among": good.index(b"\xff\xda"), "last": len(good) - 2}.get(where, 2)
    whole = good[:2] + run if where == "alone" else good[:place] + run + good[place:]
    return f"jpeg with {len(run)} bytes of {what}, {where}", whole


def _many_scans(attempt: Try) -> tuple[str, bytes]:
    """A progressive JPEG with one of its scans repeated, each of which costs all of its pixels."""
    chance = attempt.chance
    side = chance.choice((8, 1000, 3000))
    good = pictures.encode(Image.new("RGB", (side, side), (200, 30, 60)), "JPEG", progressive=True)
    scan = good[good.rindex(b"\xff\xda") : -2]
    # A decoder of restarts passes over a marker of none, and not over what would be its content.
    around, done = chance.choice(
        (
            (b"%b", "plain"),
            (b"\xff\xff%b", "behind fill bytes"),
            (b"\xff\xfe\x00\x04\xff\xd9%b", "behind comments"),
            (b"\xff\xdd\x00\x04\x00\x01%b\xff\x02\xff\xff", "hidden among restarts"),
        )
    )
    times = chance.choice((50, 5_000, 50_000))
    whole = good[:-2] + around % scan * times + good[-2:]
    return f"jpeg of {side} x {side} pixels and {times} more scans, {done}", whole


def _class_of(folder: bytes) -> str:
    return visible(os.fsdecode(folder))
