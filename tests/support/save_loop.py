"""Training that saves its state meanwhile, and what can be restored of that."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.support.remote_store import load_state
from tests.unit.trainer.checkpoint.worlds import (
    RUN,
    SCIENCE,
    SHAPES,
    Savings,
    State,
    empty_state,
    random_state,
    same_bits,
    split,
)
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.upload import SaveReport
from trainer.storage.store import Store


class Training:
    """A run of one rank whose steps take a millisecond and which can save its state.

    Attributes:
        steps: How many it has made.
        reports: How each save ended.
    """

    def __init__(self, store: Store, **changes: Any) -> None:
        self._savings = Savings(store, **changes)
        self.steps = 0
        self.reports: list[SaveReport] = self._savings.reports

    def save(self, images: int, *, shapes: dict[str, tuple[int, ...]] = SHAPES) -> bool:
        """Begin a save."""
        return self._savings.saver.save(
            images=images,
            fragments=split(random_state(images, shapes), [], shapes)[0],
            train_state={"images": images},
            **SCIENCE,
        )

    def until(self, holds: Callable[[], bool]) -> None:
        """Train until something holds."""
        while not holds():
            time.sleep(0.001)
            self.steps += 1

    def until_reported(self, count: int) -> SaveReport:
        """Train until so many saves have ended, and return the last one's report."""
        self.until(lambda: len(self.reports) >= count)
        # What the new checkpoint made needless is deleted after the report.
        self._savings.saver.finish()
        return self.reports[-1]


def resumed(store: Store, shapes: dict[str, tuple[int, ...]] = SHAPES) -> int:
    """The position a run resumes from, after a look at the bits."""
    found = load_state(store, shapes=shapes)
    if found is None:
        return 0
    images, state, _ = found
    assert same_bits(state, random_state(images, shapes))
    return images


def restored(
    store: Store, manifest: Manifest | None, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> State:
    """What a restore from a known checkpoint gives."""
    assert manifest
    state = empty_state(shapes)
    CheckpointReader(store, run=RUN).restore(manifest, split(state, [], shapes)[0])
    return state
