"""The manifest: canonical, self-checking, and distrustful of what it reads."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint import layout
from trainer.checkpoint.errors import InvalidManifest, NewerManifest
from trainer.checkpoint.manifest import FORMAT_VERSION, Manifest, ObjectEntry
from trainer.checkpoint.spans import Span

QUICK = settings(max_examples=60, deadline=None)
RUN, IMAGES, ATTEMPT = "run", 128, "abc123"
OBJECT = ObjectEntry(
    key=layout.object_key(RUN, IMAGES, ATTEMPT, 0),
    size_bytes=300,
    block_sha256=("0" * 64, "1" * 64, "2" * 64),
    fragments={"w": Span(2, 4), "gain": Span(0, 1)},
)
MANIFEST = Manifest(
    run=RUN,
    images=IMAGES,
    attempt=ATTEMPT,
    saved_at="2026-11-26T21:00:00+00:00",
    world_size=2,
    science_hash="beef",
    science={"flow": {"scales": 2, "critical_times": [0.5]}},
    train_state={"images": 128, "rate": 0.1},
    kinds=("ema", "master"),
    parameters={"w": (2, 3), "gain": ()},
    block_bytes=128,
    objects=(OBJECT,),
    versions={"torch": "2.13.0"},
)


def read(data: bytes) -> Manifest:
    return Manifest.from_json(data, run=RUN, images=IMAGES)


def forged(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A changed manifest whose checksum is right: the work of somebody, not of a bad disk."""
    body = json.loads(MANIFEST.to_json())
    del body["sha256"]
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(body).encode()


def test_a_manifest_survives_json() -> None:
    assert read(MANIFEST.to_json()) == MANIFEST
    assert read(forged(lambda body: None)) == MANIFEST


def test_a_manifest_survives_the_way_between_ranks() -> None:
    assert pickle.loads(pickle.dumps(MANIFEST)) == MANIFEST


def test_json_is_canonical() -> None:
    reordered = replace(MANIFEST, science=dict(reversed(list(MANIFEST.science.items()))))
    assert reordered.to_json() == MANIFEST.to_json()
    assert MANIFEST.to_json().isascii()
    assert b" " not in MANIFEST.to_json()


@QUICK
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_exactly(value: float) -> None:
    manifest = replace(MANIFEST, train_state={"value": value})
    assert read(manifest.to_json()).train_state["value"].hex() == value.hex()


@QUICK
@given(st.data())
def test_any_flipped_byte_is_noticed(data: st.DataObject) -> None:
    original = MANIFEST.to_json()
    position = data.draw(st.integers(0, len(original) - 1))
    bit = data.draw(st.integers(0, 7))
    changed = bytearray(original)
    changed[position] ^= 1 << bit
    with pytest.raises(InvalidManifest):
        read(bytes(changed))


@QUICK
@given(st.integers(0, len(MANIFEST.to_json()) - 1))
def test_any_truncation_is_noticed(length: int) -> None:
    with pytest.raises(InvalidManifest):
        read(MANIFEST.to_json()[:length])


@QUICK
@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidManifest):
        read(data)


def test_bottomless_nesting_is_refused() -> None:
    with pytest.raises(InvalidManifest):
        read(b"[" * 200_000)


def test_an_endless_number_is_refused() -> None:
    with pytest.raises(InvalidManifest):
        read(b'{"images":' + b"9" * 10_000 + b"}")


def test_a_newer_format_is_named_whatever_else_changed() -> None:
    data = json.dumps({"format_version": FORMAT_VERSION + 1, "unheard": "of"}).encode()
    with pytest.raises(NewerManifest, match=f"reads up to {FORMAT_VERSION}: use the newer"):
        read(data)


