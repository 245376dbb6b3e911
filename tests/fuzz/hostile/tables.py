"""Tables of labels, lists of classes and label files beside images, in which anything may stand."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipelines.console import visible
from pipelines.ingest.__main__ import main as ingest
from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.hostile.datasets import LEFT_OUT, stored
from tests.fuzz.hostile.judging import judged
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import commanded
from tests.unit.pipelines import pictures

_KINDS = ("csv", "tsv", "jsonl", "cls", "classes")


def tables(attempt: Try) -> Seen:
    """Ingest good images whose labels stand in a hostile table."""
    chance = attempt.chance
    source = attempt.sandbox.inside / "source"
    source.mkdir()
    kind = chance.choice(_KINDS)
    names = {}
    for number in range(6):
        data = pictures.png(8, 8, seed=number)
        (source / f"{number}.png").write_bytes(data)
        names[data] = f"{number}.png"
    labels = dict.fromkeys(names.values(), "ant")
    labels |= {name: mutation.text(chance) for name in labels if chance.random() < 0.3}
    words = ["image-folder", str(source), str(attempt.sandbox.inside / "out"), "--workers", "1"]
    table = attempt.sandbox.inside / f"labels.{kind}"
    done = ""
    if kind == "cls":
        for name, label in labels.items():
            data = label.encode(errors="surrogateescape")
            if chance.random() < 0.2:
                data, done = mutation.edited_bytes(data, chance)
            (source / name).with_suffix(".cls").write_bytes(data)
        words.append("--webdataset")
    elif kind == "classes":
        for folder in ("ant", "bee"):
            (source / folder).mkdir()
        for number, name in enumerate(names.values()):
            (source / name).rename(source / ("ant", "bee")[number % 2] / name)
        lines = "\n".join(("ant", "bee", *list(labels.values())[: chance.randrange(3)]))
        table.write_bytes(_maybe_edited(attempt, lines.encode(errors="surrogateescape")))
        words += ["--classes", str(table)]
    else:
        data = _table(kind, labels)
        edited = _maybe_edited(attempt, data)
        if chance.random() < 0.15:
            done = _place(table, attempt)
        else:
            table.write_bytes(edited)
            done = "edited" if edited != data else ""
        words += ["--labels", str(table)]
    attack = f"{kind} {done}"
    announce("hostile: label tables", attack)
    return judged(
        attempt,
        "label tables",
        attack,
        commanded(ingest, words),
        lambda: _complaint(attempt, kind, names),
        told=LEFT_OUT,
    )


def _place(table: Path, attempt: Try) -> str:
    """Put something in the table's place that is no file, or never ends."""
    done = attempt.chance.choice(("pipe", "/dev/zero", "sparse"))
    if done == "pipe":
        os.mkfifo(table)
    elif done == "sparse":
        with table.open("wb") as file:
            os.truncate(file.fileno(), 1 << 40)
    else:
        table.symlink_to(done)
    return done


def _table(kind: str, labels: dict[str, str]) -> bytes:
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "label": label}) for name, label in labels.items()]
    else:
        between = "," if kind == "csv" else "\t"
        lines = [f"file_name{between}label"]
        for name, label in labels.items():
            quoted = label.replace('"', '""')
            lines.append(f'{name}{between}"{quoted}"')
    return "\n".join(lines).encode(errors="surrogateescape")


def _maybe_edited(attempt: Try, data: bytes) -> bytes:
    if attempt.chance.random() < 0.5:
        return mutation.edited_bytes(data, attempt.chance)[0]
    return data


def _complaint(attempt: Try, kind: str, names: dict[bytes, str]) -> str | None:
    """Each image is there with a label that stands in the line of its name, or beside it."""
    out = attempt.sandbox.inside / "out"
    classes = json.loads((out / "train" / "ingest.json").read_text())["classes"]
    table = attempt.sandbox.inside / f"labels.{kind}"
    text = table.read_bytes().decode(errors="replace") if table.is_file() else ""
    for data, label in stored(out):
        if data not in names:
            return f"a sample of {len(data)} bytes is none that was given"
        if kind == "classes":
            continue
        name = names[data]
        if kind == "cls":
            beside = (attempt.sandbox.inside / "source" / name).with_suffix(".cls")
            text = beside.read_bytes().decode(errors="surrogateescape")
        if kind in ("cls", "jsonl") and not _stands(classes[label], text):
            return f"{name} has the label {classes[label]!r}, which stands nowhere"
    return None


def _stands(label: str, text: str) -> bool:
    """Tell whether a label stands in a text, written as JSON or as it is."""
    written = {label, json.dumps(label)[1:-1], visible(label)}
    shown = {text, visible(text), text.replace("\\n", "\n")}
    plain = visible("".join(json.loads(f'"{text}"') if _is_json(text) else text))
    return any(one in other for one in written for other in (*shown, plain)) or _in_rows(
        label, text
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(f'"{text}"')
    except ValueError:
        return False
    return True


def _in_rows(label: str, text: str) -> bool:
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and label in {visible(str(v).strip()) for v in row.values()}:
            return True
    return False
