"""Hooks: passive observers of the loop, which get an immutable report and return nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """One update as hooks see it.

    Attributes:
        images_before: Images seen before the update.
        images: Images seen after it.
        updates: Updates applied so far.
        waited_s: Seconds this rank has waited for data since the loop began.
    """

    images_before: int
    images: int
    updates: int
    waited_s: float


class Hook(Protocol):
    """Something that happens along with training on every rank."""

    def after_update(self, report: UpdateReport) -> None:
        """Observe an update."""
        ...
