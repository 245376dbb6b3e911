"""Latents in .npy files: pickles, lying headers, shapes and numbers that nobody can store."""

from __future__ import annotations

import io
import json
import pickle
from functools import partial
from typing import Any

import numpy as np

from pipelines.shards import ShardedDataset
from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.hostile.datasets import LEFT_OUT
from tests.fuzz.hostile.judging import judged
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import commanded
from tests.support.hostile_files import Payload
from trainer.cli.latents import main as latents

_WAYS = ("bytes", "header", "pickle", "objects", "numbers", "shape", "npz", "type")
_SHAPES = ((), (0,), (2, 4, 4), (2, 4, 4, 5), (2, 2, 4, 4, 4), (128,), (2, 0, 4, 4))
_SHAPE = (2, 4, 4, 4)


def arrays(attempt: Try) -> Seen:
    """Take in folders of arrays, one of which is hostile, or the table that says their classes."""
    chance = attempt.chance
    source = attempt.sandbox.inside / "source"
    good = {}
    for number in range(6):
        array = np.abs(np.random.default_rng(number).standard_normal(_SHAPE)).astype(np.float32)
        path = source / f"class{number % 2}" / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
        good[array.tobytes()] = path.name
    if chance.random() < 0.3:
        attack = _table(attempt)
    else:
        data, attack = _hostile(attempt, io.BytesIO(path.read_bytes()).getvalue())
        (source / "class0" / "hostile.npy").write_bytes(data)
    announce("hostile: arrays", attack)
    target = attempt.sandbox.inside / "out"
    words = [str(source), str(target), "--autoencoder", str(attempt.material.autoencoder)]
    words += ["--arrays", "mean-std", "--dtype", "float32", "--workers", "1"]
    words += ["--max-skipped-fraction", "1"]
    done = commanded(latents, words)
    complaint = partial(_complaint, attempt, good)
    return judged(attempt, "arrays", attack, done, complaint, told=LEFT_OUT)


def _complaint(attempt: Try, good: dict[bytes, str]) -> str | None:
    dataset = ShardedDataset(str(attempt.sandbox.inside / "out" / "train"))
    found = {dataset.read(number).data for number in range(len(dataset))}
    hostile = attempt.sandbox.inside / "source" / "class0" / "hostile.npy"
    if hostile.exists():
        for data in found - good.keys():
            try:
                array = np.load(hostile, allow_pickle=False)
            except Exception as error:
                return f"what numpy does not read ({error}) was taken in"
            if data != array.astype(np.float32).reshape(_SHAPE).tobytes():
                return "what was stored is not what numpy reads"
    lost = [name for data, name in good.items() if data not in found]
    return f"good arrays are lost: {lost}" if lost and hostile.exists() else None


def _table(attempt: Try) -> str:
    names = [f"class{number % 2}/{number}.npy" for number in range(6)]
    table = {"labels": [[name, number % 2] for number, name in enumerate(names)]}
    data, done = mutation.edited_json(json.dumps(table).encode(), attempt.chance)
    (attempt.sandbox.inside / "source" / "dataset.json").write_bytes(data)
    return f"dataset.json: {done}"


def _hostile(attempt: Try, whole: bytes) -> tuple[bytes, str]:
    chance = attempt.chance
    done = chance.choice(_WAYS)
    rng = np.random.default_rng(7)
    if done == "bytes":
        return mutation.edited_bytes(whole, chance)
    if done == "pickle":
        return pickle.dumps(Payload(str(attempt.sandbox.canary))), "a pickle"
    if done == "header":
        old, new = chance.choice(
            (
                (b"(2, 4, 4, 4)", b"(2, 4, 4, 400000000000)"),
                (b"(2, 4, 4, 4)", b"(-1, 4, 4, 4)"),
                (b"(2, 4, 4, 4)", b"(" * 200),
                (b"<f4", b"|O"),
                (b"<f4", b"<U9999999"),
                (b"<f4", b"<M8[s]"),
                (b"False", b"exit()"),
                (b"descr", b"other"),
                (b"(2, 4, 4, 4)", b"(True, 4, 4, 4)"),
                (b"(2, 4, 4, 4)", b"(True,)"),
                (b"(2, 4, 4, 4)", b"(2.0, 4, 4, 4)"),
                (b"(2, 4, 4, 4)", b"(" + b"1, " * 70 + b")"),
                (b"(2, 4, 4, 4)", b"(" + b"1, " * 70 + b"128)"),
                (b"(2, 4, 4, 4)", b"(" + b"9" * 5000 + b",)"),
            )
        )
        header = whole[10:128].rstrip().replace(old, new)
        header = header.ljust(max(117, len(header))) + b"\n"
        return whole[:8] + len(header).to_bytes(2, "little") + header + whole[
            128:
        ], f"header {new[:20]!r}"
    made: Any = np.abs(rng.standard_normal(_SHAPE)).astype(np.float32)
    file = io.BytesIO()
    if done == "objects":
        np.save(file, np.array([Payload(str(attempt.sandbox.canary))]), allow_pickle=True)
    elif done == "npz":
        np.savez(file, made)
    elif done == "numbers":
        number = chance.choice((np.nan, np.inf, -np.inf, 1e38, -1.0))
        made[tuple(chance.randrange(side) for side in _SHAPE)] = number
        np.save(file, made)
        done = f"number {number}"
    elif done == "shape":
        shape = chance.choice(_SHAPES)
        np.save(file, np.ones(shape, np.float32))
        done = f"shape {shape}"
    else:
        kind = chance.choice(("i8", "c8", "?", ">f8", "f2", "S4"))
        np.save(file, np.ones(_SHAPE).astype(kind))
        done = f"type {kind}"
    return file.getvalue(), done
