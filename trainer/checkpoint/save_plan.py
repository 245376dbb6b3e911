"""What the ranks tell each other before saves, and the plan that follows from it. Pure."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from graphlib import CycleError

import numpy as np

from pipelines.documents import parse_json
from trainer.checkpoint import layout
from trainer.checkpoint.content import by_name
from trainer.checkpoint.errors import CheckpointMismatch, InvalidManifest
from trainer.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest, ObjectEntry
from trainer.checkpoint.slices import (
    Cuts,
    Rows,
    Run,
    Span,
    common_order,
    cuts_of,
    missing_from,
    rows_of,
    share_writes,
)
from trainer.state import Fragment

# More than counters and the points of curves that wait for their tracker take.
TRAIN_STATE_BYTES = 4 * 1024**2


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What one rank holds of the state, in as few bytes as may be.

    Attributes:
        parameters: Kinds of values, names and shapes, as compressed JSON: the same bytes on all
            ranks that hold slices of the same parameters.
        spans: The slice of each of these parameters: first element and number of elements, two
            compressed little-endian 64-bit numbers.
    """

    parameters: bytes
    spans: bytes

    @classmethod
    def of(
        cls,
        kinds: Collection[Sequence[str]],
        shapes: Mapping[str, tuple[int, ...]],
        spans: Sequence[tuple[int, int]] | Rows,
    ) -> RankState:
        """Pack what a rank holds.

        Args:
            kinds: What it holds of each slice, once; of nothing, nothing.
            shapes: Shape of each parameter that it holds a slice of.
            spans: First element and number of elements of each slice.
        """
        table = json.dumps([[*kinds], [*shapes.items()]])
        return cls(
            parameters=zlib.compress(table.encode()),
            spans=zlib.compress(np.asarray(spans, "<i8").tobytes()),
        )


