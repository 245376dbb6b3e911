"""The manifest that makes a set of objects a checkpoint, and its distrustful reader."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from graphlib import CycleError
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field

from pipelines.documents import DocumentError, canonical, parse_json, seal, unseal, validate_as
from trainer.checkpoint import layout
from trainer.checkpoint.errors import InvalidManifest, NewerManifest
from trainer.checkpoint.slices import Cuts, Run, Span, common_order, runs_of, slices_of
from trainer.storage.errors import InvalidKey
from trainer.storage.store import check_key

FORMAT_VERSION = 3
MAX_MANIFEST_BYTES = 32 * 1024**2
MAX_ELEMENTS = 2**44
MAX_BLOCK_BYTES = 2**30
MAX_DIMENSIONS = 8
MAX_SLICES = 2**28
BYTES_PER_ELEMENT = 4  # everything is float32


def _check_printable(text: str) -> str:
    # Names come to stand in messages, where they shall not move a terminal's cursor.
    if not text.isprintable():
        raise ValueError("it has characters that cannot be shown")
    return text


_Text = Annotated[str, AfterValidator(_check_printable)]
_Natural = Annotated[int, Field(ge=0, lt=2**63)]
_Positive = Annotated[int, Field(ge=1, lt=2**63)]
_Images = Annotated[int, Field(ge=0, le=layout.MAX_IMAGES)]
_Rank = Annotated[int, Field(ge=0, lt=layout.MAX_RANKS)]
_Ranks = Annotated[int, Field(ge=1, le=layout.MAX_RANKS)]
_Size = Annotated[int, Field(ge=0, le=MAX_ELEMENTS)]
_Shape = Annotated[tuple[_Size, ...], Field(max_length=MAX_DIMENSIONS)]
_Run = tuple[_Natural, _Positive, _Rank, _Ranks, _Ranks]

_NO_OTHER_FIELDS = ConfigDict(extra="forbid")
_OPAQUE = ("science", "train_state")


@dataclass(frozen=True, kw_only=True)
class _StoredObject:
    """A content object as it is stored."""

    __pydantic_config__ = _NO_OTHER_FIELDS
    rank: _Rank
    size_bytes: _Natural
    block_sha256: tuple[_Text, ...]


@dataclass(frozen=True, kw_only=True)
class _StoredManifest:
    """A manifest as it is stored, without what nobody looks into here."""

    __pydantic_config__ = _NO_OTHER_FIELDS
    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    run: _Text
    images: _Images
    attempt: _Text
    saved_at: _Text
    world_size: _Ranks
    science_hash: _Text
    kinds: tuple[_Text, ...]
    parameters: tuple[tuple[_Text, _Shape, tuple[_Run, ...]], ...]
    block_bytes: Annotated[int, Field(ge=1, le=MAX_BLOCK_BYTES, multiple_of=BYTES_PER_ELEMENT)]
    objects: tuple[_StoredObject, ...]
    versions: dict[str, _Text]


@dataclass(frozen=True, kw_only=True)
class _FormerObject:
    """A content object of format 2."""

    __pydantic_config__ = _NO_OTHER_FIELDS
    key: _Text
    size_bytes: _Natural
    block_sha256: tuple[_Text, ...]
    fragments: tuple[tuple[_Text, _Natural, _Positive], ...]


@dataclass(frozen=True, kw_only=True)
class _FormerManifest:
    """What format 2 stored in another form than format 3 does, and what keys are made of."""

    run: _Text
    images: _Images
    attempt: _Text
    parameters: dict[str, Any]
    objects: tuple[_FormerObject, ...]


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
        return cls._of(validate_as(_StoredObject, value), run=run, images=images, attempt=attempt)

    @classmethod
    def _of(cls, stored: _StoredObject, *, run: str, images: int, attempt: str) -> ObjectEntry:
        return cls(
            rank=stored.rank,
            key=layout.object_key(run, images, attempt, stored.rank),
            size_bytes=stored.size_bytes,
            block_sha256=stored.block_sha256,
        )


def upgrade(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest of format 3 would hold; the reader of that one checks the rest.

    Args:
        body: The manifest, without its checksum.

    Raises:
        DocumentError: It has not the form of one.
        InvalidKey: Its names are not fit for keys.
    """
    former = validate_as(
        _FormerManifest, {name: body[name] for name in body if name not in _OPAQUE}
    )
    prefix = layout.attempt_prefix(former.run, former.images, former.attempt)
    shapes = former.parameters
    slices: dict[str, list[tuple[int, int, int]]] = {name: [] for name in shapes}
    orders: list[list[str]] = [[name] for name in shapes]
    objects = []
    for entry in former.objects:
        rank = _rank(entry.key, prefix=prefix)
        for name, start, numel in entry.fragments:
            if name not in shapes:
                raise DocumentError(
                    f"rank {rank} holds {reprlib.repr(name)}, which is no parameter"
                )
            slices[name].append((start, numel, rank))
        orders.append([name for name, _, _ in entry.fragments])
        objects.append(
            {"rank": rank, "size_bytes": entry.size_bytes, "block_sha256": entry.block_sha256}
        )
    try:
        order = common_order(orders)
    except CycleError as error:
        raise DocumentError("its objects hold slices in different orders") from error
    return {
        **body,
        "format_version": FORMAT_VERSION,
        "parameters": [[name, shapes[name], runs_of(sorted(slices[name]))] for name in order],
        "objects": sorted(objects, key=lambda entry: entry["rank"]),
    }


