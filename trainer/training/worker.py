"""One worker, from configuration to a trained and evaluated model: the page to read first.

Every rank runs this page. The cluster has made the process group; what is assembled here is the
model, the objective, the engine, the data, the state, the hooks and the loop, in that order.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch

from cluster.contract import WorkerContext
from models.flow.flow import Flow
from models.flow.objective import Objective
from models.transformer.lapflow import LapFlowTransformer, OnBuilt, no_op
from trainer import rng
from trainer.autoencoder.codec import load_codec
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.saver import CheckpointSaver
from trainer.config import paths
from trainer.config.job import JobConfig, config_fingerprint, micro_batch, science
from trainer.config.reading import from_dict
from trainer.config.shapes import encodes, flow_shape, picture_shape
from trainer.data.loading import training_loader
from trainer.data.splits import open_split
from trainer.engine.build import build_engine
from trainer.errors import is_user_error
from trainer.evaluation.final import FinalEvaluation, Publisher
from trainer.evaluation.measured import frechet_scores
from trainer.evaluation.real_images import RealImages
from trainer.evaluation.samples import ImageSampler
from trainer.host_group import HostGroup
from trainer.log_lines import forward_logs
from trainer.metrics.buffer import MetricBuffer
from trainer.metrics.tracker import SilentTracker, Tracker
from trainer.planning.placing import resolve_placement
from trainer.storage.open import open_store, set_environment
from trainer.training.divergence import LossWatch
from trainer.training.hooks import Hook, PeriodicSave, SampleGrids
from trainer.training.loop import StopVote, train
from trainer.training.progress import Progress, Throughput
from trainer.training.resume import restore
from trainer.training.step import TrainStep
from trainer.training.tracking import CheckpointReporter, tracked_run

_M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h
_LIMIT_BYTES = 4 << 20


def return_large_blocks() -> None:
    """Have blocks from 4 MiB on go back to the system when they are freed.

    glibc raises that limit, up to 32 MiB, each time such a block is freed, and from then on takes
    blocks below it from the heap, which batches of images cut into pieces: the memory of a loader
    that decodes on the host doubled over 12,000 images (docs/benchmarks.md). Other C libraries do
    not know the setting and need none. MALLOC_MMAP_THRESHOLD_ in the environment goes first.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LIMIT_BYTES)


logger = logging.getLogger(__name__)


