"""What the ranks tell each other before saves, and the plan that follows from it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.checkpoint.content import by_name, span_of
from trainer.checkpoint.errors import CheckpointMismatch
from trainer.checkpoint.spans import Span, plan_reads, share_writes
from trainer.state import Fragment


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """What one rank holds of the state.

    Attributes:
        kinds: What it holds of each slice.
        shapes: Shape of each parameter it holds a slice of.
        spans: The slices.
    """

    kinds: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    spans: Mapping[str, Span]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one rank is about to save.

    Attributes:
        images: Its position in the run.
        science_hash: Hash of its configuration.
        attempt: A random name for this save; the first rank's is taken.
        busy: Whether its part of the save before is still on its way.
    """

    images: int
    science_hash: str
    attempt: str
    busy: bool


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """How the ranks write checkpoints together.

    Attributes:
        kinds: What every object holds of each slice.
        parameters: Shape of every parameter.
        writes: For each rank, the parameters whose slice it writes.
    """

    kinds: tuple[str, ...]
    parameters: Mapping[str, tuple[int, ...]]
    writes: Sequence[set[str]]


def announce(fragments: Sequence[Fragment]) -> Announcement:
    """Describe a rank's fragments.

    Raises:
        CheckpointMismatch: Two are slices of one parameter, or they hold different kinds.
    """
    named = by_name(fragments)
    kinds = {tuple(sorted(fragment.tensors)) for fragment in fragments}
    if len(kinds) > 1:
        raise CheckpointMismatch(f"All slices must hold the same kinds of values, got {kinds}.")
    return Announcement(
        kinds=kinds.pop() if kinds else (),
        shapes={name: fragment.shape for name, fragment in named.items()},
        spans={name: span_of(fragment) for name, fragment in named.items()},
    )


def plan_save(announcements: Sequence[Announcement]) -> SavePlan:
    """Check that the ranks together hold one whole state, and divide the writing.

    Args:
        announcements: One of each rank; the same list on all ranks gives the same plan or error.

    Raises:
        CheckpointMismatch: The ranks disagree, or together miss part of a parameter.
    """
    kinds = {each.kinds for each in announcements if each.spans}
    if len(kinds) != 1:
        raise CheckpointMismatch(f"The ranks must save the same kinds of values, got {kinds}.")
    parameters: dict[str, tuple[int, ...]] = {}
    for each in announcements:
        for name, shape in each.shapes.items():
            if parameters.setdefault(name, shape) != shape:
                raise CheckpointMismatch(
                    f"Parameter {name} has shape {parameters[name]} on one rank and {shape} on "
                    "another: the ranks did not build the same model."
                )
    whole = {name: Span(0, math.prod(shape)) for name, shape in parameters.items()}
    _, missing = plan_reads(whole, [each.spans for each in announcements])
    if missing:
        name, gaps = min(missing.items())
        raise CheckpointMismatch(
            f"No rank holds elements {gaps[0].start} to {gaps[0].stop} of {name}: the engine's "
            "fragments() are not the whole state. No checkpoint was written."
        )
    return SavePlan(
        kinds=kinds.pop(),
        parameters=parameters,
        writes=share_writes([each.spans for each in announcements]),
    )


def check_agreed(turns: Sequence[Turn]) -> None:
    """Check that all ranks are about to save the same position of the same run.

    Raises:
        CheckpointMismatch: They are not.
    """
    if len({(turn.images, turn.science_hash) for turn in turns}) > 1:
        seen = sorted({turn.images for turn in turns})
        raise CheckpointMismatch(
            f"The ranks do not save the same state: they are at {seen} images, or differ in "
            "configuration. This is a fault of the program; no checkpoint was written."
        )
