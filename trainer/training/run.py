"""The parts of a run on one rank, before its checkpoint is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cluster.contract import WorkerContext
from models.codec import Codec
from models.flow.flow import Flow
from trainer.autoencoder.codec import load_codec
from trainer.checkpoint.agreement import Agreement
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import paths
from trainer.config.job import JobConfig, science
from trainer.config.shapes import picture_shape
from trainer.data.loading import return_large_blocks
from trainer.data.splits import Split, open_split
from trainer.engine.compiled import check_compiler, prepare_compiler
from trainer.engine.protocol import Engine
from trainer.host_group import HostGroup
from trainer.metrics.buffer import MetricBuffer
from trainer.storage.lease import Fence, Lease
from trainer.storage.store import Store
from trainer.training.assembly import build_run_engine
from trainer.training.goodput import TimeTeller
from trainer.training.nodes import measure_all_reduce
from trainer.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one rank trains with.

    Attributes:
        context: Rank, device and the line to the driver.
        job: The configuration.
        report: Sends a message to the driver on the first rank; does nothing on the others.
        device: Where this rank computes.
        flow: The flow between noise and images.
        engine: Holds the model, freshly initialised.
        store: Where checkpoints and results are.
        fence: Tells whether the run is still this attempt's.
        ranks: How this rank agrees with the others.
        checkpoints: The run's own checkpoints.
        images: The training images.
        codec: Between images and what the flow works on.
        science: The settings that decide results, with the digests of data and codec.
        metrics: What is recorded between two points of the curves.
        times: What this rank is at, and what it spends its time on.
        origin: What the launch comes from.
        watchdog: Ends this rank where it stands still.
    """

    context: WorkerContext
    job: JobConfig
    report: Callable[[dict[str, Any]], None]
    device: torch.device
    flow: Flow
    engine: Engine
    store: Store
    fence: Fence
    ranks: HostGroup
    checkpoints: CheckpointReader
    images: Split
    codec: Codec
    science: dict[str, Any]
    metrics: MetricBuffer
    times: TimeTeller
    origin: Mapping[str, str]
    watchdog: Watchdog


def build_run(
    context: WorkerContext,
    job: JobConfig,
    payload: Mapping[str, Any],
    times: TimeTeller,
    *,
    store: Store,
    watchdog: Watchdog,
) -> Run:
    """Make the parts, and take the run from attempts of before; a collective call.

    Args:
        context: Rank, device and the line to the driver.
        job: The configuration.
        payload: See `trainer.training.worker.train_worker`.
        times: What this rank spends its time on.
        store: Where runs are kept.
        watchdog: Ends this rank where it stands still.
    """
    ranks = HostGroup()
    fence = Fence(store, Lease(**payload["lease"]), attempt=context.attempt)
    report = reporter_of(context)
    _enter(fence, ranks)
    if context.attempt == 0 and context.local_world_size < context.world_size:
        # Over a slow link it takes seconds, and the network stays.
        report({"kind": "note", "text": measure_all_reduce(context.device)})
    device = torch.device(context.device)
    if device.type == "cpu":
        return_large_blocks()
    flow, engine = Flow(job.flow), _engine(context, job, device)
    checkpoints = CheckpointReader(store, run=job.run, ranks=ranks, on_read=times.clock.show_life)
    images = open_split(job, "train")
    codec, codec_digest = load_codec(
        job.codec,
        cache=paths.cache(job),
        store=job.store,
        device=device,
        image_channels=picture_shape(job.data, job.codec).channels,
    )
    return Run(
        context=context,
        job=job,
        report=report,
        device=device,
        flow=flow,
        engine=engine,
        store=store,
        fence=fence,
        ranks=ranks,
        checkpoints=checkpoints,
        images=images,
        codec=codec,
        science=science(job, data_digest=images.digest, codec_digest=codec_digest),
        metrics=MetricBuffer(device),
        times=times,
        origin=payload.get("origin", {}),
        watchdog=watchdog,
    )


def _engine(context: WorkerContext, job: JobConfig, device: torch.device) -> Engine:
    if job.engine.compile == "blocks":
        check_compiler(device)
        prepare_compiler(paths.cache(job), ranks=context.local_world_size)
    engine = build_run_engine(job, world_size=context.world_size, device=device)
    logger.info("the model is there")
    return engine


def _enter(fence: Fence, ranks: HostGroup) -> None:
    """Take the run from attempts of before, whose workers may still live; a collective call."""

    def enter() -> bytes:
        fence.enter()
        return b""

    Agreement(ranks).run_on_rank0(enter)


def reporter_of(context: WorkerContext) -> Callable[[dict[str, Any]], None]:
    """The way of the first rank's messages to the driver; the others' go nowhere.

    Those of checkpoints tell in which attempt they were saved or read.
    """

    def report(message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if kind in ("resumed", "checkpoint"):
            context.keep(message["images"])
        if kind in ("resumed", "checkpoint", "checkpoint_failed"):
            message = {**message, "attempt": context.attempt, "rank": context.rank}
        context.report(message)

    return report if context.rank == 0 else lambda _message: None
