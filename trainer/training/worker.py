"""One worker, from configuration to a trained and evaluated model: the page to read first.

Every rank runs this page. The cluster has made the process group. `_train` is the run from start
to end: what it is made of, where it goes on, its parts, the loop, the last save, the evaluation.
Making an engine or a `HostGroup` is a collective call, and so is reading or saving a checkpoint:
all ranks must come to these in the order in which they are written here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from cluster.contract import WorkerContext
from models.flow.objective import Objective
from pipelines.errors import PassingFaultError
from trainer.checkpoint.saver import CheckpointSaver
from trainer.checkpoint.upload import SaveReport
from trainer.config import paths
from trainer.config.job import JobConfig, micro_batch, with_workers
from trainer.config.reading import from_dict
from trainer.config.shapes import encodes, flow_shape
from trainer.data.loading import training_loader
from trainer.engine.compiled import CompileReport
from trainer.errors import is_user_error
from trainer.evaluation.during import MeasuredCheckpoints
from trainer.evaluation.final import FinalEvaluation, Publisher, final_evaluation
from trainer.evaluation.reports import frechet_scores
from trainer.host_group import HostGroup
from trainer.log_lines import forward_logs
from trainer.metrics.node_use import NodeUse
from trainer.metrics.tracker import Tracker
from trainer.planning.placing import model_shape
from trainer.state import TrainState
from trainer.storage.open import open_store, set_environment
from trainer.storage.store import Store
from trainer.training.evaluating import Evaluations, evaluations_of
from trainer.training.goodput import TimeTeller
from trainer.training.goodput_curve import draw_goodput
from trainer.training.hooks import Hook, LossWatch, PeriodicSave, Progress, SampleGrids
from trainer.training.loop import LoopEnd, StopVote, train
from trainer.training.phases import PhaseClock
from trainer.training.profiling import Profile, profile_folder
from trainer.training.resume import Restored, restore
from trainer.training.run import Run, build_run, reporter_of
from trainer.training.speed import Load, Throughput
from trainer.training.step import TrainStep
from trainer.training.tracking import CheckpointReporter, track_run
from trainer.training.watchdog import Watchdog, hang_key, watch

logger = logging.getLogger(__name__)


def train_worker(context: WorkerContext, payload: Mapping[str, Any]) -> None:
    """Train one rank's part of the job to its end, an agreed stop, or an error.

    Args:
        context: Rank, device and the line to the driver.
        payload: The job's configuration ("job"), the launch's hold on the run ("lease") and what
            the launch comes from ("origin"), if that is known, as plain values.
    """
    clock = PhaseClock()
    try:
        with forward_logs(context.log, heard=clock.show_life):
            logger.info("%d of %d workers have met", context.world_size, context.world_size)
            times = TimeTeller(clock, reporter_of(context), attempt=context.attempt)
            times.tell(0)
            # An elastic job has as many workers as there is room for.
            job = with_workers(from_dict(JobConfig, payload["job"]), context.world_size)
            set_environment(job.store)
            store = open_store(paths.runs_uri(job), job.store)
            with _watch(context, job, store, clock) as watchdog:
                watchdog.be_patient(context.rank > 0)
                _train(build_run(context, job, payload, times, store=store, watchdog=watchdog))
    except ValueError as error:
        # A store that is out of reach or a full disk is a mistake only until training works.
        has_trained = context.attempt > 0 or clock.sight().phase != "start"
        if is_user_error(error) and not (has_trained and isinstance(error, PassingFaultError)):
            raise
        # The cluster takes a ValueError for a refusal, which is neither retried nor traced.
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _train(run: Run) -> None:
    job = run.job
    restored = _restore(run)
    state = restored.state
    with _open_tracker(run, restored) as tracker:
        watch = _loss_watch(run)
        step = _train_step(run, watch)
        evaluation = final_evaluation(
            job, run.context, run.flow, run.codec, device=run.device, trained_on=run.images.digest
        )
        throughput, launch = Throughput(state.images), run.fence.lease.token
        during = evaluations_of(
            job,
            run.context,
            final=evaluation,
            engine=run.engine,
            known=MeasuredCheckpoints(
                *(run.store, job.run, job.eval, tracker, run.report, launch),
                engine=job.engine,
            ),
            pause=partial(_leave_out, run, throughput),
        )
        saver = _checkpoint_saver(run, tracker, restored, during)
        save = partial(_save, run, restored, step=step, watch=watch, saver=saver, tracker=tracker)
        grids = _sample_grids(run, throughput, evaluation, tracker)
        hooks = _hooks(run, throughput, watch, save, during=during, grids=grids, tracker=tracker)
        profile = _profile(run, throughput, tracker)
        try:
            saver.prepare(run.engine.fragments(), science=run.science)
            during.catch_up(restored.position)
            grids.begin(state.images)
            with _draw_goodput(run, tracker):
                end = _loop(run, state, step=step, hooks=hooks, profile=profile)
            run.watchdog.be_patient(run.context.rank > 0)
            if end == "stopped":
                saver.set_deadline(_grace_s(run))
            if state.images > 0 and not saver.is_saved(state.images):
                save(last=True)
            with run.times.clock.during("checkpoint"):
                saver.finish()
            profile.drop()  # only now: until a stopped run is saved, its time is short
            if end == "finished" and saver.is_saved(state.images):
                with run.times.clock.during("evaluation"):
                    evaluation.run(run.engine, _publisher(run, state, tracker))
            during.close(is_finished=end == "finished")
        except BaseException:
            saver.leave(job.checkpoint.grace_s)
            during.close(is_finished=False)  # what was measured of that save is told
            raise
        run.watchdog.be_patient(True)  # the tracker bounds its end itself
        tracker.close("FINISHED" if end == "finished" else "KILLED")
        if end == "finished":
            run.context.complete()
        run.times.tell(state.images)
        run.report({"kind": "end", "end": end, "images": state.images})


def _grace_s(run: Run) -> float:
    """What a last save may take, on every rank: less where a node is being taken away."""
    left = run.context.grace_s()
    configured = run.job.checkpoint.grace_s
    return configured if left is None else min(configured, left)


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
    return track_run(
        run.job,
        run.science,
        restored=restored,
        store=run.store,
        writer=run.fence.number,
        images=run.images,
        origin=run.origin,
        device=run.device,
        report=run.report,
    )


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


def _checkpoint_saver(
    run: Run, tracker: Tracker, restored: Restored, during: Evaluations
) -> CheckpointSaver:
    job = run.job
    tell = CheckpointReporter(tracker, run.report)

    def report(saved: SaveReport) -> None:
        tell(saved)
        during.saved(saved)

    return CheckpointSaver(
        run.store,
        index=run.checkpoints.index,
        config=job.checkpoint,
        ranks=run.ranks,
        aside=HostGroup(),
        report=report,
        scores=lambda: frechet_scores(run.store, run=job.run, features=job.eval.features.name),
        in_use=during.in_use,
        position=restored.position,
        stop_requested=run.context.stop_requested,
        fence=run.fence.check,
    )


def _save(
    run: Run,
    restored: Restored,
    *,
    step: TrainStep,
    watch: LossWatch,
    saver: CheckpointSaver,
    tracker: Tracker,
    last: bool = False,
) -> bool:
    """Begin to save the run as it is, or tell that this is no state to keep; a collective call."""
    step.settle()
    state = restored.state
    why = "the loss is not finite" if watch.is_diverging() else ""
    if not (last or why) and watch.is_skipping():
        why = "updates are skipped, as gradients are not finite"
    if why:
        text = f"{state.images:,} images: {why}, so nothing is saved"
        run.report({"kind": "warning", "text": text})
        return False
    # What is trained from here on is lost if the run goes on from this checkpoint.
    run.times.tell(state.images)
    with run.times.clock.during("checkpoint"):
        return saver.save(
            images=state.images,
            fragments=run.engine.fragments(),
            train_state={
                **state.to_dict(),
                "metrics": run.metrics.state(),
                "unsent_points": [point.to_json() for point in tracker.unsent()],
            },
            science=run.science,
            config_fingerprint=restored.fingerprint,
            last=last,
        )


@contextmanager
def _leave_out(run: Run, throughput: Throughput) -> Iterator[None]:
    """Count the time of a `with` block as evaluation, and not as training."""
    evaluation = run.times.clock.during("evaluation")
    # The first rank alone tells how drawing gets on, and the others wait for it in every block.
    with throughput.pause(), evaluation, run.watchdog.patient(run.context.rank > 0):
        yield


def _sample_grids(
    run: Run, throughput: Throughput, evaluation: FinalEvaluation, tracker: Tracker
) -> SampleGrids:
    config = run.job.eval
    return SampleGrids(
        engine=run.engine,
        sample=evaluation.sample_grid,
        tracker=tracker,
        interval_images=config.grid_interval_images,
        columns=config.grid_columns,
        rank=run.context.rank,
        pause=partial(_leave_out, run, throughput),
    )


def _profile(run: Run, throughput: Throughput, tracker: Tracker) -> Profile:
    return Profile(
        run.job.runtime.profiled_updates,
        store=run.store,
        folder=lambda images: profile_folder(
            run.job.run, images=images, attempt=run.context.attempt
        ),
        ranks=run.ranks,
        tracker=tracker,
        report=run.report,
        pause=partial(_leave_out, run, throughput),
    )


def _hooks(
    run: Run,
    throughput: Throughput,
    watch: LossWatch,
    save: Callable[[], bool],
    *,
    during: Evaluations,
    grids: SampleGrids,
    tracker: Tracker,
) -> list[Hook]:
    """Make the hooks in the order in which they are called: a save comes after the watch."""
    job, rank = run.job, run.context.rank
    return [
        run.times,
        *([CompileReport(rank=rank)] if job.engine.compile == "blocks" else []),
        Progress(
            metrics=run.metrics,
            tracker=tracker,
            report=run.report,
            interval_images=job.runtime.log_interval_images,
            total_images=job.train.total_images,
            throughput=throughput,
            load=Load.of(model_shape(job), devices=run.context.world_size, device=run.device),
            rank=rank,
            node=NodeUse(
                rank=rank,
                local_rank=run.context.local_rank,
                world_size=run.context.world_size,
                device=run.device,
            ),
        ),
        watch,
        PeriodicSave(
            save,
            intervals_images=(job.checkpoint.interval_images, job.eval.during.every_images),
            after_save=during.after_save,
        ),
        grids,
    ]


def _loop(
    run: Run, state: TrainState, *, step: TrainStep, hooks: list[Hook], profile: Profile
) -> LoopEnd:
    job, watchdog = run.job, run.watchdog
    watchdog.images = state.images
    watchdog.be_patient(False)
    with training_loader(job, run.images, run.context, codec=run.codec) as loader:
        profile.begin()
        end = train(
            state,
            loader=loader,
            step=step,
            hooks=[*hooks, *([watchdog] if job.runtime.hang_s else []), profile],
            stop=StopVote(run.context.stop_requested),
            total_images=job.train.total_images,
            rank=run.context.rank,
            advance=run.context.advance,
        )
        if end == "finished":
            profile.end(state.images)
        return end


def _draw_goodput(run: Run, tracker: Tracker) -> AbstractContextManager[None]:
    if run.context.rank > 0:
        return nullcontext()
    return draw_goodput(tracker, run.store, run.fence.lease)


def _watch(
    context: WorkerContext, job: JobConfig, store: Store, clock: PhaseClock
) -> AbstractContextManager[Watchdog]:
    """Watch this thread for the length of a `with` block."""
    return watch(
        clock,
        job.runtime,
        store,
        key=lambda images: hang_key(
            job.run, images=images, attempt=context.attempt, rank=context.rank
        ),
        # The loader may ask for a file for so long, and a try consists of up to three requests.
        patience_s=job.shards.download_patience_s + 3 * job.shards.download_timeout_s,
        saving_s=job.checkpoint.patience_s,
        end=context.end,
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
