"""The training loop: batches in, updates out, until the images are done or all ranks stop.

A stop request reaches ranks at different moments. The vote of one update is started without
waiting and read after the next, over a process group of the host: it costs the step nothing and
never synchronises with the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.distributed as dist

from cluster.process_group import prove_peers
from pipelines.loading.loader import Batch, Cursor, Loader
from trainer.log_lines import FIRST_UPDATE
from trainer.state import TrainState
from trainer.training.hooks import Hook, UpdateReport
from trainer.training.step import TrainStep


class StopVote:
    """Asks every rank once per update; all get the same answer.

    Args:
        requested: Tells whether this rank was asked to stop.
    """

    def __init__(self, requested: Callable[[], bool]) -> None:
        self._requested = requested
        self._group = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
            prove_peers()
        self._flag = torch.zeros(1)
        self._pending: dist.Work | None = None

    def __call__(self) -> bool:
        """Return whether any rank wanted to stop one update ago, and start the next vote."""
        if self._group is None:
            return self._requested()
        agreed = False
        if self._pending is not None:
            self._pending.wait()
            agreed = bool(self._flag.item())
        if not agreed:
            self._flag = torch.tensor([float(self._requested())])
            self._pending = dist.all_reduce(
                self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
            )
        return agreed

    def finish(self) -> None:
        """Complete the vote under way, so that no collective outlives the loop."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None


logger = logging.getLogger(__name__)

LoopEnd = Literal["finished", "stopped"]


def train(
    state: TrainState,
    *,
    loader: Loader,
    step: TrainStep,
    hooks: Sequence[Hook],
    stop: StopVote,
    total_images: int,
    rank: int,
    advance: Callable[[int], None],
) -> LoopEnd:
    """Train from `state` to the end of the run or to an agreed stop.

    Args:
        state: The run's counters; advanced in place, so a checkpoint hook sees them up to date.
        loader: Source of batches from any position.
        step: One update.
        hooks: Called after each update, in order, on every rank.
        stop: The ranks' agreement to stop.
        total_images: Length of the run.
        rank: This rank; it takes the rank-th contiguous slice of each global batch.
        advance: Takes how many images are trained, after each update.

    Returns:
        "finished" when all images were seen, "stopped" when the ranks agreed to stop.
    """
    if state.images >= total_images:
        return "finished"
    logger.info("waiting for the first batch")
    batches: Iterator[tuple[Batch, Cursor]] = loader.batches(Cursor(images=state.images))
    first = True
    for batch, cursor in batches:
        before = state.images
        if first:
            logger.info("the first batch is there; the first update takes longer than others")
        step(batch, state, first_image=before + rank * len(batch.labels))
        if first:
            step.settle()  # so that it is done when that is said
            logger.info(FIRST_UPDATE)
        first = False
        state.images = cursor.images
        advance(state.images)
        report = UpdateReport(
            images_before=before,
            images=state.images,
            waited_s=loader.data_wait_s,
        )
        for hook in hooks:
            hook.after_update(report)
        if state.images >= total_images:
            break
        if stop():
            step.settle()
            return "stopped"
    step.settle()
    step.check_applied()
    stop.finish()
    return "finished"
