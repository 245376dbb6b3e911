"""Weights of Inception: files of torch, in which a pickle may run code."""

from __future__ import annotations

import io
import pickle
import zipfile

import torch

from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.hostile.judging import judged
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import watched
from tests.support.hostile_files import Payload
from trainer.config.job import FeatureConfig
from trainer.evaluation.features import check_features


def weights(attempt: Try) -> Seen:
    """Have preflight look at a weights file that was made to do harm."""
    chance = attempt.chance
    payload = Payload(str(attempt.sandbox.canary))
    done = chance.choice(("payload", "old payload", "pickle", "bytes", "kinds", "zip", "sparse"))
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
    path.write_bytes(data)
    if done == "sparse":
        with path.open("r+b") as opened:
            opened.truncate(chance.choice((1 << 29, 1 << 40)))
    announce("hostile: weights", done)
    config = FeatureConfig(name="inception", inception_weights=str(path))
    seen = watched(lambda: check_features(config))
    return judged(attempt, "weights", done, seen, lambda: "they are taken for Inception's weights")


def _with_payload(data: bytes, content: bytes) -> bytes:
    """Put another pickle into an archive of torch."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return made.getvalue()
