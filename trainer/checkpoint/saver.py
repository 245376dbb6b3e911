"""Saving a run while it goes on: every rank its own slices, all ranks one decision.

A save copies the state into host memory and lets training go on. A thread then writes the content
and, with a conditional PUT, the manifest: that is the commit. Until then the checkpoint does not
exist, so a reader sees the old one or the new one and never a mix.
"""

from __future__ import annotations

import copy
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from trainer.checkpoint import content, layout
from trainer.checkpoint.agreement import Agreement, Gather
from trainer.checkpoint.blocks import BLOCK_BYTES
from trainer.checkpoint.catalogue import Catalogue
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.patience import Patience
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.save_plan import SavePlan, Turn, announce, check_agreed, plan_save
from trainer.checkpoint.snapshot import Snapshot
from trainer.checkpoint.store import Store
from trainer.checkpoint.upload import Destination, SaveReport, Upload
from trainer.checkpoint.versions import versions
from trainer.state import Fragment

logger = logging.getLogger(__name__)

_TICK_S = 0.2
_NO_TIME = "there was no time left to wait for the store (checkpoint.grace_s)"


class CheckpointSaver:
    """Saves one run, as one of its ranks sees it.

    `prepare` and `save` are collective: every rank calls them, and what fails on one raises on all.

    Args:
        store: Where its checkpoints are kept.
        catalogue: Its checkpoints; shared with the reader that restored the run, which may have
            found one damaged that is now to be replaced.
        config: When to save, and what to keep.
        rank: This rank.
        world_size: Number of ranks.
        gather: Returns the list of every rank's object, in rank order, on every rank.
        gather_aside: The same, for the threads that upload: they gather while the ranks do.
        report: Called on the first rank, in a thread, when a save has ended.
        scores: Fréchet distances measured so far, by images; retention asks for them.
        position: Images of the run's own checkpoint from which it was restored, if it was.
        stop_requested: Tells that the run was asked to stop: then no save waits for another.
    """

    def __init__(
        self,
        store: Store,
        *,
        catalogue: Catalogue,
        config: CheckpointConfig,
        rank: int,
        world_size: int,
        gather: Gather,
        gather_aside: Gather,
        report: Callable[[SaveReport], None] = lambda _report: None,
        scores: Callable[[], Mapping[int, float]] = dict,
        position: int | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._run = catalogue.run
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._ranks = Agreement(rank=rank, gather=gather)
        self._catalogue = catalogue
        self._patience = Patience(config.patience_s)
        self._destination = Destination(
            store=store,
            catalogue=catalogue,
            ranks=Agreement(rank=rank, gather=gather_aside),
            patience=self._patience,
            policy=RetentionPolicy.of(config),
            scores=scores,
        )
        self._report = report if rank == 0 else _keep_quiet
        self._plan: SavePlan | None = None
        self._snapshot: Snapshot | None = None
        self._upload: Upload | None = None
        self._position = position
        self._stop_requested = stop_requested

    def prepare(self, fragments: Sequence[Fragment]) -> None:
        """Plan who writes what, and take the memory for it, so that the first save is no slower.

        Args:
            fragments: What this rank holds; all ranks together must hold everything. A slice that
                several ranks hold is written by one of them.

        Raises:
            CheckpointMismatch: The ranks' fragments do not make up one whole state.
            RankFailed: A rank failed for another reason.
        """
        if self._plan is not None:
            return
        announced = self._ranks.each(lambda: announce(fragments))
        assert len(announced) == self._world_size
        plan = plan_save(announced)
        self._ranks.each(lambda: self._allocate(fragments, plan))
        self._plan = plan

    def save(
        self,
        *,
        images: int,
        fragments: Sequence[Fragment],
        train_state: Mapping[str, Any],
        science: Mapping[str, Any],
        science_hash: str,
        last: bool = False,
    ) -> bool:
        """Copy the state, and have it uploaded, committed and old checkpoints retired meanwhile.

        Args:
            images: Images the run has seen.
            fragments: What this rank holds, the same slices every time.
            train_state: The run's counters, as JSON values; the first rank's are kept.
            science: The configuration that determines the result, as JSON values.
            science_hash: Its hash, for a quick comparison on resume.
            last: Wait for a save under way, whatever the configuration says.

        Returns:
            Whether the save was begun. It was not if the one before is still on its way, and the
            configuration says to skip then, a stop was asked for, or `hurry` left no time.

        Raises:
            CheckpointMismatch: The ranks' fragments do not make up one whole state.
            CheckpointConflict: At the save before, another run's checkpoint stood in its place.
            RankFailed: A rank failed for another reason.
        """
        began = time.monotonic()
        self.prepare(fragments)
        if last or self._config.when_busy == "wait":
            self._wait(for_all_of_it=last)
        turns = self._ranks.each(lambda: self._turn(images, science_hash))
        check_agreed(turns)
        if any(turn.busy for turn in turns):
            self._skip(images)
            return False
        self._ranks.each(lambda: self._take(fragments))
        self._position = images
        self._upload = Upload(
            self._described(turns[0], train_state=train_state, science=science),
            key=layout.object_key(self._run, images, turns[0].attempt, self._rank),
            snapshot=self._snapshot,
            to=self._destination,
            report=self._report,
            retires=self._rank == 0,
            blocked_s=time.monotonic() - began,
        )
        return True

    def hurry(self, within_s: float) -> None:
        """Leave no more than so many seconds for all that is, and will be, on its way."""
        self._patience.hurry(within_s)

    def finish(self) -> None:
        """Wait until the save under way has ended, but no longer than `hurry` allows.

        How it ended was reported. Here it raises only if the run cannot go on like this.

        Raises:
            CheckpointConflict: Another run's checkpoint stands in the place.
            RankFailed: A rank failed for a reason outside this package.
        """
        if self._upload is None:
            return
        if self._upload.running:
            logger.info("waiting until the checkpoint under way is saved")
        self._upload.wait(self._patience.left_s())
        if self._upload.running:
            self._upload.report_failure(_NO_TIME)
            return
        self._note_failure()

    def leave(self, within_s: float) -> None:
        """Give the save under way so many seconds after the run failed: its state is a good one."""
        self._patience.hurry(within_s)
        if self._upload is not None:
            self._upload.wait(within_s)

    def uri(self, images: int) -> str:
        """Return the address of a checkpoint."""
        return self._catalogue.uri(images)

    def is_saved(self, images: int) -> bool:
        """Tell whether the last save or restore was of this position, as far as is known."""
        return self._position == images

    def _allocate(self, fragments: Sequence[Fragment], plan: SavePlan) -> None:
        spans = {
            each.name: content.span_of(each)
            for each in fragments
            if each.name in plan.writes[self._rank]
        }
        if spans:
            on_gpu = any(value.is_cuda for each in fragments for value in each.tensors.values())
            self._snapshot = Snapshot(spans, kinds=plan.kinds, page_locked=on_gpu)

    def _turn(self, images: int, science_hash: str) -> Turn:
        self._note_failure()
        return Turn(
            images=images,
            science_hash=science_hash,
            attempt=uuid.uuid4().hex[:12],
            busy=self._upload is not None and self._upload.running,
        )

    def _note_failure(self) -> None:
        if self._upload is not None and self._upload.failed:
            self._position = None
            self._upload.raise_if_fatal()

    def _take(self, fragments: Sequence[Fragment]) -> None:
        if self._snapshot is not None:
            self._snapshot.take(fragments)

    def _described(
        self, turn: Turn, *, train_state: Mapping[str, Any], science: Mapping[str, Any]
    ) -> Manifest:
        assert self._plan is not None
        return Manifest(
            run=self._run,
            images=turn.images,
            attempt=turn.attempt,
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            world_size=self._world_size,
            science_hash=turn.science_hash,
            science=science,
            train_state=copy.deepcopy(dict(train_state)),
            kinds=self._plan.kinds,
            parameters=self._plan.parameters,
            block_bytes=BLOCK_BYTES,
            objects=(),
            versions=versions(),
        )

    def _wait(self, *, for_all_of_it: bool) -> None:
        """Wait for the save under way: to its end, or until a stop is asked for."""
        if self._upload is None:
            return
        if for_all_of_it:
            self._upload.wait(self._patience.left_s())
        while self._upload.running and not for_all_of_it and not self._stop_requested():
            self._upload.wait(_TICK_S)

    def _skip(self, images: int) -> None:
        if self._patience.left_s() is not None:
            self._report(
                SaveReport(
                    images=images,
                    uri=self.uri(images),
                    size_bytes=0,
                    blocked_s=0.0,
                    upload_s=0.0,
                    error=_NO_TIME,
                )
            )
        elif self._rank == 0:
            logger.warning(
                "checkpoint %s is skipped: the one before is still on its way", self.uri(images)
            )


def _keep_quiet(_report: SaveReport) -> None:
    """Stand in for the report on every rank but the first."""