def train_worker(context: WorkerContext, payload: Mapping[str, Any]) -> None:
    """Train one rank's part of the job to its end, an agreed stop, or an error.

    Args:
        context: Rank, device and the line to the driver.
        payload: The job's configuration as plain values.
    """
    try:
        with forward_logs(context.tell, rank=context.rank):
            logger.info("%d of %d workers have met", context.world_size, context.world_size)
            _train(context, from_dict(JobConfig, payload))
    except ValueError as error:
        if is_user_error(error):
            raise
        # The cluster takes a ValueError for a refusal, which is neither retried nor traced.
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _train(context: WorkerContext, job: JobConfig) -> None:
    tell = context.tell if context.rank == 0 else _keep_quiet
    set_environment(job.store)
    device = torch.device(context.device)
    if device.type == "cpu":
        return_large_blocks()

    flow = Flow(job.flow)
    engine = build_engine(
        lambda on_built: initial_model(job, on_built),
        config=job.engine,
        placement=resolve_placement(job),
        optim=job.optim,
        micro_batch=micro_batch(job),
        rank_batch=job.train.global_batch // context.world_size,
        world_size=context.world_size,
        device=device,
    )

    logger.info("the model is there")
    store = open_store(paths.runs_uri(job), job.store)
    ranks = HostGroup()
    checkpoints = CheckpointReader(store, run=job.run, ranks=ranks)
    images = open_split(job, "train")
    shape = flow_shape(job.data, job.codec)
    codec, codec_digest = load_codec(
        job.codec,
        cache=paths.cache(job),
        store=job.store,
        device=device,
        image_channels=picture_shape(job.data, job.codec).channels,
    )
    chosen = science(job, data_digest=images.digest, codec_digest=codec_digest)
    metrics = MetricBuffer(device)
    restored = restore(
        job,
        chosen,
        engine=engine,
        metrics=metrics,
        checkpoints=checkpoints,
        ranks=ranks,
        tell=tell,
    )
    state = restored.state
    with ExitStack() as block:
        tracker: Tracker = SilentTracker()
        if context.rank == 0:
            tracker = block.enter_context(
                tracked_run(job, chosen, unsent=restored.unsent, tell=context.tell)
            )
        watch = LossWatch(
            device,
            interval_images=job.runtime.log_interval_images,
            total_images=job.train.total_images,
            patience_updates=job.train.max_skipped_updates,
            optim=job.optim,
            precision=job.engine.precision,
        )
        step = TrainStep(
            engine=engine,
            objective=Objective(flow),
            config=job.train,
            optim=job.optim,
            metrics=metrics,
            noise_size=flow.noise_size(channels=shape.channels, image_size=shape.size),
            null_label=shape.classes,
            micro_batch=micro_batch(job),
            device=device,
            watch=watch,
            encoder=codec if encodes(job) else None,
        )
        evaluation = FinalEvaluation(
            config=job.eval,
            image_sampler=ImageSampler(
                flow=flow,
                sampler=job.eval.sampler,
                shape=shape,
                codec=codec,
                seed=job.eval.seed,
                batch=job.eval.batch,
                device=device,
            ),
            ranks=HostGroup(),
            held_out=RealImages(job, "test", context),
            train=RealImages(job, "train", context),
        )

        saver = CheckpointSaver(
            store,
            index=checkpoints.index,
            config=job.checkpoint,
            ranks=ranks,
            aside=HostGroup(),
            report=CheckpointReporter(tracker, tell),
            scores=lambda: frechet_scores(store, run=job.run, features=job.eval.features.name),
            position=restored.position,
            stop_requested=context.stop_requested,
        )

        def save(*, last: bool = False) -> None:
            if watch.has_lost():
                text = f"{state.images:,} images: the loss is not finite, so nothing is saved"
                tell({"kind": "warning", "text": text})
                return
            saver.save(
                images=state.images,
                fragments=engine.fragments(),
                train_state={
                    **state.to_dict(),
                    "metrics": metrics.state(),
                    "unsent_points": [point.to_json() for point in tracker.unsent()],
                },
                science=chosen,
                config_fingerprint=config_fingerprint(chosen),
                last=last,
            )

        throughput = Throughput(state.images)
        hooks: list[Hook] = [
            Progress(
                metrics=metrics,
                tracker=tracker,
                tell=tell,
                interval_images=job.runtime.log_interval_images,
                total_images=job.train.total_images,
                throughput=throughput,
                rank=context.rank,
            ),
            watch,
            PeriodicSave(save, interval_images=job.checkpoint.interval_images),
            SampleGrids(
                engine=engine,
                sample=evaluation.sample_grid,
                tracker=tracker,
                interval_images=job.eval.grid_interval_images,
                columns=job.eval.grid_columns,
                rank=context.rank,
                interrupted=throughput.interrupted,
            ),
        ]
        try:
            saver.prepare(engine.fragments(), science=chosen)
            with training_loader(job, images, context, codec=codec) as loader:
                end = train(
                    state,
                    loader=loader,
                    step=step,
                    hooks=hooks,
                    stop=StopVote(context.stop_requested),
                    total_images=job.train.total_images,
                    rank=context.rank,
                )
            if end == "stopped":
                saver.set_deadline(job.checkpoint.grace_s)
            if state.images > 0 and not saver.is_saved(state.images):
                save(last=True)
            saver.finish()
            if end == "finished" and saver.is_saved(state.images):
                results = Publisher(
                    store=store,
                    run=job.run,
                    images=state.images,
                    attempt=lambda: checkpoints.index.examine(state.images).attempt,
                    tracker=tracker,
                    tell=tell,
                )
                evaluation.run(engine, results)
        except BaseException:
            saver.leave(job.checkpoint.grace_s)
            raise
        tracker.close("FINISHED" if end == "finished" else "KILLED")
        tell({"kind": "end", "end": end, "images": state.images})


def initial_model(job: JobConfig, on_built: OnBuilt = no_op) -> LapFlowTransformer:
    """Build the model with the initial weights that the run's seed decides, alike on all ranks.

    Args:
        job: The configuration.
        on_built: What is done with each part of the model as soon as it is built.
    """
    shape = flow_shape(job.data, job.codec)
    torch.manual_seed(rng.derived_seed(job.train.seed, "weights"))
    return LapFlowTransformer(
        job.model,
        scales=job.flow.scales,
        channels=shape.channels,
        image_size=shape.size,
        classes=shape.classes,
        on_built=on_built,
    )


def _keep_quiet(_message: dict[str, Any]) -> None:
    """Stand in for the line to the driver on every rank but the first."""
