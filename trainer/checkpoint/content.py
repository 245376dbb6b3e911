"""Reading the content of checkpoints: blocks of safetensors objects into slices of parameters.

Nothing here is ever unpickled, and nothing is used before its SHA-256 was found right.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from pipelines.formats import format_bytes, format_duration
from pipelines.progress import Pace, Progress, figures_in
from trainer.checkpoint.errors import CheckpointMismatch, DamagedCheckpoint
from trainer.checkpoint.layout import checkpoint_key
from trainer.checkpoint.manifest import BYTES_PER_ELEMENT, Manifest, ObjectEntry
from trainer.checkpoint.objects import first_elements, read_block
from trainer.checkpoint.slices import Read, Span, missing_from, plan_reads
from trainer.finite import all_finite
from trainer.state import Fragment
from trainer.storage.store import Store, in_threads


def by_name(fragments: Sequence[Fragment]) -> dict[str, Fragment]:
    """Index fragments by their parameter.

    Raises:
        CheckpointMismatch: Two are slices of the same parameter.
    """
    named = {fragment.name: fragment for fragment in fragments}
    if len(named) != len(fragments):
        raise CheckpointMismatch(
            "A rank holds two slices of one parameter, and checkpoints expect one: join them in "
            "the engine's fragments()."
        )
    return named


def span_of(fragment: Fragment) -> Span:
    """Return the slice a fragment holds."""
    return Span(fragment.start, fragment.numel)


def do_nothing() -> None:
    """Stand in where nobody asks how far reading is."""


def fill(
    store: Store,
    manifest: Manifest,
    fragments: Sequence[Fragment],
    *,
    on_read: Callable[[], None] = do_nothing,
) -> None:
    """Fill fragments in place from the objects that overlap them, whoever wrote those.

    Only the blocks that hold something wanted are read, several at a time, each once.

    Args:
        store: The store of the manifest's keys.
        manifest: The checkpoint.
        fragments: What to fill. After an error their content is undefined.
        on_read: Called by several threads, after each block.

    Raises:
        DamagedCheckpoint: An object is missing or changed, or holds values that are not finite.
        CheckpointMismatch: A parameter, or part of one, is not in the checkpoint, or has another
            shape.
        StoreError: The store failed.
    """
    named = by_name(fragments)
    check_fit(manifest, fragments)
    wanted = {name: span_of(fragment) for name, fragment in named.items()}
    _check_held(store, manifest, wanted)
    entries = {entry.rank: entry for entry in manifest.objects}
    by_block: dict[tuple[int, int], list[_Piece]] = defaultdict(list)
    for rank, parts in groupby(plan_reads(wanted, manifest.cuts), key=lambda read: read.rank):
        for piece in _pieces(manifest, entries[rank], parts, named):
            for number in piece.blocks(manifest.block_bytes):
                by_block[rank, number].append(piece)

    @torch.no_grad()  # for the thread that runs it
    def read(rank: int, number: int) -> None:
        entry = entries[rank]
        # torch wants memory that it could write to.
        block = bytearray(read_block(store, entry, number, block_bytes=manifest.block_bytes))
        on_read()
        for piece in by_block[rank, number]:
            if not piece.copy_from(block, start=number * manifest.block_bytes):
                raise DamagedCheckpoint(
                    f"{store.uri(entry.key)} holds values that are not finite. Use an older "
                    "checkpoint."
                )

    in_threads(read, sorted(by_block))


def check_fit(manifest: Manifest, fragments: Sequence[Fragment]) -> None:
    """Check that a checkpoint knows these parameters, in these shapes, with these kinds.

    Raises:
        CheckpointMismatch: It does not.
    """
    for fragment in fragments:
        shape = manifest.parameters.get(fragment.name)
        if shape is None:
            raise CheckpointMismatch(
                f"The model has a parameter {fragment.name} that the checkpoint of {manifest.run} "
                f"after {manifest.images} images lacks: build the model it was saved from."
            )
        if shape != fragment.shape:
            raise CheckpointMismatch(
                f"Parameter {fragment.name} has shape {fragment.shape}, but {shape} in the "
                f"checkpoint of {manifest.run} after {manifest.images} images: build the model it "
                "was saved from."
            )
        if absent := set(fragment.tensors) - set(manifest.kinds):
            raise CheckpointMismatch(
                f"The checkpoint of {manifest.run} after {manifest.images} images holds "
                f"{', '.join(manifest.kinds)} of each parameter, but no {', '.join(absent)}."
            )


def load_weights(store: Store, manifest: Manifest, which: str = "ema") -> dict[str, Tensor]:
    """Read whole weights, for sampling.

    Args:
        store: The store of the manifest's keys.
        manifest: The checkpoint.
        which: A moving average, by its kind, or "master" for the weights as trained.

    Returns:
        Each parameter in its shape, float32, on the CPU.

    Raises:
        DamagedCheckpoint: An object is missing or changed.
        CheckpointMismatch: The checkpoint lacks such weights, or they are more than memory holds.
    """
    whole = {name: Span(0, math.prod(shape)) for name, shape in manifest.parameters.items()}
    # Before memory is taken for what a manifest may only claim.
    _check_held(store, manifest, whole)
    try:
        fragments = [
            Fragment(
                name=name, start=0, shape=shape, tensors={which: torch.empty(math.prod(shape))}
            )
            for name, shape in manifest.parameters.items()
        ]
    except RuntimeError as error:
        size = format_bytes(BYTES_PER_ELEMENT * sum(span.numel for span in whole.values()))
        raise CheckpointMismatch(
            f"The weights of {manifest.run} after {manifest.images} images take {size} of memory, "
            "which this machine does not have: use one that has."
        ) from error
    fill(store, manifest, fragments)
    return {fragment.name: fragment.tensors[which].view(fragment.shape) for fragment in fragments}


class ReadProgress(Progress):
    """Tells how much has been read, and when it will be done.

    Args:
        total_bytes: What there is to read.
        report: Takes a line every few seconds, and one at the end.
        what: What is read.
    """

    def __init__(
        self, total_bytes: int, *, report: Callable[[str], None], what: str = "checkpoints"
    ) -> None:
        super().__init__(what, total_bytes, report=report, line=_line, figures=figures_in("bytes"))


def _line(pace: Pace) -> str:
    return (
        f"{format_bytes(pace.done)} of {format_bytes(pace.total)} ({pace.fraction:.0%})  "
        f"{format_bytes(pace.rate)}/s  ETA {format_duration(pace.left_s)}"
    )


def damaged_objects(store: Store, manifest: Manifest, progress: ReadProgress) -> dict[str, str]:
    """Read all objects of a checkpoint and compare them with its manifest.

    Args:
        store: The store of the manifest's keys.
        manifest: The checkpoint.
        progress: Counts what is read.

    Returns:
        What is wrong with each damaged object, by its key; empty if all is whole.

    Raises:
        StoreError: The store failed, which says nothing about the checkpoint.
    """

    def read(entry: ObjectEntry, number: int) -> None:
        block = read_block(store, entry, number, block_bytes=manifest.block_bytes)
        progress.add(len(block))

    damage = {}
    for entry in manifest.objects:
        before = progress.done
        try:
            in_threads(read, ((entry, number) for number in range(len(entry.block_sha256))))
        except DamagedCheckpoint as error:
            damage[entry.key] = str(error)
            # The rest of it is passed over.
            progress.add(before + entry.size_bytes - progress.done)
    return damage


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """Consecutive values of one object, and where they go.

    Attributes:
        start: First byte in the object.
        target: The values' place, 1-D.
    """

    start: int
    target: Tensor

    @property
    def stop(self) -> int:
        """The byte after the last."""
        return self.start + BYTES_PER_ELEMENT * self.target.numel()

    def blocks(self, block_bytes: int) -> range:
        """Numbers of the blocks that hold the values."""
        return range(self.start // block_bytes, -(-self.stop // block_bytes))

    def copy_from(self, block: bytearray, *, start: int) -> bool:
        """Copy those values that a block holds, which begins at byte `start` of the object.

        Returns:
            Whether all of them are finite.
        """
        first, stop = max(self.start, start), min(self.stop, start + len(block))
        values = torch.frombuffer(
            block,
            dtype=torch.float32,
            count=(stop - first) // BYTES_PER_ELEMENT,
            offset=first - start,
        )
        into = self.target.narrow(0, (first - self.start) // BYTES_PER_ELEMENT, values.numel())
        into.copy_(values)
        return all_finite(values)


def _pieces(
    manifest: Manifest, entry: ObjectEntry, reads: Iterable[Read], targets: Mapping[str, Fragment]
) -> Iterator[_Piece]:
    """Where the reads from one object find each kind of value."""
    slices = manifest.slices(entry)
    first = first_elements(slices)
    per_kind = sum(span.numel for span in slices.values())
    values_start = entry.size_bytes - manifest.content_bytes(entry)
    for read in reads:
        target = targets[read.name]
        for number, kind in enumerate(manifest.kinds):
            if kind in target.tensors:
                element = first[read.name] + read.part.start - read.saved.start
                yield _Piece(
                    start=values_start + BYTES_PER_ELEMENT * (number * per_kind + element),
                    target=target.tensors[kind].narrow(
                        0, read.part.start - target.start, read.part.numel
                    ),
                )


def _check_held(store: Store, manifest: Manifest, wanted: Mapping[str, Span]) -> None:
    missing = missing_from(wanted, manifest.cuts)
    if missing:
        name, gaps = min(missing.items())
        raise CheckpointMismatch(
            f"Checkpoint {store.uri(checkpoint_key(manifest.run, manifest.images))} lacks elements "
            f"{gaps[0].start} to {gaps[0].stop} of {name} and slices of {len(missing) - 1} more "
            "parameters: it was not saved by all ranks. Use another checkpoint."
        )
