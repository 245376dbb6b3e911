"""The manifest that makes a set of objects a checkpoint, and its distrustful reader."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from graphlib import CycleError
from typing import Any

import numpy as np

from pipelines.documents import DocumentError, canonical, parse_json, sealed, unsealed
from trainer.checkpoint import layout
from trainer.checkpoint.errors import InvalidManifest, NewerManifest
from trainer.checkpoint.slices import Cuts, Run, Span, common_order, runs_of, slices_of
from trainer.storage.errors import InvalidKey
from trainer.storage.keys import check_key


def json_object(data: bytes, *, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object of so many bytes at most.

    Raises:
        DocumentError: It is none.
    """
    return mapping(parse_json(data, max_bytes=max_bytes), "it")


def only_fields(body: Mapping[str, Any], *expected: str) -> None:
    """Demand that these fields are there, and no other."""
    if set(body) != set(expected):
        odd = ", ".join(sorted(set(expected) ^ set(body)))
        raise DocumentError(f"it lacks or has unknown fields: {odd}")


def mapping(value: object, what: str) -> dict[str, Any]:
    """Demand a JSON object."""
    if not isinstance(value, dict):
        raise DocumentError(f"{what} is not a JSON object")
    return value


def sequence(value: object, what: str, *, length: int | None = None) -> list[Any]:
    """Demand a list, of so many things."""
    if not isinstance(value, list):
        raise DocumentError(f"{what} is not a list")
    if length is not None and len(value) != length:
        raise DocumentError(f"{what} is not a list of {length}")
    return value


def text(value: object, what: str) -> str:
    """Demand a text that can be shown."""
    # Names come to stand in messages, where they shall not move a terminal's cursor.
    if not isinstance(value, str) or not value.isprintable():
        raise DocumentError(f"{what} is not text")
    return value


def whole(value: object, what: str, *, low: int, high: int) -> int:
    """Demand a whole number."""
    if type(value) is not int or not low <= value <= high:
        raise DocumentError(
            f"{what} is {reprlib.repr(value)}, not a whole number from {low} to {high}"
        )
    return value


@dataclass(frozen=True, kw_only=True)
class ObjectEntry:
    """One content object.

    Attributes:
        rank: The rank that wrote it.
        key: Where it lies in the store.
        size_bytes: Its size.
        block_sha256: Hash of each of its blocks, in hexadecimal.
    """

    rank: int
    key: str
    size_bytes: int
    block_sha256: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; its key follows from its rank."""
        return {
            "rank": self.rank,
            "size_bytes": self.size_bytes,
            "block_sha256": list(self.block_sha256),
        }

    @classmethod
    def from_json(cls, value: object, *, run: str, images: int, attempt: str) -> ObjectEntry:
        """Read the values of `to_json`, believing nothing.

        Args:
            value: The values.
            run: Name of the run.
            images: Images of the checkpoint.
            attempt: Name of the save that wrote it.

        Raises:
            DocumentError: They are not an object's.
            InvalidKey: The names are not fit for a key.
        """
        body = mapping(value, "an object")
        only_fields(body, "rank", "size_bytes", "block_sha256")
        rank = whole(body["rank"], "rank", low=0, high=layout.MAX_RANKS - 1)
        key = layout.object_key(run, images, attempt, rank)
        hashes = sequence(body["block_sha256"], "hashes")
        return cls(
            rank=rank,
            key=key,
            size_bytes=whole(body["size_bytes"], f"size of {key}", low=0, high=2**63),
            block_sha256=tuple(text(each, "a hash") for each in hashes),
        )


def upgraded(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest of format 3 would hold; the reader of that one checks the rest.

    Args:
        body: The manifest, without its checksum.

    Raises:
        DocumentError: It has not the form of one.
        InvalidKey: Its names are not fit for keys.
    """
    for name in ("run", "images", "attempt", "parameters", "objects"):
        if name not in body:
            raise DocumentError(f"it lacks {name}")
    shapes = mapping(body["parameters"], "parameters")
    prefix = layout.attempt_prefix(
        text(body["run"], "run"),
        whole(body["images"], "images", low=0, high=layout.MAX_IMAGES),
        text(body["attempt"], "attempt"),
    )
    slices: dict[str, list[tuple[int, int, int]]] = {name: [] for name in shapes}
    orders: list[list[str]] = [[name] for name in shapes]
    objects = []
    for each in sequence(body["objects"], "objects"):
        entry = mapping(each, "an object")
        only_fields(entry, "key", "size_bytes", "block_sha256", "fragments")
        rank = _rank(text(entry["key"], "key"), prefix=prefix)
        held = [_slice(fragment) for fragment in sequence(entry["fragments"], "fragments")]
        for name, start, numel in held:
            if name not in shapes:
                raise DocumentError(
                    f"rank {rank} holds {reprlib.repr(name)}, which is no parameter"
                )
            slices[name].append((start, numel, rank))
        orders.append([name for name, _, _ in held])
        objects.append(
            {"rank": rank, "size_bytes": entry["size_bytes"], "block_sha256": entry["block_sha256"]}
        )
    try:
        order = common_order(orders)
    except CycleError as error:
        raise DocumentError("its objects hold slices in different orders") from error
    return {
        **body,
        "format_version": 3,
        "parameters": [[name, shapes[name], _runs(slices[name])] for name in order],
        "objects": sorted(objects, key=lambda entry: entry["rank"]),
    }


