"""The training loop: batches in, updates out, hooks alongside, until the images are done."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal

from pipelines.batch import Batch, Cursor
from pipelines.loader import Loader
from trainer.hooks import Hook, UpdateReport
from trainer.state import TrainState
from trainer.step import TrainStep
from trainer.stop_vote import StopVote

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
        outcome = step(batch, state, first_image=before + rank * len(batch.labels))
        if first:
            logger.info("the first update is done; training")
        first = False
        state.images = cursor.images
        state.updates += outcome.applied
        state.skipped_updates += not outcome.applied
        report = UpdateReport(
            images_before=before,
            images=state.images,
            updates=state.updates,
            waited_s=loader.data_wait_s,
        )
        for hook in hooks:
            hook.after_update(report)
        if state.images >= total_images:
            break
        if stop():
            return "stopped"
    stop.finish()
    return "finished"
