"""The manifest: canonical, self-checking, and distrustful of what it reads."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint import layout
from trainer.checkpoint.errors import InvalidManifest, NewerManifest
from trainer.checkpoint.manifest import FORMAT_VERSION, MAX_MANIFEST_BYTES, Manifest, ObjectEntry
from trainer.checkpoint.slices import Run

QUICK = settings(max_examples=60, deadline=None)
RUN, IMAGES, ATTEMPT = "run", 128, "abc123"
OBJECT = ObjectEntry(
    rank=0,
    key=layout.object_key(RUN, IMAGES, ATTEMPT, 0),
    size_bytes=300,
    block_sha256=("0" * 64, "1" * 64, "2" * 64),
)
MANIFEST = Manifest(
    run=RUN,
    images=IMAGES,
    attempt=ATTEMPT,
    saved_at="2026-11-26T21:00:00+00:00",
    world_size=2,
    config_fingerprint="beef",
    science={"flow": {"scales": 2, "critical_times": [0.5]}},
    train_state={"images": 128, "rate": 0.1},
    kinds=("ema", "master"),
    parameters={"w": (2, 3), "gain": ()},
    cuts={"w": (Run(2, 4, 0),), "gain": (Run(0, 1, 0),)},
    block_bytes=128,
    objects=(OBJECT,),
    versions={"torch": "2.13.0"},
)


def read(data: bytes) -> Manifest:
    return Manifest.from_json(data, run=RUN, images=IMAGES)


def forged(change: Callable[[dict[str, Any]], object], of: bytes | None = None) -> bytes:
    """A changed manifest whose checksum is right: the work of somebody, not of a bad disk."""
    body = json.loads(of or MANIFEST.to_json())
    body.pop("sha256", None)
    change(body)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(body).encode()


def test_a_manifest_survives_json() -> None:
    assert read(MANIFEST.to_json()) == MANIFEST
    assert read(forged(lambda body: None)) == MANIFEST


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


def weight(*runs: object, name: object = "w", shape: object = (2, 3)) -> Callable[..., object]:
    """Puts another description in the place of the first parameter's."""
    return lambda body: body["parameters"].__setitem__(0, [name, shape, runs])


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "rank that is no number": entry(rank="0"),
    "rank below the first": entry(rank=-1),
    "rank beyond the last": entry(rank=2),
    "rank without slices": entry(rank=1),
    "rank whose object is missing": lambda body: body.update(objects=[]),
    "object named twice": lambda body: body["objects"].append(body["objects"][0]),
    "endless size": entry(size_bytes=2**60),
    "size beyond its content": entry(size_bytes=2**30),
    "size below its content": entry(size_bytes=10),
    "negative size": entry(size_bytes=-1),
    "size that is no number": entry(size_bytes="300"),
    "size that is true": entry(size_bytes=True),
    "slice beyond the end": weight([4, 4, 0, 1, 1]),
    "slice before the start": weight([-1, 4, 0, 1, 1]),
    "slice of nothing": weight([2, 0, 0, 1, 1]),
    "slice of one number": weight([1]),
    "slice that is no list": weight("w"),
    "slices beyond the end": weight([0, 4, 0, 1, 2]),
    "slices of endless ranks": weight([0, 1, 0, 1, 2**60]),
    "slices of ranks that do not exist": weight([0, 3, 1, 1, 2]),
    "slices of ranks far away": weight([0, 3, 0, 2**60, 2]),
    "slices of no rank": weight([2, 4, 0, 1, 0]),
    "slices of one rank": weight([2, 2, 0, 0, 2]),
    "slices of a rank twice": weight([2, 2, 0, 1, 1], [4, 2, 0, 1, 1]),
    "slices that are no list": lambda body: body["parameters"][0].__setitem__(2, {"w": [2, 4]}),
    "parameter named twice": weight([2, 4, 0, 1, 1], name="gain"),
    "name that is no text": weight([2, 4, 0, 1, 1], name=["w"]),
    "parameters that are no list": lambda body: body.update(parameters={"w": [2, 3]}),
    "parameter of two things": lambda body: body["parameters"][0].pop(),
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
    "other position": lambda body: body.update(images=256),
    "attempt that climbs": lambda body: body.update(attempt=".."),
    "endless parameter": weight(shape=[2**40, 2**40]),
    "endless parameters": lambda body: body["parameters"].extend(
        [[f"p{n}", [2**43], []] for n in range(3)]
    ),
    "parameter of many dimensions": weight(shape=[1] * 1000),
    "negative parameter": weight(shape=[-2, -3]),
    "shape that is no list": weight(shape=6),
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


