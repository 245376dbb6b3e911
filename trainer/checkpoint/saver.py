"""Saving a run while it goes on: every rank its own slices, all ranks one decision.

A save copies the state into host memory and lets training go on. A thread then writes the content
and, with a conditional PUT, the manifest: that is the commit. Until then the checkpoint does not
exist, so a reader sees the old one or the new one and never a mix.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from trainer.checkpoint import layout
from trainer.checkpoint.agreement import Agreement
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.objects import BLOCK_BYTES
from trainer.checkpoint.save_plan import (
    SavePlan,
    SaveProposal,
    agree,
    check_readable,
    describe_rank,
    plan_save,
)
from trainer.checkpoint.slices import slices_of
from trainer.checkpoint.snapshot import Snapshot
from trainer.checkpoint.upload import SaveReport, Upload, UploadContext
from trainer.host_group import HostGroup
from trainer.state import Fragment
from trainer.storage.retry import RetryPolicy
from trainer.storage.store import Store

PACKAGES = ("lapflow-trainer", "torch", "safetensors", "deepspeed")


@cache
def versions() -> dict[str, str]:
    """Return the version of each package that is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


logger = logging.getLogger(__name__)

_TICK_S = 0.2
_NO_TIME = "there was no time left to wait for the store (checkpoint.grace_s)"