def _rank(key: str, *, prefix: str) -> int:
    found = re.fullmatch(r"rank-([0-9]{5,9})\.safetensors", key.removeprefix(prefix))
    if found is None or not key.startswith(prefix):
        raise DocumentError(f"its object {reprlib.repr(key)} is no content of {prefix}")
    return int(found[1])


def _slice(value: object) -> tuple[str, int, int]:
    name, start, numel = sequence(value, "a slice", length=3)
    return (
        text(name, "a name"),
        whole(start, "a slice", low=0, high=2**63),
        whole(numel, "a slice", low=1, high=2**63),
    )


def _runs(slices: list[tuple[int, int, int]]) -> list[list[int]]:
    return [list(run) for run in runs_of(sorted(slices))]


FORMAT_VERSION = 3
MAX_MANIFEST_BYTES = 32 * 1024**2
MAX_ELEMENTS = 2**44
MAX_BLOCK_BYTES = 2**30
MAX_DIMENSIONS = 8
MAX_SLICES = 2**28
BYTES_PER_ELEMENT = 4  # everything is float32


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        format_version: Version of this format.
        run: Name of the run.
        images: Images the run had seen.
        attempt: Random name of the save that wrote it.
        saved_at: When that save began, by the clock of its first rank, in UTC and ISO 8601; for
            people, nothing is decided by it.
        world_size: Ranks of the run at that time.
        config_fingerprint: Hash of `science`, as the caller computes it.
        science: The configuration that determines the result, as JSON values.
        train_state: Counters of the run, as JSON values.
        kinds: What each object holds of each slice: "ema", "exp_avg", "exp_avg_sq", "master".
        parameters: Shape of every parameter of the model, in the order in which their slices lie
            in objects: at an object's end, after the header of safetensors, all slices of the first
            kind of values, then all of the second, and so on.
        cuts: The slices of each parameter that ranks wrote.
        block_bytes: Size of the blocks that objects are hashed in.
        objects: The content, one object for each rank that wrote slices.
        versions: Packages that wrote it.
    """

    format_version: int = FORMAT_VERSION
    run: str
    images: int
    attempt: str
    saved_at: str
    world_size: int
    config_fingerprint: str
    science: Mapping[str, Any]
    train_state: Mapping[str, Any]
    kinds: tuple[str, ...]
    parameters: Mapping[str, tuple[int, ...]]
    cuts: Cuts
    block_bytes: int
    objects: tuple[ObjectEntry, ...]
    versions: Mapping[str, str]

    def slices(self, entry: ObjectEntry) -> dict[str, Span]:
        """Return the slice of each parameter in an object, in the order in which they lie there."""
        return slices_of(entry.rank, self.cuts)

    def content_bytes(self, entry: ObjectEntry) -> int:
        """Return the size of the values in an object, at its end."""
        numel = sum(span.numel for span in self.slices(entry).values())
        return BYTES_PER_ELEMENT * len(self.kinds) * numel

    def to_json(self) -> bytes:
        """Return canonical JSON that carries the SHA-256 of its own body, and can be read.

        Raises:
            InvalidManifest: Something in it is not a JSON value, such as a NaN, or `from_json`
                would refuse it.
        """
        place = f"The checkpoint of {self.run} after {self.images} images"
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        del body["cuts"]
        body["science_hash"] = body.pop("config_fingerprint")  # as it is stored
        body["parameters"] = [
            [name, shape, self.cuts[name]] for name, shape in self.parameters.items()
        ]
        body["objects"] = [entry.to_json() for entry in self.objects]
        try:
            data = canonical(sealed(body))
        except (TypeError, ValueError) as error:
            raise InvalidManifest(
                f"{place} cannot be described in "
                f"JSON ({error}): keep numbers that are finite, text, lists and string-keyed "
                "dicts in the configuration and the train state."
            ) from error
        try:
            _read(data, run=self.run, images=self.images)
        except (DocumentError, InvalidKey) as error:
            raise InvalidManifest(
                f"{place} is not written, as no launch could read its manifest: {error}."
            ) from error
        return data

    @classmethod
    def from_json(cls, data: bytes, *, run: str, images: int | None = None) -> Manifest:
        """Read a manifest, believing nothing.

        Args:
            data: What `to_json` returned.
            run: The run the manifest was found under.
            images: The images it was found under; None if it does not come from there.

        Raises:
            NewerManifest: Its format came after this code.
            InvalidManifest: It is damaged, belongs elsewhere, or names keys or sizes that no save
                would have written.
        """
        place = f"The manifest {layout.manifest_key(run, images or 0)}"
        try:
            return _read(data, run=run, images=images)
        except _TooNew as error:
            raise NewerManifest(f"{place} {error}") from error
        except (DocumentError, InvalidKey) as error:
            reason = str(error).rstrip(".")
            raise InvalidManifest(
                f"{place} cannot be used: {reason}. Resume from another checkpoint."
            ) from error


class _TooNew(DocumentError):
    """The format came after this code."""


def _read(data: bytes, *, run: str, images: int | None) -> Manifest:
    body = json_object(data, max_bytes=MAX_MANIFEST_BYTES)
    version = body.get("format_version")
    if version == 1:
        raise DocumentError(
            "it has format 1, which this code no longer reads; finish its run with the version of "
            "the code that began it"
        )
    if type(version) is int and version > FORMAT_VERSION:
        raise _TooNew(
            f"has format {version}, and this code reads up to {FORMAT_VERSION}: use the newer "
            "version of the code that wrote it."
        )
    body = unsealed(body)
    manifest = _parsed(upgraded(body) if version == 2 else body)
    if manifest.run != run or images not in (None, manifest.images):
        raise DocumentError(f"it belongs to run {manifest.run!r} at {manifest.images} images")
    return manifest


def _parsed(body: Mapping[str, Any]) -> Manifest:
    here_alone = {"cuts", "config_fingerprint"}
    stored = {field.name for field in fields(Manifest)} - here_alone
    only_fields(body, *stored, "science_hash")
    whole(body["format_version"], "format_version", low=FORMAT_VERSION, high=FORMAT_VERSION)
    run = check_key(text(body["run"], "run"))
    images = whole(body["images"], "images", low=0, high=layout.MAX_IMAGES)
    attempt = text(body["attempt"], "attempt")
    world_size = whole(body["world_size"], "world_size", low=1, high=layout.MAX_RANKS)
    kinds = sequence(body["kinds"], "kinds")
    parameters, cuts = _parameters(body["parameters"], world_size=world_size)
    block_bytes = whole(body["block_bytes"], "block_bytes", low=1, high=MAX_BLOCK_BYTES)
    if block_bytes % BYTES_PER_ELEMENT:
        raise DocumentError(f"block_bytes={block_bytes} cuts values")
    objects = tuple(
        ObjectEntry.from_json(entry, run=run, images=images, attempt=attempt)
        for entry in sequence(body["objects"], "objects")
    )
    _check_objects(objects, cuts, world_size=world_size, kinds=len(kinds), block_bytes=block_bytes)
    return Manifest(
        run=run,
        images=images,
        attempt=attempt,
        saved_at=text(body["saved_at"], "saved_at"),
        world_size=world_size,
        config_fingerprint=text(body["science_hash"], "science_hash"),
        science=mapping(body["science"], "science"),
        train_state=mapping(body["train_state"], "train_state"),
        kinds=tuple(text(kind, "a kind") for kind in kinds),
        parameters=parameters,
        cuts=cuts,
        block_bytes=block_bytes,
        objects=objects,
        versions={
            name: text(version, "a version")
            for name, version in mapping(body["versions"], "versions").items()
        },
    )


def _parameters(value: object, *, world_size: int) -> tuple[dict[str, tuple[int, ...]], Cuts]:
    parameters: dict[str, tuple[int, ...]] = {}
    cuts: dict[str, tuple[Run, ...]] = {}
    for each in sequence(value, "parameters"):
        name, shape, runs = sequence(each, "a parameter", length=3)
        if text(name, "a name") in parameters:
            raise DocumentError(f"it names {name} twice")
        parameters[name] = _shape(shape, name)
        cuts[name] = tuple(
            _run(run, name, numel=math.prod(parameters[name]), world_size=world_size)
            for run in sequence(runs, f"the slices of {name}")
        )
    if sum(map(math.prod, parameters.values())) > MAX_ELEMENTS:
        raise DocumentError("its parameters are too large")
    if sum(run.parts for runs in cuts.values() for run in runs) > MAX_SLICES:
        raise DocumentError("it has too many slices")
    for name, runs in cuts.items():
        # A rank has one place for each parameter.
        ranks = [np.array(run.ranks) for run in runs]
        if len(ranks) > 1 and len(np.unique(np.concatenate(ranks))) < sum(map(len, ranks)):
            raise DocumentError(f"a rank holds {name} twice")
    return parameters, cuts


def _run(value: object, name: str, *, numel: int, world_size: int) -> Run:
    what = f"a slice of {name}"
    start, each, rank, step, parts = sequence(value, what, length=len(Run._fields))
    run = Run(
        start=whole(start, what, low=0, high=numel),
        numel=whole(each, what, low=1, high=max(numel, 1)),
        rank=whole(rank, what, low=0, high=world_size - 1),
        step=whole(step, what, low=1, high=layout.MAX_RANKS),
        parts=whole(parts, what, low=1, high=world_size),
    )
    if run.whole.stop > numel:
        raise DocumentError(f"there is more of {name} than its {numel} elements")
    if run.ranks[-1] >= world_size:
        raise DocumentError(f"{name} is held by more than {world_size} ranks")
    return run


def _check_objects(
    objects: tuple[ObjectEntry, ...], cuts: Cuts, *, world_size: int, kinds: int, block_bytes: int
) -> None:
    numel, slices = np.zeros((2, world_size), np.int64)
    for runs in cuts.values():
        for run in runs:
            held = slice(run.rank, run.ranks[-1] + 1, run.step)
            numel[held] += run.numel
            slices[held] += 1
    if [entry.rank for entry in objects] != np.flatnonzero(slices).tolist():
        raise DocumentError("its objects are not those of the ranks that hold slices")
    for entry in objects:
        content = BYTES_PER_ELEMENT * kinds * int(numel[entry.rank])
        # A safetensors header has a few hundred bytes for each slice, beside the content itself.
        most = content + 2**20 + 2**12 * kinds * int(slices[entry.rank])
        whole(entry.size_bytes, f"size of {entry.key}", low=content, high=most)
        if len(entry.block_sha256) != -(-entry.size_bytes // block_bytes):
            raise DocumentError(
                f"{entry.key} has {len(entry.block_sha256)} hashes for {entry.size_bytes} bytes"
            )
        if (entry.size_bytes - content) % BYTES_PER_ELEMENT:
            raise DocumentError(
                f"the values in {entry.key} do not begin at a multiple of their size"
            )


def _shape(value: object, name: str) -> tuple[int, ...]:
    what = f"shape of {name}"
    shape = tuple(whole(size, what, low=0, high=MAX_ELEMENTS) for size in sequence(value, what))
    if len(shape) > MAX_DIMENSIONS or math.prod(shape) > MAX_ELEMENTS:
        raise DocumentError(f"the shape of {name} is too large")
    return shape
