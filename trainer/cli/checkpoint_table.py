"""The checkpoints of a run as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

from pipelines.console import visible
from pipelines.formats import format_bytes, format_table
from trainer.checkpoint.retention import CheckpointListing

_NOTHING = "-"

State = Literal["whole", "damaged", "unfinished"]
STATES: tuple[State, ...] = get_args(State)
_WHOLE, _DAMAGED, _UNFINISHED = STATES


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One position of a run at which something was saved.

    Attributes:
        images: Images the run had seen.
        uri: Its address.
        state: "whole" as far as can be told without reading it, "damaged", or "unfinished": objects
            without a manifest.
        problem: Why it is not whole.
        saved_at: When it was saved, in ISO 8601, as far as its manifest is there.
        size_bytes: Bytes of everything in its folder.
        ranks: Ranks that saved it.
        objects: Content objects in its folder.
        frechet: Its Fréchet distance, if it was measured.
        kept: Why it stays; empty if it goes at the next save, or when the run is pruned.
    """

    images: int
    uri: str
    state: State
    problem: str | None
    saved_at: str | None
    size_bytes: int
    ranks: int | None
    objects: int
    frechet: float | None
    kept: tuple[str, ...]


def entries(
    listing: CheckpointListing,
    *,
    uri: Callable[[int], str],
    reasons: Mapping[int, Sequence[str]],
    scores: Mapping[int, float],
) -> list[Entry]:
    """Describe everything under a run's checkpoints, oldest first.

    Args:
        listing: What there is.
        uri: Gives the address of a checkpoint.
        reasons: Why each committed checkpoint is kept.
        scores: Fréchet distances of those that were measured.
    """
    newest = listing.newest_valid
    found = []
    for images, sizes in listing.folders.items():
        manifest = listing.manifests.get(images)
        state, problem, kept = _WHOLE, "", tuple(reasons.get(images, ()))
        if images in listing.damaged:
            state, problem = _DAMAGED, listing.damaged[images]
        elif manifest is None:
            state, problem = _UNFINISHED, "it has no manifest; a save that ended early left it"
            if newest is None or images >= newest.images:
                problem = "it has no manifest; it is being written, or was left by a save that died"
                kept = ("may be under way",)
        found.append(
            Entry(
                images=images,
                uri=uri(images),
                state=state,
                problem=problem or None,
                saved_at=None if manifest is None else manifest.saved_at,
                size_bytes=sum(sizes.values()),
                ranks=None if manifest is None else manifest.world_size,
                objects=len(sizes) - (state != _UNFINISHED),
                frechet=scores.get(images),
                kept=kept,
            )
        )
    return found


def table(listed: Sequence[Entry], *, features: str | None, gone: str = "expires") -> str:
    """Lay checkpoints out for a terminal, and below them what is wrong with which.

    Args:
        listed: The checkpoints.
        features: Extractor of the Fréchet distances; None leaves their column away.
        gone: What is said of a checkpoint that does not stay.
    """
    columns: list[tuple[str, str, list[str]]] = [
        ("images", ">", [f"{each.images:,}" for each in listed]),
        ("saved at (UTC)", "<", [_time(each.saved_at) for each in listed]),
        ("size", ">", [format_bytes(each.size_bytes) for each in listed]),
        ("ranks", ">", [_NOTHING if each.ranks is None else f"{each.ranks}" for each in listed]),
        ("objects", ">", [f"{each.objects}" for each in listed]),
        (f"Fréchet ({features})", ">", [_distance(each.frechet) for each in listed]),
        ("kept because", "<", [", ".join(each.kept) or gone for each in listed]),
        ("state", "<", [each.state for each in listed]),
    ]
    if features is None:
        del columns[5]
    lines = format_table(
        list(zip(*((title, *cells) for title, _, cells in columns), strict=True)),
        align="".join(side for _, side, _ in columns),
    )
    notes = [
        f"{each.images:,} is {each.state}: {visible(each.problem)}"
        for each in listed
        if each.problem
    ]
    return "\n".join([lines, *([""] if notes else []), *notes])


def _time(saved_at: str | None) -> str:
    if saved_at is None:
        return _NOTHING
    try:
        return datetime.fromisoformat(saved_at).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError):  # the last day there is, in a zone where it comes late
        return saved_at


def _distance(frechet: float | None) -> str:
    return _NOTHING if frechet is None else f"{frechet:.4g}"
