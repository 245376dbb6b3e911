"""Autoencoders from elsewhere: settings, weights, lists of weights, and pickles beside them."""

from __future__ import annotations

import json
import pickle
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.damage.readers import digest
from tests.fuzz.hostile.judging import judged
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import watched
from tests.support.hostile_files import Payload
from trainer.autoencoder.codec import load_codec
from trainer.autoencoder.config import CodecConfig
from trainer.storage.store import StoreConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


def autoencoders(attempt: Try) -> Seen:
    """Load an autoencoder out of a folder in which somebody was at work."""
    chance = attempt.chance
    folder = Path(shutil.copytree(attempt.material.autoencoder, attempt.sandbox.inside / "vae"))
    what = chance.choice(("settings", "settings", "weights", "bytes", "index", "pickle", "link"))
    if what == "settings":
        done = _edit(folder / "config.json", attempt, mutation.edited_json)
    elif what == "weights":
        done = _edit(folder / WEIGHTS, attempt, mutation.edited_safetensors)
    elif what == "bytes":
        name = chance.choice(("config.json", WEIGHTS))
        done = f"{name} {_edit(folder / name, attempt, mutation.edited_bytes)}"
    elif what == "index":
        done = _index(attempt, folder)
    elif what == "pickle":
        done = _pickle(attempt, folder)
    else:
        name = chance.choice(("config.json", WEIGHTS))
        to = chance.choice((str(attempt.sandbox.bait), "/dev/zero", name, ".."))
        (folder / name).unlink()
        (folder / name).symlink_to(to)
        done = f"{name} to {to[-30:]}"
    attack = f"{what}: {done}"
    announce("hostile: autoencoders", attack)
    done_ = watched(partial(_decoded, folder, attempt.sandbox.inside / "cache"))
    usual = _usual(attempt.material.autoencoder, attempt.sandbox.inside / "usual")
    return judged(attempt, "autoencoders", attack, done_, lambda: _complaint(done_.value, usual))


def _complaint(value: Any, usual: Any) -> str | None:
    """What has the same digest gives the same; and what is given are numbers."""
    sha256, decoded, finite = value
    if sha256 == usual[0] and decoded != usual[1]:
        return "another autoencoder is loaded under the same digest"
    return None if finite else "what it decodes is no number, and nobody has said so"


def _decoded(folder: Path, cache: Path) -> tuple[str | None, str, bool]:
    config = CodecConfig(kind="autoencoder_kl", source=str(folder))
    codec, sha256 = load_codec(config, cache=cache, store=StoreConfig(), device=torch.device("cpu"))
    latents = torch.linspace(-2, 2, 64).reshape(1, 4, 4, 4)
    images = codec.decode(latents)
    return sha256, digest({"images": images}), bool(torch.isfinite(images).all())


@cache
def _usual(folder: Path, cache: Path) -> tuple[str | None, str, bool]:
    return _decoded(folder, cache)


def _edit(path: Path, attempt: Try, edit: Any) -> str:
    data, done = edit(path.read_bytes(), attempt.chance)
    path.write_bytes(data)
    return str(done)


def _index(attempt: Try, folder: Path) -> str:
    """A list of files, with which diffusers reads others than those that were hashed."""
    other = attempt.chance.choice(("other.safetensors", "../other.safetensors", WEIGHTS))
    if other != WEIGHTS:
        tensors = (folder / WEIGHTS).read_bytes()
        changed = bytearray(tensors)
        changed[-1000] ^= 0x40
        (folder / other).write_bytes(changed)
    table = {"metadata": {}, "weight_map": {"decoder.conv_in.weight": other}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(table))
    return other


def _pickle(attempt: Try, folder: Path) -> str:
    name = attempt.chance.choice(("diffusion_pytorch_model.bin", WEIGHTS, "config.json"))
    payload = Payload(str(attempt.sandbox.canary))
    if attempt.chance.random() < 0.5:
        torch.save({"decoder.conv_in.weight": torch.ones(3), "x": payload}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(payload))
    if name.endswith(".bin") and attempt.chance.random() < 0.5:
        (folder / WEIGHTS).unlink()
    return name