@dataclass(frozen=True, kw_only=True)
class SaveProposal:
    """What one rank is about to save.

    Attributes:
        images: Its position in the run.
        config_fingerprint: Hash of its configuration.
        attempt: A random name for this save; the first rank's is taken.
        busy: Whether its part of the save before is still on its way.
    """

    images: int
    config_fingerprint: str
    attempt: str
    busy: bool

    def to_json(self) -> bytes:
        """Put it into bytes."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> SaveProposal:
        """Take it out of bytes of `to_json`."""
        return cls(**parse_json(data))


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """How the ranks write checkpoints together.

    Attributes:
        kinds: What every object holds of each slice.
        parameters: Shape of every parameter, in the order in which slices lie in objects.
        cuts: The slices of each parameter that ranks write.
    """

    kinds: tuple[str, ...]
    parameters: Mapping[str, tuple[int, ...]]
    cuts: Cuts

    def to_json(self) -> bytes:
        """Put it into bytes."""
        parameters = [[name, shape, self.cuts[name]] for name, shape in self.parameters.items()]
        return json.dumps([self.kinds, parameters]).encode()

    @classmethod
    def from_json(cls, data: bytes) -> SavePlan:
        """Take it out of bytes of `to_json`."""
        kinds, parameters = parse_json(data)
        return cls(
            kinds=tuple(kinds),
            parameters={name: tuple(shape) for name, shape, _ in parameters},
            cuts={name: tuple(Run(*run) for run in runs) for name, _, runs in parameters},
        )


def describe_rank(fragments: Sequence[Fragment]) -> RankState:
    """Describe a rank's fragments.

    Raises:
        CheckpointMismatch: Two are slices of one parameter, or they hold different kinds.
    """
    named = by_name(fragments)
    kinds = {tuple(sorted(fragment.tensors)) for fragment in fragments}
    if len(kinds) > 1:
        raise CheckpointMismatch(f"All slices must hold the same kinds of values, got {kinds}.")
    return RankState.of(
        kinds,
        {name: fragment.shape for name, fragment in named.items()},
        [(fragment.start, fragment.numel) for fragment in fragments],
    )


def plan_save(announced: Sequence[bytes], spans: Sequence[bytes]) -> SavePlan:
    """Check that the ranks together hold one whole state, and divide the writing.

    Args:
        announced: The parameters that each rank announces.
        spans: The slices of them that each rank announces.

    Raises:
        CheckpointMismatch: The ranks disagree, or together miss part of a parameter.
    """
    tables = {each: parse_json(zlib.decompress(each)) for each in announced}
    kinds = {tuple(kind) for found, _ in tables.values() for kind in found}
    if len(kinds) != 1:
        raise CheckpointMismatch(f"The ranks must save the same kinds of values, got {kinds}.")
    parameters = _join_tables([parameters for _, parameters in tables.values()])
    numbers = {name: number for number, name in enumerate(parameters)}
    numbered = {
        table: np.array([numbers[name] for name, _ in listed], np.int64)
        for table, (_, listed) in tables.items()
    }
    held = np.concatenate(
        [
            rows_of(_unpack(packed), numbered[table], rank)
            for rank, (table, packed) in enumerate(zip(announced, spans, strict=True))
        ]
    )
    written = share_writes(held, world_size=len(announced))
    runs = cuts_of(written, parameters=len(parameters))
    plan = SavePlan(
        kinds=kinds.pop(), parameters=parameters, cuts=dict(zip(parameters, runs, strict=True))
    )
    _check_whole(plan)
    return plan


def agree(proposals: Sequence[bytes]) -> SaveProposal:
    """Return what all ranks are about to do; if one is busy, all are.

    Args:
        proposals: Every rank's `SaveProposal` as JSON.

    Raises:
        CheckpointMismatch: They are not about to save the same position of the same run.
    """
    taken = [SaveProposal.from_json(proposal) for proposal in proposals]
    if len({(proposal.images, proposal.config_fingerprint) for proposal in taken}) > 1:
        seen = sorted({proposal.images for proposal in taken})
        raise CheckpointMismatch(
            f"The ranks do not save the same state: they are at {seen} images, or differ in "
            "configuration. This is a fault of the program; no checkpoint was written."
        )
    return replace(taken[0], busy=any(proposal.busy for proposal in taken))


def check_readable(manifest: Manifest, sizes: Mapping[int, int]) -> None:
    """Check that what will be saved can be read again, also with a full train state.

    Args:
        manifest: The checkpoint, still without its objects and its train state.
        sizes: Bytes of the object of each rank that writes one.

    Raises:
        InvalidManifest: No launch could read it.
    """
    objects = [
        ObjectEntry(
            rank=rank,
            key=layout.object_key(manifest.run, manifest.images, manifest.attempt, rank),
            size_bytes=size,
            block_sha256=("0" * 64,) * -(-size // manifest.block_bytes),
        )
        for rank, size in sizes.items()
    ]
    try:
        least = len(replace(manifest, objects=tuple(objects)).to_json())
        if least + TRAIN_STATE_BYTES > MAX_MANIFEST_BYTES:
            raise InvalidManifest(
                f"Its manifest may come to {least + TRAIN_STATE_BYTES} bytes, more than "
                f"{MAX_MANIFEST_BYTES}."
            )
    except InvalidManifest as error:
        raise InvalidManifest(
            f"Training does not begin, since it could not be resumed. {error} If that is its size, "
            "use fewer cluster.workers or another engine.zero_stage."
        ) from error


def _unpack(spans: bytes) -> Rows:
    return np.frombuffer(zlib.decompress(spans), "<i8").reshape(-1, 2)


def _join_tables(tables: Sequence[Sequence[tuple[str, list[int]]]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, in an order that agrees with that of every rank."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in (each for table in tables for each in table):
        if shapes.setdefault(name, tuple(shape)) != tuple(shape):
            raise CheckpointMismatch(
                f"Parameter {name} has shape {shapes[name]} on one rank and {tuple(shape)} on "
                "another: the ranks did not build the same model."
            )
    try:
        order = common_order([name for name, _ in table] for table in tables)
    except CycleError as error:
        raise CheckpointMismatch(
            f"The ranks list parameters in different orders ({', '.join(error.args[1])}): the "
            "engine's fragments() must keep to one."
        ) from error
    return {name: shapes[name] for name in order}


def _check_whole(plan: SavePlan) -> None:
    whole = {name: Span(0, math.prod(shape)) for name, shape in plan.parameters.items()}
    missing = missing_from(whole, plan.cuts)
    if missing:
        name, (gap, *_) = min(missing.items())
        raise CheckpointMismatch(
            f"No rank holds elements {gap.start} to {gap.stop} of {name}: the engine's "
            "fragments() are not the whole state. No checkpoint was written."
        )
