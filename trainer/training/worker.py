"""One worker, from configuration to a trained and evaluated model: the page to read first.

Every rank runs this page. The cluster has made the process group. `_train` is the run from start
to end: what it is made of, where it goes on, its parts, the loop, the last save, the evaluation.
Making an engine or a `HostGroup` is a collective call, and so is reading or saving a checkpoint:
all ranks must come to these in the order in which they are written here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cluster.contract import WorkerContext
from models.codec import Codec
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
from trainer.data.loading import return_large_blocks, training_loader
from trainer.data.splits import Split, open_split
from trainer.engine.build import build_engine
from trainer.engine.protocol import Engine
from trainer.errors import is_user_error
from trainer.evaluation.final import FinalEvaluation, Publisher
from trainer.evaluation.reference import EvalReference
from trainer.evaluation.reports import frechet_scores
from trainer.evaluation.samples import ImageSampler
from trainer.host_group import HostGroup
from trainer.log_lines import forward_logs
from trainer.metrics.buffer import MetricBuffer
from trainer.metrics.tracker import Tracker
from trainer.planning.placing import resolve_placement
from trainer.state import TrainState
from trainer.storage.open import open_store, set_environment
from trainer.storage.store import Store
from trainer.training.hooks import Hook, LossWatch, PeriodicSave, Progress, SampleGrids, Throughput
from trainer.training.loop import LoopEnd, StopVote, train
from trainer.training.resume import Restored, restore
from trainer.training.step import TrainStep
from trainer.training.tracking import CheckpointReporter, track_run

logger = logging.getLogger(__name__)


def train_worker(context: WorkerContext, payload: Mapping[str, Any]) -> None:
    """Train one rank's part of the job to its end, an agreed stop, or an error.

    Args:
        context: Rank, device and the line to the driver.
        payload: The job's configuration as plain values.
    """
    try:
        with forward_logs(context.report, rank=context.rank):
            logger.info("%d of %d workers have met", context.world_size, context.world_size)
            _train(context, from_dict(JobConfig, payload))
    except ValueError as error:
        if is_user_error(error):
            raise
        # The cluster takes a ValueError for a refusal, which is neither retried nor traced.
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _train(context: WorkerContext, job: JobConfig) -> None:
    run = _build_run(context, job)
    restored = _restore(run)
    state = restored.state
    with _open_tracker(run, restored) as tracker:
        watch = _loss_watch(run)
        step = _train_step(run, watch)
        evaluation = _final_evaluation(run)
        saver = _checkpoint_saver(run, tracker, restored)
        save = partial(_save, run, state, watch=watch, saver=saver, tracker=tracker)
        hooks = _hooks(run, state, watch=watch, save=save, evaluation=evaluation, tracker=tracker)
        try:
            saver.prepare(run.engine.fragments(), science=run.science)
            end = _loop(run, state, step=step, hooks=hooks)
            if end == "stopped":
                saver.set_deadline(job.checkpoint.grace_s)
            if state.images > 0 and not saver.is_saved(state.images):
                save(last=True)
            saver.finish()
            if end == "finished" and saver.is_saved(state.images):
                evaluation.run(run.engine, _publisher(run, state, tracker))
        except BaseException:
            saver.leave(job.checkpoint.grace_s)
            raise
        tracker.close("FINISHED" if end == "finished" else "KILLED")
        run.report({"kind": "end", "end": end, "images": state.images})


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is made of on one rank, before its checkpoint is read.

    Attributes:
        context: Rank, device and the line to the driver.
        job: The configuration.
        report: Sends a message to the driver on the first rank; does nothing on the others.
        device: Where this rank computes.
        flow: The flow between noise and images.
        engine: Holds the model, freshly initialised.
        store: Where checkpoints and results are.
        ranks: How this rank agrees with the others.
        checkpoints: The run's own checkpoints.
        images: The training images.
        codec: Between images and what the flow works on.
        science: The settings that decide results, with the digests of data and codec.
        metrics: What is recorded between two points of the curves.
    """

    context: WorkerContext
    job: JobConfig
    report: Callable[[dict[str, Any]], None]
    device: torch.device
    flow: Flow
    engine: Engine
    store: Store
    ranks: HostGroup
    checkpoints: CheckpointReader
    images: Split
    codec: Codec
    science: dict[str, Any]
    metrics: MetricBuffer


def _build_run(context: WorkerContext, job: JobConfig) -> Run:
    set_environment(job.store)
    device = torch.device(context.device)
    if device.type == "cpu":
        return_large_blocks()
    flow = Flow(job.flow)
    engine = build_run_engine(job, world_size=context.world_size, device=device)
    logger.info("the model is there")
    store = open_store(paths.runs_uri(job), job.store)
    ranks = HostGroup()
    checkpoints = CheckpointReader(store, run=job.run, ranks=ranks)
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
        report=context.report if context.rank == 0 else lambda _message: None,
        device=device,
        flow=flow,
        engine=engine,
        store=store,
        ranks=ranks,
        checkpoints=checkpoints,
        images=images,
        codec=codec,
        science=science(job, data_digest=images.digest, codec_digest=codec_digest),
        metrics=MetricBuffer(device),
    )


def build_run_engine(job: JobConfig, *, world_size: int, device: torch.device) -> Engine:
    """Build the engine of a run with its initial weights; a collective call."""
    return build_engine(
        lambda on_built: initial_model(job, on_built),
        config=job.engine,
        placement=resolve_placement(job),
        optim=job.optim,
        micro_batch=micro_batch(job),
        rank_batch=job.train.global_batch // world_size,
        world_size=world_size,
        device=device,
    )