def test_ranks_that_are_named_again_and_again_take_no_memory() -> None:
    ranks = 10**5
    cuts = [[number * ranks, 1, 0, 1, ranks] for number in range(300)]
    data = forged(lambda body: body.update(world_size=ranks, parameters=[["w", [2**40], cuts]]))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidManifest, match="a rank holds w twice"):
            read(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 * len(data) + ranks * 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_json_cannot_hold_is_refused_on_writing(value: object) -> None:
    with pytest.raises(InvalidManifest, match="cannot be described in JSON"):
        replace(MANIFEST, train_state={"value": value}).to_json()


@pytest.mark.parametrize("change", [{"run": "r" * 1000}, {"world_size": 10**6}, {"kinds": ("\n",)}])
def test_what_could_not_be_read_is_not_written(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidManifest, match="not written, as no launch could read"):
        replace(MANIFEST, **change).to_json()


@pytest.mark.slow
def test_the_largest_manifest_is_written_and_read_and_one_byte_more_is_neither() -> None:
    def with_note(length: int) -> Manifest:
        return replace(MANIFEST, science={"note": "x" * length})

    room = MAX_MANIFEST_BYTES - len(with_note(0).to_json())
    assert len(with_note(room).to_json()) == MAX_MANIFEST_BYTES
    with pytest.raises(InvalidManifest, match=f"has {MAX_MANIFEST_BYTES + 1} bytes"):
        with_note(room + 1).to_json()


FORMER = {
    **{key: value for key, value in json.loads(MANIFEST.to_json()).items() if key != "sha256"},
    "format_version": 2,
    "parameters": {"gain": [], "w": [2, 3], "empty": [0]},
    "objects": [
        {
            "key": layout.object_key(RUN, IMAGES, ATTEMPT, rank),
            "size_bytes": 300,
            "block_sha256": ["0" * 64, "1" * 64, "2" * 64],
            "fragments": fragments,
        }
        for rank, fragments in enumerate([[["w", 0, 3], ["gain", 0, 1]], [["w", 3, 3]]])
    ],
}


def test_the_format_of_before_is_read() -> None:
    manifest = read(forged(lambda body: None, of=json.dumps(FORMER).encode()))
    assert dict(manifest.parameters) == {"w": (2, 3), "gain": (), "empty": (0,)}
    assert manifest.cuts == {"w": (Run(0, 3, 0, 1, 2),), "gain": (Run(0, 1, 0),), "empty": ()}
    first, second = manifest.objects
    assert list(manifest.slices(first)) == ["w", "gain"]  # as they lie in the object
    assert (first.key, second.rank) == (layout.object_key(RUN, IMAGES, ATTEMPT, 0), 1)


HOSTILE_FORMER: dict[str, Callable[[dict[str, Any]], object]] = {
    "climbing key": entry(key="run/checkpoints/000000000128/abc123/../../../../etc/passwd"),
    "absolute key": entry(key="/etc/passwd"),
    "key of another run": entry(key="other/checkpoints/000000000128/abc123/rank-00000.safetensors"),
    "key of another checkpoint": entry(
        key="run/checkpoints/000000000064/abc123/rank-00000.safetensors"
    ),
    "key of another attempt": entry(
        key="run/checkpoints/000000000128/ffffff/rank-00000.safetensors"
    ),
    "key of the prefix alone": entry(key="run/checkpoints/000000000128/abc123/"),
    "key that is no text": entry(key=["x"]),
    "object named twice": lambda body: body["objects"].append(body["objects"][0]),
    "slice of nothing known": entry(fragments=[["unknown", 0, 1]]),
    "slice beyond the end": entry(fragments=[["w", 4, 4]]),
    "slice before the start": entry(fragments=[["w", -1, 2]]),
    "slice of one number": entry(fragments=[["w", 1]]),
    "slice named twice": entry(fragments=[["w", 0, 2], ["w", 2, 2]]),
    "slices in other orders": lambda body: body["objects"][1].update(
        fragments=[["gain", 0, 1], ["w", 3, 3]]
    ),
    "slices that are no list": entry(fragments={"w": [2, 4]}),
    "parameters that are a list": lambda body: body.update(parameters=[]),
    "run that is no text": lambda body: body.update(run=7),
    "missing field": lambda body: body.pop("parameters"),
    "unknown field": lambda body: body.update(note="x"),
}


@pytest.mark.parametrize("change", HOSTILE_FORMER.values(), ids=HOSTILE_FORMER.keys())
def test_hostile_manifests_of_the_format_of_before_are_refused(
    change: Callable[[dict[str, Any]], object],
) -> None:
    with pytest.raises(InvalidManifest, match=r"000000000128/MANIFEST\.json cannot be") as e:
        read(forged(change, of=json.dumps(FORMER).encode()))
    assert len(str(e.value)) < 600