def entry(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda body: body["objects"][0].update(changes)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "climbing key": entry(key="run/checkpoints/000000000128/abc123/../../../../etc/passwd"),
    "absolute key": entry(key="/etc/passwd"),
    "key of another run": entry(key="other/checkpoints/000000000128/abc123/rank-00000.x"),
    "key of another checkpoint": entry(key="run/checkpoints/000000000064/abc123/rank-00000.x"),
    "key of another attempt": entry(key="run/checkpoints/000000000128/ffffff/rank-00000.x"),
    "key that only begins alike": entry(key="run/checkpoints/000000000128/abc123-x/rank-0.x"),
    "key of the prefix alone": entry(key="run/checkpoints/000000000128/abc123/"),
    "hidden key": entry(key="run/checkpoints/000000000128/abc123/.tmp-1"),
    "key that is no text": entry(key=["x"]),
    "object named twice": lambda body: body["objects"].append(body["objects"][0]),
    "endless size": entry(size_bytes=2**60),
    "size beyond its content": entry(size_bytes=2**30),
    "size below its content": entry(size_bytes=10),
    "negative size": entry(size_bytes=-1),
    "size that is no number": entry(size_bytes="300"),
    "size that is true": entry(size_bytes=True),
    "slice of nothing known": entry(fragments=[["unknown", 0, 1]]),
    "slice beyond the end": entry(fragments=[["w", 4, 4]]),
    "slice before the start": entry(fragments=[["w", -1, 2]]),
    "slice of one number": entry(fragments=[["w", 1]]),
    "slice that is no list": entry(fragments=["w"]),
    "slice named twice": entry(fragments=[["w", 0, 2], ["w", 2, 2]]),
    "slice of a name that is no text": entry(fragments=[[["w"], 0, 2]]),
    "slices that are no list": entry(fragments={"w": [2, 4]}),
    "too few hashes": entry(block_sha256=["0" * 64]),
    "too many hashes": entry(block_sha256=["0" * 64] * 4),
    "hash that is no text": entry(block_sha256=[0, 1, 2]),
    "values off their size": entry(size_bytes=301),
    "blocks of nothing": lambda body: body.update(block_bytes=0),
    "endless blocks": lambda body: body.update(block_bytes=2**40),
    "blocks that cut values": lambda body: body.update(block_bytes=130),
    "object with odd fields": entry(pickle="x"),
    "object that is no object": lambda body: body.update(objects=["x"]),
    "objects that are no list": lambda body: body.update(objects={}),
    "other run": lambda body: body.update(run="other"),
    "run that climbs": lambda body: body.update(run="../run"),
    "other position": lambda body: body.update(images=256, objects=[]),
    "attempt that climbs": lambda body: body.update(attempt="..", objects=[]),
    "endless parameter": lambda body: body["parameters"].update(w=[2**40, 2**40]),
    "parameter of many dimensions": lambda body: body["parameters"].update(w=[1] * 1000),
    "negative parameter": lambda body: body["parameters"].update(w=[-2, -3]),
    "shape that is no list": lambda body: body["parameters"].update(w=6),
    "no ranks": lambda body: body.update(world_size=0),
    "time that is no text": lambda body: body.update(saved_at=7),
    "format of before": lambda body: body.update(format_version=1),
    "format below the first": lambda body: body.update(format_version=0),
    "format that is no number": lambda body: body.update(format_version="1"),
    "missing field": lambda body: body.pop("science"),
    "unknown field": lambda body: body.update(note="x"),
    "science that is no dict": lambda body: body.update(science=[1]),
    "train state that is no dict": lambda body: body.update(train_state=None),
    "versions that are no text": lambda body: body.update(versions={"torch": 2}),
    "kinds that are no text": lambda body: body.update(kinds=[1, 2]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_manifests_are_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(InvalidManifest, match=r"000000000128/MANIFEST\.json cannot be") as e:
        read(forged(change))
    assert len(str(e.value)) < 600


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_json_cannot_hold_is_refused_on_writing(value: object) -> None:
    with pytest.raises(InvalidManifest, match="cannot be described in JSON"):
        replace(MANIFEST, train_state={"value": value}).to_json()
