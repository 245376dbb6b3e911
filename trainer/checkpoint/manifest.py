"""The manifest that makes a set of objects a checkpoint, and its distrustful reader."""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from trainer.checkpoint import layout
from trainer.checkpoint.errors import InvalidKey, InvalidManifest, NewerManifest
from trainer.checkpoint.spans import Span

FORMAT_VERSION = 2
MAX_MANIFEST_BYTES = 32 * 1024**2
MAX_ELEMENTS = 2**44
MAX_BLOCK_BYTES = 2**30
MAX_DIMENSIONS = 8
MAX_RANKS = 10**5
BYTES_PER_ELEMENT = 4  # everything is float32
_CHECKSUM = "sha256"


@dataclass(frozen=True, kw_only=True)
class ObjectEntry:
    """One content object.

    Attributes:
        key: Where it lies in the store.
        size_bytes: Its size.
        block_sha256: Hash of each of its blocks, in hexadecimal.
        fragments: The slice of each parameter it holds, in the order in which they lie in it: at
            its end, after the header of safetensors, all slices of the first kind of values, then
            all of the second, and so on.
    """

    key: str
    size_bytes: int
    block_sha256: tuple[str, ...]
    fragments: Mapping[str, Span]


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
        science_hash: Hash of `science`, as the caller computes it.
        science: The configuration that determines the result, as JSON values.
        train_state: Counters of the run, as JSON values.
        kinds: What each object holds of each slice: "ema", "exp_avg", "exp_avg_sq", "master".
        parameters: Shape of every parameter of the model.
        block_bytes: Size of the blocks that objects are hashed in.
        objects: The content.
        versions: Packages that wrote it.
    """

    format_version: int = FORMAT_VERSION
    run: str
    images: int
    attempt: str
    saved_at: str
    world_size: int
    science_hash: str
    science: Mapping[str, Any]
    train_state: Mapping[str, Any]
    kinds: tuple[str, ...]
    parameters: Mapping[str, tuple[int, ...]]
    block_bytes: int
    objects: tuple[ObjectEntry, ...]
    versions: Mapping[str, str]

    def content_bytes(self, entry: ObjectEntry) -> int:
        """Return the size of the values in an object, at its end."""
        return _content_bytes(entry.fragments, kinds=len(self.kinds))

    def to_json(self) -> bytes:
        """Return canonical JSON that carries the SHA-256 of its own body.

        Raises:
            InvalidManifest: Something in it is not a JSON value, such as a NaN.
        """
        try:
            body = asdict(self)
            for entry, written in zip(self.objects, body["objects"], strict=True):
                # The order of the slices counts, and an object of JSON has none.
                written["fragments"] = [[name, *span] for name, span in entry.fragments.items()]
            return _canonical({**body, _CHECKSUM: _digest(body)})
        except (TypeError, ValueError) as error:
            raise InvalidManifest(
                f"The checkpoint of {self.run} after {self.images} images cannot be described in "
                f"JSON ({error}): keep numbers that are finite, text, lists and string-keyed "
                "dicts in the configuration and the train state."
            ) from error

    @classmethod
    def from_json(cls, data: bytes, *, run: str, images: int) -> Manifest:
        """Read a manifest, believing nothing.

        Args:
            data: What `to_json` returned.
            run: The run the manifest was found under.
            images: The images it was found under.

        Raises:
            NewerManifest: Its format came after this code.
            InvalidManifest: It is damaged, belongs elsewhere, or names keys or sizes that no save
                would have written.
        """
        place = f"The manifest {layout.manifest_key(run, images)}"
        try:
            if len(data) > MAX_MANIFEST_BYTES:
                raise _Rejected(f"it has {len(data)} bytes")
            body = _json_object(data)
            version = body.get("format_version")
            if version == 1:
                raise _Rejected(
                    "it has format 1, which this code no longer reads; finish its run with the "
                    "version of the code that began it"
                )
            if type(version) is int and version > FORMAT_VERSION:
                raise NewerManifest(
                    f"{place} has format {version}, and this code reads up to {FORMAT_VERSION}: "
                    "use the newer version of the code that wrote it."
                )
            if body.pop(_CHECKSUM, None) != _digest(body):
                raise _Rejected("its checksum is wrong, so it was changed after it was written")
            manifest = _parsed(body)
            if (manifest.run, manifest.images) != (run, images):
                raise _Rejected(f"it belongs to run {manifest.run!r} at {manifest.images} images")
            return manifest
        except (_Rejected, InvalidKey) as error:
            reason = str(error).rstrip(".")
            raise InvalidManifest(
                f"{place} cannot be used: {reason}. Resume from another checkpoint."
            ) from error


class _Rejected(ValueError):
    """Why a manifest is refused."""


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
        _canonical(body)
    except (RecursionError, ValueError) as error:
        raise _Rejected(f"it is not plain JSON ({error})") from error
    return _mapping(body, "it")


def _parsed(body: Mapping[str, Any]) -> Manifest:
    _fields(body, Manifest)
    _whole(body["format_version"], "format_version", low=FORMAT_VERSION, high=FORMAT_VERSION)
    run = layout.check_key(_text(body["run"], "run"))
    images = _whole(body["images"], "images", low=0, high=layout.MAX_IMAGES)
    prefix = layout.attempt_prefix(run, images, _text(body["attempt"], "attempt"))
    kinds = tuple(_text(kind, "a kind") for kind in _sequence(body["kinds"], "kinds"))
    parameters = {
        _text(name, "a name"): _shape(shape, name)
        for name, shape in _mapping(body["parameters"], "parameters").items()
    }
    block_bytes = _whole(body["block_bytes"], "block_bytes", low=1, high=MAX_BLOCK_BYTES)
    if block_bytes % BYTES_PER_ELEMENT:
        raise _Rejected(f"block_bytes={block_bytes} cuts values")
    objects = tuple(
        _entry(
            entry, prefix=prefix, parameters=parameters, kinds=len(kinds), block_bytes=block_bytes
        )
        for entry in _sequence(body["objects"], "objects")
    )
    if len({entry.key for entry in objects}) != len(objects):
        raise _Rejected("it names an object twice")
    return Manifest(
        run=run,
        images=images,
        attempt=body["attempt"],
        saved_at=_text(body["saved_at"], "saved_at"),
        world_size=_whole(body["world_size"], "world_size", low=1, high=MAX_RANKS),
        science_hash=_text(body["science_hash"], "science_hash"),
        science=_mapping(body["science"], "science"),
        train_state=_mapping(body["train_state"], "train_state"),
        kinds=kinds,
        parameters=parameters,
        block_bytes=block_bytes,
        objects=objects,
        versions={
            name: _text(version, "a version")
            for name, version in _mapping(body["versions"], "versions").items()
        },
    )


def _entry(
    value: object,
    *,
    prefix: str,
    parameters: Mapping[str, tuple[int, ...]],
    kinds: int,
    block_bytes: int,
) -> ObjectEntry:
    body = _mapping(value, "an object")
    _fields(body, ObjectEntry)
    key = layout.check_key(_text(body["key"], "key"))
    if not key.startswith(prefix):
        raise _Rejected(f"its object {key} lies outside {prefix}")
    fragments = {}
    for each in _sequence(body["fragments"], "fragments"):
        if len(_sequence(each, f"a slice in {key}")) != 3:
            raise _Rejected(f"a slice in {key} is not [name, start, numel]")
        name = _text(each[0], f"a name in {key}")
        if name not in parameters:
            raise _Rejected(f"{key} holds {reprlib.repr(name)}, which is no parameter")
        if name in fragments:
            raise _Rejected(f"{key} holds {name} twice")
        numel = math.prod(parameters[name])
        start, length = (_whole(number, name, low=0, high=numel) for number in each[1:])
        if start + length > numel:
            raise _Rejected(f"{key} holds more of {name} than its {numel} elements")
        fragments[name] = Span(start, length)
    content = _content_bytes(fragments, kinds=kinds)
    # A safetensors header has a few hundred bytes for each slice, beside the content itself.
    most = content + 2**20 + 2**12 * kinds * len(fragments)
    size = _whole(body["size_bytes"], f"size of {key}", low=content, high=most)
    hashes = tuple(_text(each, "a hash") for each in _sequence(body["block_sha256"], "hashes"))
    if len(hashes) != -(-size // block_bytes):
        raise _Rejected(f"{key} has {len(hashes)} hashes for {size} bytes")
    if (size - content) % BYTES_PER_ELEMENT:
        raise _Rejected(f"the values in {key} do not begin at a multiple of their size")
    return ObjectEntry(key=key, size_bytes=size, block_sha256=hashes, fragments=fragments)


def _content_bytes(fragments: Mapping[str, Span], *, kinds: int) -> int:
    return BYTES_PER_ELEMENT * kinds * sum(span.numel for span in fragments.values())


def _fields(body: Mapping[str, Any], kind: type[Manifest] | type[ObjectEntry]) -> None:
    expected = {field.name for field in fields(kind)}
    if set(body) != expected:
        odd = ", ".join(sorted(expected ^ set(body)))
        raise _Rejected(f"it lacks or has unknown fields: {odd}")


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Rejected(f"{what} is not a JSON object")
    return value


def _sequence(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Rejected(f"{what} is not a list")
    return value


def _text(value: object, what: str) -> str:
    # Names come to stand in messages, where they shall not move a terminal's cursor.
    if not isinstance(value, str) or not value.isprintable():
        raise _Rejected(f"{what} is not text")
    return value


def _whole(value: object, what: str, *, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _Rejected(f"{what} is {reprlib.repr(value)}, not a whole number from {low} to {high}")
    return value


def _shape(value: object, name: str) -> tuple[int, ...]:
    sizes = _sequence(value, f"shape of {name}")
    shape = tuple(_whole(size, f"shape of {name}", low=0, high=MAX_ELEMENTS) for size in sizes)
    if len(shape) > MAX_DIMENSIONS or math.prod(shape) > MAX_ELEMENTS:
        raise _Rejected(f"the shape of {name} is too large")
    return shape