def initial_model(job: JobConfig, on_built: OnBuilt = no_op) -> LapFlowTransformer:
    """Build the model with the initial weights that the run's seed decides, alike on all ranks.

    Args:
        job: The configuration.
        on_built: What is done with each part of the model as soon as it is built.
    """
    shape = flow_shape(job.data, job.codec)
    torch.manual_seed(rng.derive_seed(job.train.seed, "weights"))
    return LapFlowTransformer(
        job.model,
        scales=job.flow.scales,
        channels=shape.channels,
        image_size=shape.size,
        classes=shape.classes,
        on_built=on_built,
    )


def _restore(run: Run) -> Restored:
    return restore(
        run.job,
        run.science,
        engine=run.engine,
        metrics=run.metrics,
        checkpoints=run.checkpoints,
        ranks=run.ranks,
        report=run.report,
    )


def _open_tracker(run: Run, restored: Restored) -> AbstractContextManager[Tracker]:
    if run.context.rank > 0:
        return nullcontext(Tracker())
    return track_run(run.job, run.science, unsent=restored.unsent, report=run.report)


def _loss_watch(run: Run) -> LossWatch:
    return LossWatch(
        run.device,
        interval_images=run.job.runtime.log_interval_images,
        total_images=run.job.train.total_images,
        patience_updates=run.job.train.max_skipped_updates,
        optim=run.job.optim,
        precision=run.job.engine.precision,
    )


def _train_step(run: Run, watch: LossWatch) -> TrainStep:
    shape = flow_shape(run.job.data, run.job.codec)
    return TrainStep(
        engine=run.engine,
        objective=Objective(run.flow),
        config=run.job.train,
        optim=run.job.optim,
        metrics=run.metrics,
        noise_size=run.flow.noise_size(channels=shape.channels, image_size=shape.size),
        null_label=shape.classes,
        micro_batch=micro_batch(run.job),
        device=run.device,
        watch=watch,
        encoder=run.codec if encodes(run.job) else None,
    )


def _final_evaluation(run: Run) -> FinalEvaluation:
    config = run.job.eval
    return FinalEvaluation(
        config=config,
        image_sampler=ImageSampler(
            flow=run.flow,
            sampler=config.sampler,
            shape=flow_shape(run.job.data, run.job.codec),
            codec=run.codec,
            seed=config.seed,
            batch=config.batch,
            device=run.device,
        ),
        ranks=HostGroup(),
        reference=EvalReference(
            job=run.job,
            context=run.context,
            trained_on=run.images.digest,
            features=(config.features.name,),
            inception_weights=config.features.inception_weights,
            batch=config.batch,
        ),
    )


def _checkpoint_saver(run: Run, tracker: Tracker, restored: Restored) -> CheckpointSaver:
    job = run.job
    return CheckpointSaver(
        run.store,
        index=run.checkpoints.index,
        config=job.checkpoint,
        ranks=run.ranks,
        aside=HostGroup(),
        report=CheckpointReporter(tracker, run.report),
        scores=lambda: frechet_scores(run.store, run=job.run, features=job.eval.features.name),
        position=restored.position,
        stop_requested=run.context.stop_requested,
    )


def _save(
    run: Run,
    state: TrainState,
    *,
    watch: LossWatch,
    saver: CheckpointSaver,
    tracker: Tracker,
    last: bool = False,
) -> None:
    """Save the run as it is now, unless that is no state to keep; a collective call."""
    if watch.is_diverging():
        text = f"{state.images:,} images: the loss is not finite, so nothing is saved"
        run.report({"kind": "warning", "text": text})
        return
    saver.save(
        images=state.images,
        fragments=run.engine.fragments(),
        train_state={
            **state.to_dict(),
            "metrics": run.metrics.state(),
            "unsent_points": [point.to_json() for point in tracker.unsent()],
        },
        science=run.science,
        config_fingerprint=config_fingerprint(run.science),
        last=last,
    )


def _hooks(
    run: Run,
    state: TrainState,
    *,
    watch: LossWatch,
    save: Callable[[], object],
    evaluation: FinalEvaluation,
    tracker: Tracker,
) -> list[Hook]:
    """Make the hooks in the order in which they are called: a save comes after the watch."""
    job, rank = run.job, run.context.rank
    throughput = Throughput(state.images)
    return [
        Progress(
            metrics=run.metrics,
            tracker=tracker,
            report=run.report,
            interval_images=job.runtime.log_interval_images,
            total_images=job.train.total_images,
            throughput=throughput,
            rank=rank,
        ),
        watch,
        PeriodicSave(save, interval_images=job.checkpoint.interval_images),
        SampleGrids(
            engine=run.engine,
            sample=evaluation.sample_grid,
            tracker=tracker,
            interval_images=job.eval.grid_interval_images,
            columns=job.eval.grid_columns,
            rank=rank,
            pause=throughput.pause,
        ),
    ]


def _loop(run: Run, state: TrainState, *, step: TrainStep, hooks: list[Hook]) -> LoopEnd:
    with training_loader(run.job, run.images, run.context, codec=run.codec) as loader:
        return train(
            state,
            loader=loader,
            step=step,
            hooks=hooks,
            stop=StopVote(run.context.stop_requested),
            total_images=run.job.train.total_images,
            rank=run.context.rank,
        )


def _publisher(run: Run, state: TrainState, tracker: Tracker) -> Publisher:
    return Publisher(
        store=run.store,
        run=run.job.run,
        images=state.images,
        attempt=lambda: run.checkpoints.index.examine(state.images).attempt,
        tracker=tracker,
        report=run.report,
    )
