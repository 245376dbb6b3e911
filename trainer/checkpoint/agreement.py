"""One decision for all ranks: what fails on one rank is raised on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from trainer.checkpoint.errors import CheckpointError, RankFailed

Result = TypeVar("Result")
Gather = Callable[[object], list[object]]


def alone(value: object) -> list[object]:
    """Gather over the only rank there is."""
    return [value]


class Agreement:
    """Runs a step on the ranks and ends it the same way on all of them.

    Without it a rank whose disk is full would leave while the others wait for it for ever.

    Args:
        rank: This rank.
        gather: Returns the list of every rank's object, in rank order, on every rank.
    """

    def __init__(self, *, rank: int, gather: Gather) -> None:
        self._rank = rank
        self._gather = gather

    def each(self, step: Callable[[], Result]) -> list[Result]:
        """Run `step` on every rank and return all results on every rank.

        Raises:
            CheckpointError: The error of the first rank whose step failed; `RankFailed` if it is
                none of ours.
        """
        own: Exception | None = None
        value: Result | None = None
        try:
            value = step()
        except Exception as error:
            own = error
        outcomes = cast(
            "list[tuple[CheckpointError | None, Result]]",
            self._gather((self._portable(own), value)),
        )
        for shared, _ in outcomes:
            if shared is not None:
                # A fresh copy: ranks may share a process, and a traceback belongs to one raise.
                raise type(shared)(*shared.args) from own
        return [result for _, result in outcomes]

    def first(self, step: Callable[[], Result]) -> Result:
        """Run `step` on rank 0 alone and return its result on every rank.

        Raises:
            CheckpointError: As for `each`.
        """
        results = self.each(lambda: step() if self._rank == 0 else None)
        return cast("Result", results[0])

    def _portable(self, error: Exception | None) -> CheckpointError | None:
        if error is None or isinstance(error, CheckpointError):
            return error
        return RankFailed(f"Rank {self._rank} failed with {type(error).__name__}: {error}")