def _rank(key: str, *, prefix: str) -> int:
    found = re.fullmatch(r"rank-([0-9]{5,9})\.safetensors", key.removeprefix(prefix))
    if found is None or not key.startswith(prefix):
        raise DocumentError(f"its object {reprlib.repr(key)} is no content of {prefix}")
    return int(found[1])


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
        config_fingerprint: Hash of the science with which the training began, as the version that
            began it computes it.
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
            data = canonical(seal(body))
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
    body = parse_json(data, max_bytes=MAX_MANIFEST_BYTES)
    if not isinstance(body, dict):
        raise DocumentError("it is not a JSON object")
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
    body = unseal(body)
    manifest = _parse(upgrade(body) if version == 2 else body)
    if manifest.run != run or images not in (None, manifest.images):
        raise DocumentError(f"it belongs to run {manifest.run!r} at {manifest.images} images")
    return manifest


def _parse(body: Mapping[str, Any]) -> Manifest:
    # Any JSON value will do in these, so they do not go through the checks of the others.
    science, train_state = (body.get(name) for name in _OPAQUE)
    if not isinstance(science, dict) or not isinstance(train_state, dict):
        raise DocumentError("its science or its train_state is not a JSON object")
    stored = validate_as(
        _StoredManifest, {name: body[name] for name in body if name not in _OPAQUE}
    )
    run = check_key(stored.run)
    parameters, cuts = _parameters(stored)
    objects = tuple(
        ObjectEntry._of(entry, run=run, images=stored.images, attempt=stored.attempt)
        for entry in stored.objects
    )
    _check_objects(objects, cuts, stored)
    return Manifest(
        run=run,
        images=stored.images,
        attempt=stored.attempt,
        saved_at=stored.saved_at,
        world_size=stored.world_size,
        config_fingerprint=stored.science_hash,
        science=science,
        train_state=train_state,
        kinds=stored.kinds,
        parameters=parameters,
        cuts=cuts,
        block_bytes=stored.block_bytes,
        objects=objects,
        versions=stored.versions,
    )


def _parameters(stored: _StoredManifest) -> tuple[dict[str, tuple[int, ...]], Cuts]:
    parameters: dict[str, tuple[int, ...]] = {}
    cuts: dict[str, tuple[Run, ...]] = {}
    for name, shape, runs in stored.parameters:
        if name in parameters:
            raise DocumentError(f"it names {name} twice")
        if math.prod(shape) > MAX_ELEMENTS:
            raise DocumentError(f"the shape of {name} is too large")
        parameters[name], cuts[name] = shape, tuple(Run(*run) for run in runs)
        for run in cuts[name]:
            if run.whole.stop > math.prod(shape):
                raise DocumentError(f"there is more of {name} than its {math.prod(shape)} elements")
            if run.ranks[-1] >= stored.world_size:
                raise DocumentError(f"{name} is held by more than {stored.world_size} ranks")
    if sum(map(math.prod, parameters.values())) > MAX_ELEMENTS:
        raise DocumentError("its parameters are too large")
    if sum(run.parts for runs in cuts.values() for run in runs) > MAX_SLICES:
        raise DocumentError("it has too many slices")
    for name, runs in cuts.items():
        if len(runs) > 1 and _has_rank_twice(runs, world_size=stored.world_size):
            raise DocumentError(f"a rank holds {name} twice")
    return parameters, cuts


def _has_rank_twice(runs: Sequence[Run], *, world_size: int) -> bool:
    """Tell whether a rank holds two slices of one parameter; it has one place for each."""
    taken = np.zeros(world_size, bool)
    for run in runs:
        places = taken[_ranks_of(run)]
        if places.any():
            return True
        places[:] = True
    return False


def _ranks_of(run: Run) -> slice:
    return slice(run.rank, run.ranks[-1] + 1, run.step)


def _check_objects(objects: tuple[ObjectEntry, ...], cuts: Cuts, stored: _StoredManifest) -> None:
    kinds = len(stored.kinds)
    numel, slices = np.zeros((2, stored.world_size), np.int64)
    for runs in cuts.values():
        for run in runs:
            held = _ranks_of(run)
            numel[held] += run.numel
            slices[held] += 1
    if [entry.rank for entry in objects] != np.flatnonzero(slices).tolist():
        raise DocumentError("its objects are not those of the ranks that hold slices")
    for entry in objects:
        content = BYTES_PER_ELEMENT * kinds * int(numel[entry.rank])
        # A safetensors header has a few hundred bytes for each slice, beside the content itself.
        most = content + 2**20 + 2**12 * kinds * int(slices[entry.rank])
        if not content <= entry.size_bytes <= most:
            raise DocumentError(
                f"size of {entry.key} is {entry.size_bytes}, not a whole number from {content} to "
                f"{most}"
            )
        if len(entry.block_sha256) != -(-entry.size_bytes // stored.block_bytes):
            raise DocumentError(
                f"{entry.key} has {len(entry.block_sha256)} hashes for {entry.size_bytes} bytes"
            )
        if (entry.size_bytes - content) % BYTES_PER_ELEMENT:
            raise DocumentError(
                f"the values in {entry.key} do not begin at a multiple of their size"
            )
