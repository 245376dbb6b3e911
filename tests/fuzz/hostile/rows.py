"""Rows of parquet files that name files instead of holding images, or hold something else."""

from __future__ import annotations

from typing import Any

from pipelines.ingest.__main__ import main as ingest
from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.hostile.datasets import LEFT_OUT, complaint
from tests.fuzz.hostile.judging import judged
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import commanded
from tests.unit.pipelines import pictures

_NAMES = ("ant", "bee")


def rows(attempt: Try) -> Seen:
    """Ingest a parquet file with some hostile rows."""
    import pyarrow as pa
    import pyarrow.parquet

    chance = attempt.chance
    given: dict[bytes, set[str]] = {}
    must: dict[bytes, str] = {}
    images: list[Any] = []
    labels: list[Any] = []
    attacks = []
    beside = pictures.png(8, 8, seed=99)
    (attempt.sandbox.inside / "beside.png").write_bytes(beside)
    for number in range(6):
        label = number % 2
        data = pictures.png(8, 8, seed=number)
        given[data], must[data] = {_NAMES[label]}, _NAMES[label]
        images.append({"bytes": data, "path": None})
        labels.append(_NAMES[label])
        if chance.random() < 0.4:
            row, done = _hostile(attempt, given)
            images.append(row)
            labels.append(_NAMES[0])
            attacks.append(done)
    given.setdefault(beside, set()).add(_NAMES[0])
    if chance.random() < 0.2:
        labels[0] = made = mutation.text(chance)
        attacks.append(f"label {made[:20]!r}")
        must.pop(images[0]["bytes"])
        given[images[0]["bytes"]] = {_printed(made)}
    path = attempt.sandbox.inside / "rows.parquet"
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    try:
        table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels, pa.string())})
    except (UnicodeEncodeError, pa.ArrowInvalid):  # what Arrow does not hold cannot be handed over
        table = pa.table({"image": pa.array(images[:1], kind), "label": pa.array(["ant"])})
        must = {images[0]["bytes"]: "ant"}
        given = {images[0]["bytes"]: {"ant"}}
    pyarrow.parquet.write_table(table, path)
    if chance.random() < 0.3:
        data, done = mutation.edited_bytes(path.read_bytes(), chance)
        path.write_bytes(data)
        attacks.append(done)
        # Parquet has no checksums as it is written here: what is inside may be any bytes.
        must = {}
    attack = "; ".join(attacks) or "none"
    announce("hostile: rows of parquet", attack)
    words = ["huggingface", str(path), str(attempt.sandbox.inside / "out"), "--workers", "1"]
    words += ["--max-skipped-fraction", "1"]
    target = attempt.sandbox.inside / "out"
    return judged(
        attempt,
        "rows of parquet",
        attack,
        commanded(ingest, words),
        lambda: complaint(target, given=given, must=must, left_out=None) if must else None,
        told=LEFT_OUT,
    )


def _hostile(attempt: Try, given: dict[bytes, set[str]]) -> tuple[Any, str]:
    chance = attempt.chance
    bait = str(attempt.sandbox.bait)
    path = chance.choice(
        (
            bait,
            "../outside/private.png",
            f"file://{bait}",
            f"zip://x::{bait}",
            "http://127.0.0.1:9/x.png",
            "/dev/zero",
            "beside.png",
            ".",
            "",
            "\x00",
            "x" * 5000,
        )
    )
    if chance.random() < 0.6:
        return {"bytes": None, "path": path}, f"path {path[-30:]!r}"
    what = chance.choice([*pictures.GOOD, *pictures.BAD])
    data, done = mutation.edited_bytes({**pictures.GOOD, **pictures.BAD}[what], chance)
    given.setdefault(data, set()).add(_NAMES[0])
    return {"bytes": data, "path": path}, f"{what} {done}"


def _printed(label: str) -> str:
    from pipelines.console import visible

    return visible(label)
