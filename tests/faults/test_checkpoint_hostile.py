"""Files that somebody put into the store: nothing is executed, nothing eats the memory.

The hashes of most of them are right: who can write objects can write manifests too.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.hostile_files import (
    KEY,
    MEMORY,
    NEW,
    OLD,
    PASSED_OVER,
    Target,
    attacked,
    looked_at,
)
from tests.support.remote_store import RemoteStore
from tests.unit.trainer.checkpoint.worlds import RUN, SHAPES
from trainer.checkpoint import layout
from trainer.checkpoint.errors import DamagedCheckpoint
from trainer.checkpoint.manifest import MAX_MANIFEST_BYTES
from trainer.checkpoint.reader import CheckpointReader
from trainer.cli.launch import main
from trainer.evaluation.choice import open_checkpoint
from trainer.storage.errors import InvalidKey

pytestmark = pytest.mark.slow


def describe(body: dict[str, Any], name: str) -> list[Any]:
    """What a manifest says of one parameter: name, shape, slices."""
    return next(each for each in body["parameters"] if each[0] == name)


ATTACKS: dict[str, tuple[Callable[[Target], object], str]] = {
    "pickle for an object": (lambda it: it.store.put(it.content, it.pickle), PASSED_OVER),
    "pickle for an object, as long as it": (
        lambda it: it.store.put(it.content, it.pickle.ljust(len(it.store.get(it.content)), b"\0")),
        PASSED_OVER,
    ),
    # What is saved as values is read as values, whatever it is.
    "pickle for an object, hashed": (
        lambda it: it.plant(it.pickle.ljust(len(it.store.get(it.content)), b"\0")),
        f"resumed from {NEW}, changed",
    ),
    "torch file for an object": (lambda it: it.store.put(it.content, it.torch_file), PASSED_OVER),
    "torch file for an object, hashed": (
        lambda it: it.plant(it.torch_file.ljust(8192, b"\0")),
        f"resumed from {NEW}, changed",
    ),
    "pickle for the manifest": (lambda it: it.store.put(KEY, it.pickle), PASSED_OVER),
    "torch file for the manifest": (lambda it: it.store.put(KEY, it.torch_file), PASSED_OVER),
    "YAML for the manifest": (lambda it: it.store.put(KEY, it.yaml), PASSED_OVER),
    "manifest of text without end": (
        lambda it: it.store.put(KEY, b'{"run":"' + b"x" * 10**7),
        PASSED_OVER,
    ),
    "header without end, hashed": (
        lambda it: it.plant((2**60).to_bytes(8, "little") + it.store.get(it.content)[8:]),
        f"resumed from {NEW}, as it was saved",
    ),
    "no header, hashed": (
        lambda it: it.plant(it.store.get(it.content)[-16 * sum(map(math.prod, SHAPES.values())) :]),
        f"resumed from {NEW}, as it was saved",
    ),
    "NaN among the weights, hashed": (
        lambda it: it.with_value(math.nan, kind="master"),
        PASSED_OVER,
    ),
    "infinity in the average, hashed": (
        lambda it: it.with_value(math.inf, kind="ema"),
        PASSED_OVER,
    ),
    "NaN in a moment, hashed": (lambda it: it.with_value(math.nan, kind="exp_avg_sq"), PASSED_OVER),
    "another checkpoint's folder": (
        lambda it: it.copy(RUN, NEW, from_images=OLD),
        PASSED_OVER,
    ),
    "the folder of a later time": (lambda it: it.copy(RUN, NEW + 10), f"resumed from {NEW}, as"),
    "manifest of another run": (
        lambda it: it.forge(lambda body: body.update(run="other")),
        PASSED_OVER,
    ),
    "parameters of another model": (
        lambda it: it.forge(lambda body: body["parameters"].append(["more", [3], []])),
        "CheckpointMismatch: .* holds 1 parameters that the model lacks, such as more",
    ),
    "shapes of another model": (
        lambda it: it.forge(
            lambda body: describe(body, "embed.weight").__setitem__(slice(1, 2), [[7, 5]])
        ),
        "CheckpointMismatch: Parameter embed.weight has shape",
    ),
    "nothing in it": (
        lambda it: it.forge(lambda body: body.update(parameters=[], objects=[])),
        "CheckpointMismatch: The model has a parameter .* that the checkpoint",
    ),
    "no objects": (
        lambda it: it.forge(
            lambda body: body.update(
                objects=[], parameters=[[*each[:2], []] for each in body["parameters"]]
            )
        ),
        "CheckpointMismatch: .* lacks elements 0 to .*Use another checkpoint",
    ),
    "shapes without end and no objects": (
        lambda it: it.forge(
            lambda body: body.update(objects=[], parameters=[["embed.weight", [2**22, 2**22], []]])
        ),
        "CheckpointMismatch: .*embed.weight",
    ),
    "signs that clear the screen": (
        lambda it: it.forge(lambda body: body["parameters"].append(["\x1b[2J", [-1], []])),
        PASSED_OVER,
    ),
}


@pytest.fixture
def target(remote: RemoteStore, tmp_path: Path) -> Target:
    """Attacked over HTTP."""
    return attacked(remote.store, tmp_path)


@pytest.mark.parametrize(("attack", "outcome"), ATTACKS.values(), ids=ATTACKS.keys())
def test_nothing_is_executed_and_no_memory_taken(
    target: Target, tmp_path: Path, attack: Callable[[Target], object], outcome: str
) -> None:
    attack(target)
    assert re.search(outcome, looked_at(target, tmp_path))


def test_a_payload_would_be_executed_by_others(target: Target) -> None:
    """So that its absence means something."""
    pickle.loads(target.pickle)
    target.canary.rmdir()
    torch.load(io.BytesIO(target.torch_file), weights_only=False)
    assert target.canary.is_dir()


def test_another_run_that_was_copied_here(target: Target, tmp_path: Path) -> None:
    other = f"{RUN}-other"
    target.copy(other, NEW + 10)
    store = target.store
    assert CheckpointReader(store, run=other).newest_valid() is None
    # With the run's name put right, its objects are not looked for where they were.
    key = layout.manifest_key(other, NEW + 10)
    target.forge(lambda body: body.update(run=other, images=NEW + 10), key=key)
    store.delete_all([each for each in store.list(f"{other}/") if each != key])
    with pytest.raises(DamagedCheckpoint, match=f"{other}/.* is missing"):
        CheckpointReader(store, run=other).index.examine(NEW + 10)


def test_a_manifest_larger_than_memory_is_not_read(target: Target, tmp_path: Path) -> None:
    target.store.put(KEY, bytes(300 * 1024**2))
    assert MEMORY > 300 * 1024**2 > MAX_MANIFEST_BYTES
    assert PASSED_OVER in looked_at(target, tmp_path)


def test_a_manifest_that_would_grow_when_unpacked(
    remote: RemoteStore, target: Target, tmp_path: Path
) -> None:
    packed = gzip.compress(bytes(200 * 1024**2), compresslevel=1)
    remote.server.client.put_object(
        Bucket=remote.bucket, Key=f"runs/{KEY}", Body=packed, ContentEncoding="gzip"
    )
    assert PASSED_OVER in looked_at(target, tmp_path)


@pytest.mark.parametrize(
    "run", ["..", "../digits", "/etc/passwd", "a/../../b", ".hidden", "a b", "a\nb", "x" * 1000]
)
def test_a_name_that_leads_elsewhere_is_refused(
    remote: RemoteStore, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidKey):
        CheckpointReader(remote.store, run=run)
    with pytest.raises(ValueError, match=r"cannot name|neither auto, never, nor"):
        open_checkpoint(f"{remote.uri}/{run}/checkpoints/000000000010", remote.config())


def test_the_command_refuses_such_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+exp=digits", "run=../../digits", "dry_run=true"]) == 2
    assert "run" in capsys.readouterr().err
