"""A save on its way: one thread on each rank that writes, commits and retires."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pipelines.documents import parse_json
from trainer.checkpoint import layout
from trainer.checkpoint.agreement import Agreement
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.errors import NonFiniteState
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.manifest import Manifest, ObjectEntry
from trainer.checkpoint.snapshot import Snapshot
from trainer.storage.errors import (
    CheckpointError,
    LeaseLost,
    StoreError,
    StoreUnreachable,
    SupersededAttempt,
)
from trainer.storage.retry import RetryPolicy
from trainer.storage.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """How a save ended.

    Attributes:
        images: Images the saved state has seen.
        uri: Where the checkpoint is, or should be.
        size_bytes: Size of its objects, of all ranks; 0 if the save failed.
        blocked_s: Seconds that `CheckpointSaver.save` took, for which training waited.
        upload_s: Seconds from then on until it was committed, or given up.
        error: Why it failed; None if it did not.
    """

    images: int
    uri: str
    size_bytes: int = 0
    blocked_s: float = 0.0
    upload_s: float = 0.0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class UploadContext:
    """Where a rank's uploads go, and what they need on the way; the same for all of a run.

    Attributes:
        store: The store.
        index: The run's checkpoints in it.
        ranks: Brings the threads of all ranks to one decision.
        retry: How long the store is tried again.
        policy: Which checkpoints stay.
        scores: Gives the Fréchet distances measured so far, by images.
        in_use: Gives the checkpoints that somebody reads now.
        fence: Called on the first rank before each commit; raises if the run is another's by now.
    """

    store: Store
    index: CheckpointIndex
    ranks: Agreement
    retry: RetryPolicy
    policy: CheckpointConfig
    scores: Callable[[], Mapping[int, float]]
    in_use: Callable[[], Collection[int]]
    fence: Callable[[], object]


class Upload:
    """Begins at once; the snapshot must stay as it is until the upload has ended.

    Args:
        manifest: The checkpoint, still without its objects.
        rank: This rank; the first one commits, and deletes old checkpoints afterwards.
        snapshot: What this rank writes; None if that is nothing.
        to: Where it goes.
        report: Called in the thread when the save has ended.
        blocked_s: How long training waited, for the report.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        rank: int,
        snapshot: Snapshot | None,
        to: UploadContext,
        report: Callable[[SaveReport], None],
        blocked_s: float,
    ) -> None:
        self._manifest = manifest
        self._rank = rank
        self._key = layout.object_key(manifest.run, manifest.images, manifest.attempt, rank)
        self._snapshot = snapshot
        self._to = to
        self._report = report
        self._blocked_s = blocked_s
        self._began = time.monotonic()
        self._hashes: tuple[str, ...] = ()
        self._reported: SaveReport | None = None
        self._reporting = threading.Lock()
        self._failed = False
        self._fatal: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-upload", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it is still on its way."""
        return self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it has ended without a checkpoint."""
        return self._failed and not self.running

    def wait(self, timeout_s: float | None) -> None:
        """Wait until it has ended, or for so many seconds."""
        self._thread.join(timeout_s)

    def raise_if_fatal(self) -> None:
        """Raise what ended it, unless that was only the store or the state."""
        if self._fatal is not None and not self.running:
            raise self._fatal

    def report_failure(self, error: str) -> None:
        """Report that no checkpoint came of it, unless it was reported how it ended."""
        self._report_once(self._make_report(0, error))

    def _run(self) -> None:
        try:
            standing = self._publish()
            if standing is not None:
                self._report_once(
                    self._make_report(sum(entry.size_bytes for entry in standing.objects))
                )
                self._prune(standing)
        except (StoreError, NonFiniteState) as error:
            self._failed = True
            self.report_failure(str(error))
        except BaseException as error:
            # It is raised where the rank waits for this thread.
            self._failed, self._fatal = True, error

    def _publish(self) -> Manifest | None:
        """Write and commit; return the checkpoint that now stands on the first rank alone."""
        ranks, call = self._to.ranks, self._to.retry.call
        standing: list[Manifest] = []
        try:
            entries = ranks.gather(lambda: call(self._write))
        except CheckpointError:
            self._discard()
            raise

        def commit_if_ours(manifest: Manifest) -> Manifest:
            self._to.fence()
            return self._to.index.commit(manifest)

        def commit() -> bytes:
            manifest = replace(self._manifest, objects=self._objects(entries))
            standing.append(call(lambda: commit_if_ours(manifest)))
            return b"" if standing[0].attempt == manifest.attempt else b"another's"

        try:
            if ranks.run_on_rank0(commit):
                self._discard()  # nobody will ever commit it
        except StoreUnreachable:
            raise  # the answer may be what was lost
        except (StoreError, LeaseLost, SupersededAttempt):
            if ranks.run_on_rank0(self._ask_committed) == b"":
                self._discard()
            raise
        return standing[0] if standing else None

    def _write(self) -> bytes:
        """Write this rank's object, if it has one, and return its entry as JSON."""
        snapshot = self._snapshot
        if snapshot is None:
            return b""
        with ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hash") as pool:
            examined = pool.submit(lambda: self._hashes or snapshot.examine())
            try:
                self._to.store.put(self._key, snapshot.data)
            finally:
                self._hashes = examined.result()
        entry = ObjectEntry(
            rank=self._rank,
            key=self._key,
            size_bytes=len(snapshot.data),
            block_sha256=self._hashes,
        )
        return json.dumps(entry.to_json()).encode()

    def _objects(self, entries: Sequence[bytes]) -> tuple[ObjectEntry, ...]:
        described = self._manifest
        return tuple(
            ObjectEntry.from_json(
                parse_json(entry),
                run=described.run,
                images=described.images,
                attempt=described.attempt,
            )
            for entry in entries
            if entry
        )

    def _ask_committed(self) -> bytes:
        return b"committed" if self._to.index.is_committed(self._manifest.images) else b""

    def _prune(self, standing: Manifest) -> None:
        try:
            scores = self._to.scores() if self._to.policy.keep_best else {}
            self._to.index.prune(
                standing, policy=self._to.policy, scores=scores, in_use=self._to.in_use()
            )
        except Exception as error:
            # The save is done; what could not be deleted goes after the next one.
            logger.warning("old checkpoints are still there: %s: %s", type(error).__name__, error)

    def _report_once(self, report: SaveReport) -> None:
        """Report once; only a late success corrects that a save was given up."""
        with self._reporting:
            before = self._reported
            if before is not None and (before.error is None or report.error is not None):
                return
            self._reported = report
        self._report(report)

    def _discard(self) -> None:
        """Remove this rank's part of a save that was not committed; it may fill a disk."""
        try:
            self._to.store.delete(self._key)
        except StoreError as error:
            logger.warning("the remains of a failed save are still there: %s", error)

    def _make_report(self, size_bytes: int, error: str | None = None) -> SaveReport:
        return SaveReport(
            images=self._manifest.images,
            uri=self._to.index.uri(self._manifest.images),
            size_bytes=size_bytes,
            blocked_s=self._blocked_s,
            upload_s=time.monotonic() - self._began,
            error=error,
        )