class CheckpointSaver:
    """Saves one run, as one of its ranks sees it.

    `prepare` and `save` are collective: every rank calls them, and what fails on one raises on all.

    Args:
        store: Where its checkpoints are kept.
        index: Its checkpoints; shared with the reader that restored the run, which may have
            found one damaged that is now to be replaced.
        config: When to save, and what to keep.
        ranks: How this rank agrees with the others.
        aside: The same, for the threads that upload: they agree while the ranks do.
        report: Called on the first rank, in a thread, when a save has ended.
        scores: Fréchet distances measured so far, by images; retention asks for them.
        in_use: Checkpoints that somebody reads now; retention leaves them.
        position: Images of the run's own checkpoint from which it was restored, if it was.
        stop_requested: Tells that the run was asked to stop: then no save waits for another.
        fence: Called on the first rank, in a thread, before each commit; raises `LeaseLost` or
            `SupersededAttempt` if the run is another's by now.
    """

    def __init__(
        self,
        store: Store,
        *,
        index: CheckpointIndex,
        config: CheckpointConfig,
        ranks: HostGroup,
        aside: HostGroup,
        report: Callable[[SaveReport], None] = lambda _report: None,
        scores: Callable[[], Mapping[int, float]] = dict,
        in_use: Callable[[], Collection[int]] = tuple,
        position: int | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        fence: Callable[[], object] = lambda: None,
    ) -> None:
        self._store = store
        self._run = index.run
        self._config = config
        self._rank = ranks.rank
        self._world_size = ranks.world_size
        self._ranks = Agreement(ranks)
        self._index = index
        self._retry = RetryPolicy(config.patience_s)
        self._context = UploadContext(
            store=store,
            index=index,
            ranks=Agreement(aside),
            retry=self._retry,
            policy=config,
            scores=scores,
            in_use=in_use,
            fence=fence,
        )
        self._report = report if self._rank == 0 else lambda _report: None
        self._plan: SavePlan | None = None
        self._snapshot: Snapshot | None = None
        self._upload: Upload | None = None
        self._position = position
        self._stop_requested = stop_requested

    def prepare(self, fragments: Sequence[Fragment], *, science: Mapping[str, Any]) -> None:
        """Plan who writes what, and take the memory for it, so that the first save is no slower.

        Args:
            fragments: What this rank holds; all ranks together must hold everything. A slice that
                several ranks hold is written by one of them.
            science: The configuration that determines the result, as JSON values.

        Raises:
            CheckpointMismatch: The ranks' fragments do not make up one whole state.
            InvalidManifest: The checkpoint could not be read again.
            RankFailed: A rank failed for another reason.
        """
        if self._plan is not None:
            return
        own = self._ranks.run_on_all(lambda: describe_rank(fragments))
        tables = self._ranks.gather(lambda: own.parameters)
        spans = self._ranks.gather(lambda: own.spans)
        plan = SavePlan.from_json(
            self._ranks.run_on_rank0(lambda: plan_save(tables, spans).to_json())
        )
        sizes = self._ranks.gather(lambda: self._allocate(fragments, plan))
        self._ranks.run_on_rank0(lambda: self._check_readable(plan, sizes, science))
        self._plan = plan

    def save(
        self,
        *,
        images: int,
        fragments: Sequence[Fragment],
        train_state: Mapping[str, Any],
        science: Mapping[str, Any],
        config_fingerprint: str,
        last: bool = False,
    ) -> bool:
        """Copy the state, and have it uploaded, committed and old checkpoints retired meanwhile.

        Args:
            images: Images the run has seen.
            fragments: What this rank holds, the same slices every time.
            train_state: The run's counters, as JSON values; the first rank's are kept.
            science: The configuration that determines the result, as JSON values.
            config_fingerprint: Its hash, for a quick comparison on resume.
            last: Wait for a save under way, whatever the configuration says.

        Returns:
            Whether the save was begun. It was not if the one before is still on its way, and the
            configuration says to skip then, a stop was asked for, or `set_deadline` left no time.

        Raises:
            CheckpointMismatch: The ranks' fragments do not make up one whole state.
            CheckpointConflict: At the save before, another run's checkpoint stood in its place.
            LeaseLost: At the save before, another launch had taken the run.
            SupersededAttempt: At the save before, a later attempt of the launch had begun.
            RankFailed: A rank failed for another reason.
        """
        began = time.monotonic()
        self.prepare(fragments, science=science)
        if last or self._config.when_busy == "wait":
            self._wait(for_all_of_it=last)
        proposals = self._ranks.gather(lambda: self._propose(images, config_fingerprint).to_json())
        proposal = SaveProposal.from_json(
            self._ranks.run_on_rank0(lambda: agree(proposals).to_json())
        )
        if proposal.busy:
            self._skip(images)
            return False
        self._ranks.run_on_all(lambda: self._take(fragments))
        assert self._plan is not None
        self._position = images
        self._upload = Upload(
            self._describe(proposal, self._plan, train_state=train_state, science=science),
            rank=self._rank,
            snapshot=self._snapshot,
            to=self._context,
            report=self._report,
            blocked_s=time.monotonic() - began,
        )
        return True

    def set_deadline(self, within_s: float) -> None:
        """Leave no more than so many seconds for all that is, and will be, on its way."""
        self._retry.set_deadline(within_s)

    def finish(self) -> None:
        """Wait until the save under way has ended, but no longer than `set_deadline` allows.

        How it ended was reported. Here it raises only if the run cannot go on like this.

        Raises:
            CheckpointConflict: Another run's checkpoint stands in the place.
            LeaseLost: Another launch has taken the run.
            SupersededAttempt: A later attempt of the launch has begun.
            RankFailed: A rank failed for a reason outside this package.
        """
        if self._upload is None:
            return
        if self._upload.running:
            logger.info("waiting until the checkpoint under way is saved")
        self._upload.wait(self._retry.left_s())
        if self._upload.running:
            self._upload.report_failure(_NO_TIME)
            return
        self._note_failure()

    def leave(self, within_s: float) -> None:
        """Give the save under way so many seconds after the run failed: its state is a good one."""
        self._retry.set_deadline(within_s)
        if self._upload is not None:
            self._upload.wait(within_s)

    def uri(self, images: int) -> str:
        """Return the address of a checkpoint."""
        return self._index.uri(images)

    def is_saved(self, images: int) -> bool:
        """Tell whether the last save or restore was of this position, as far as is known."""
        return self._position == images

    def _allocate(self, fragments: Sequence[Fragment], plan: SavePlan) -> bytes:
        """Take the memory for what this rank writes, and tell how much that is."""
        spans = slices_of(self._rank, plan.cuts)
        if not spans:
            return b""
        on_gpu = any(value.is_cuda for each in fragments for value in each.tensors.values())
        self._snapshot = Snapshot(spans, kinds=plan.kinds, page_locked=on_gpu)
        return str(len(self._snapshot.data)).encode()

    def _check_readable(
        self, plan: SavePlan, sizes: Sequence[bytes], science: Mapping[str, Any]
    ) -> bytes:
        """Refuse to train what could be saved and not be read again."""
        proposal = SaveProposal(
            images=layout.MAX_IMAGES, config_fingerprint="", attempt=_attempt(), busy=False
        )
        manifest = self._describe(proposal, plan, train_state={}, science=science)
        check_readable(manifest, sizes={rank: int(size) for rank, size in enumerate(sizes) if size})
        return b""

    def _propose(self, images: int, config_fingerprint: str) -> SaveProposal:
        self._note_failure()
        return SaveProposal(
            images=images,
            config_fingerprint=config_fingerprint,
            attempt=_attempt(),
            busy=self._upload is not None and self._upload.running,
        )

    def _note_failure(self) -> None:
        if self._upload is not None and self._upload.failed:
            self._position = None
            self._upload.raise_if_fatal()

    def _take(self, fragments: Sequence[Fragment]) -> None:
        if self._snapshot is not None:
            self._snapshot.take(fragments)

    def _describe(
        self,
        proposal: SaveProposal,
        plan: SavePlan,
        *,
        train_state: Mapping[str, Any],
        science: Mapping[str, Any],
    ) -> Manifest:
        return Manifest(
            run=self._run,
            images=proposal.images,
            attempt=proposal.attempt,
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            world_size=self._world_size,
            config_fingerprint=proposal.config_fingerprint,
            science=science,
            train_state=copy.deepcopy(dict(train_state)),
            kinds=plan.kinds,
            parameters=plan.parameters,
            cuts=plan.cuts,
            block_bytes=BLOCK_BYTES,
            objects=(),
            versions=versions(),
        )

    def _wait(self, *, for_all_of_it: bool) -> None:
        """Wait for the save under way: to its end, or until a stop is asked for."""
        if self._upload is None:
            return
        if for_all_of_it:
            self._upload.wait(self._retry.left_s())
        while self._upload.running and not for_all_of_it and not self._stop_requested():
            self._upload.wait(_TICK_S)

    def _skip(self, images: int) -> None:
        if self._retry.left_s() is not None:
            self._report(SaveReport(images=images, uri=self.uri(images), error=_NO_TIME))
        elif self._rank == 0:
            logger.warning(
                "checkpoint %s is skipped: the one before is still on its way", self.uri(images)
            )


def _attempt() -> str:
    return uuid.uuid4().hex[:12]
