"""Weights of Inception: files of torch, in which a pickle may run code."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import torch

from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.hostile.judging import judged
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import watched
from tests.support.hostile_files import Payload
from trainer.config.job import FeatureConfig
from trainer.evaluation.extractors import check_features


def weights(attempt: Try) -> Seen:
    """Have preflight look at a weights file that was made to do harm."""
    chance = attempt.chance
    payload = Payload(str(attempt.sandbox.canary))
    done = chance.choice(
        ("payload", "old payload", "pickle", "bytes", "kinds", "zip", "sparse", "deflated", "place")
    )
    file = io.BytesIO()
    if done == "payload":
        torch.save({"fc.weight": torch.ones(3), "x": payload}, file)
    elif done == "old payload":
        torch.save({"x": payload}, file, _use_new_zipfile_serialization=False)
    elif done == "pickle":
        file.write(pickle.dumps(payload, protocol=chance.randrange(6)))
    elif done == "kinds":
        made = mutation.value(chance)
        torch.save({"fc.weight": made, 7: torch.ones(2)} if chance.random() < 0.5 else made, file)
        done = f"{made!r:.60}"
    else:
        torch.save({"fc.weight": torch.ones(3)}, file)
    data = file.getvalue()
    if done == "bytes":
        data, done = mutation.edited_bytes(data, chance)
    elif done == "zip":
        data = _with_payload(data, pickle.dumps({"x": payload}))
    path = attempt.sandbox.inside / "weights.pth"
    if done == "deflated":
        data = _deflated(chance.choice((300, 3000)))
    if done == "place":
        done = _place(path, attempt)
    else:
        path.write_bytes(data)
    if done == "sparse":
        with path.open("r+b") as opened:
            opened.truncate(chance.choice((1 << 29, 1 << 40)))
    announce("hostile: weights", done)
    config = FeatureConfig(name="inception", inception_weights=str(path))
    seen = watched(lambda: check_features(config))
    return judged(attempt, "weights", done, seen, lambda: "they are taken for Inception's weights")


def _place(path: Path, attempt: Try) -> str:
    """Put something there that is no file, or never ends."""
    done = attempt.chance.choice(("pipe", "folder", "/dev/zero", "/proc/self/mem"))
    if done == "pipe":
        os.mkfifo(path)
    elif done == "folder":
        path.mkdir()
    else:
        path.symlink_to(done)
    return done


def _deflated(megabytes: int) -> bytes:
    """An archive of torch whose one tensor is zeros, packed a thousand times smaller."""
    file, made = io.BytesIO(), io.BytesIO()
    torch.save({"fc.weight": torch.zeros(3)}, file)
    with (
        zipfile.ZipFile(file) as old,
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for name in old.namelist():
            if "/data/" not in name:
                new.writestr(name, old.read(name))
                continue
            with new.open(name, "w", force_zip64=True) as entry:
                for _ in range(megabytes):
                    entry.write(bytes(1 << 20))
    return made.getvalue()


def _with_payload(data: bytes, content: bytes) -> bytes:
    """Put another pickle into an archive of torch."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return made.getvalue()
