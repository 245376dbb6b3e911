"""Samples in a set of any size, drawn by workers; what is there when they stop is kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch

from cluster.contract import ClusterUnavailable
from cluster.failure import WorkerFailed, WorkerRefused
from cluster.launcher import run
from models.flow.sampler_config import whole_layouts
from pipelines.command import Outcome
from pipelines.console import say, visible
from pipelines.formats import format_duration
from pipelines.progress import Pace, Progress, figures_in
from trainer.cli.drawing_config import SampleConfig
from trainer.cli.worker_lines import WorkerLines
from trainer.config.reading import ConfigError, to_dict
from trainer.config.shapes import picture_shape
from trainer.evaluation.config import ModelSource, Precision
from trainer.evaluation.drawing import draw_samples
from trainer.evaluation.loading import ChosenModel, choose_model
from trainer.evaluation.precision import auto_precision, drawing_precision
from trainer.evaluation.sample_set import SamplePlan, SampleSet, WholeSet, part_size
from trainer.storage.open import open_store

logger = logging.getLogger(__name__)

_FAILED = 1
_REPORT_INTERVAL_S = 10.0


def draw_set(config: SampleConfig, count: int) -> Outcome:
    """Draw so many samples, and answer where they are; see `trainer.cli.sample.draw`."""
    chosen = choose_model(config)
    plan = _plan(config, chosen, count)
    output = config.output or str(Path("samples").absolute())
    samples = SampleSet(open_store(output, config.store), plan)
    samples.claim()
    whole = samples.whole()
    if whole is not None:
        say(visible(f"these samples are complete at {output}"))
        return _tell(whole, plan, output, chosen.uri)
    parts = samples.kept()
    if len(parts) < plan.parts:
        there = sum(part.samples for part in parts)
        try:
            _run_workers(config, plan, output, checkpoint=chosen.uri, there=there)
        except WorkerRefused:
            raise
        except (WorkerFailed, ClusterUnavailable) as error:
            again = "The parts that are drawn are kept: run the same command again to go on."
            return Outcome("", {"output": output}, _FAILED, f"{error}\n{again}")
        parts = samples.kept()
    if len(parts) < plan.parts:
        raise ConfigError(
            f"{plan.parts - len(parts)} of {plan.parts} parts are not at {output}, though they "
            "were drawn: all nodes have to share that folder; choose such a one, or s3://…"
        )
    return _tell(samples.finish(parts), plan, output, chosen.uri)


def _plan(config: SampleConfig, chosen: ChosenModel, count: int) -> SamplePlan:
    """Decide all that decides the samples, and refuse what the model cannot draw."""
    record = chosen.record
    record.check_classes(config.classes or ())
    sampler = config.sampler.over(chosen.own.sampler)
    record.check_guidance(sampler)
    record.check_shared(config.share_coarse, sampler)
    batch = whole_layouts(config.batch, config.share_coarse)
    sampler.plan(record.flow.stages)  # refuses fewer steps than segments
    picture = picture_shape(record.data, record.codec)
    sample_bytes = picture.channels * picture.size**2
    return SamplePlan(
        run=chosen.manifest.run,
        images=chosen.manifest.images,
        attempt=chosen.manifest.attempt,
        weights=config.weights,
        sampler=to_dict(sampler),
        seed=config.seed,
        batch=batch,
        classes=config.classes or tuple(range(record.shape.classes)),
        samples=count,
        part_samples=part_size(count, batch=batch, sample_bytes=sample_bytes),
        format=config.format,
        precision=_precision_of_set(config),
        share_coarse=config.share_coarse,
    )


def _precision_of_set(config: SampleConfig) -> Precision:
    """Decide it before there are workers, for it decides the samples."""
    gpus = config.cluster.gpus_per_worker
    if config.precision != "auto":
        # Of what an unknown cluster has its workers tell; what is refused here leaves no plan.
        here = config.cluster.backend == "local" and not torch.cuda.is_available()
        has_none = gpus == 0 or (gpus == "auto" and here)
        return drawing_precision(config.precision, torch.device("cpu" if has_none else "cuda"))
    found = auto_precision(is_on_gpu=torch.cuda.is_available() if gpus == "auto" else gpus > 0)
    logger.info("drawing in %s; precision=… draws in another", found)
    return found


def _run_workers(
    config: SampleConfig, plan: SamplePlan, output: str, *, checkpoint: str, there: int
) -> None:
    """Have workers draw the parts that are missing, and show how far they are."""
    cluster = config.cluster
    source = {each.name: getattr(config, each.name) for each in fields(ModelSource)}
    payload = {
        "source": to_dict(ModelSource(**{**source, "checkpoint": checkpoint})),
        "plan": to_dict(plan),
        "output": output,
    }
    drawn: dict[int, int] = {}
    with Progress(
        "drawing samples",
        plan.samples,
        report=partial(logger.info, "%s"),
        line=_line,
        figures=figures_in("images"),
        every_s=_REPORT_INTERVAL_S,
        last=False,
    ) as progress:
        if there:
            logger.info("going on: %d of %d images are there", there, plan.samples)
            progress.add(there, fresh=False)

        def tell(line: str) -> None:
            say(visible(line))

        def hear(message: Mapping[str, Any]) -> None:
            if message.get("kind") == "drawn":
                part, images = int(message["part"]), int(message["images"])
                # After a failure a part may be drawn again from its beginning.
                progress.add(images - drawn.get(part, 0))
                drawn[part] = images

        run(
            cluster,
            draw_samples,
            payload,
            on_message=hear,
            stop=Event(),
            report=tell,
            listener=WorkerLines(tell),
            fewer=dict.fromkeys(range(cluster.min_workers or cluster.workers, cluster.workers), 1),
        )


def _line(pace: Pace) -> str:
    done = f"{pace.done:.0f} of {pace.total:.0f} images are drawn"
    if not pace.rate:
        return done
    return f"{done}, {pace.rate:,.1f} a second, ETA {format_duration(pace.left_s)}"


def _tell(whole: WholeSet, plan: SamplePlan, output: str, checkpoint: str) -> Outcome:
    """Say where the samples are, and how they were drawn."""
    sampler = plan.sampler
    evaluations = sum(whole.segment_evaluations)
    steps = "" if sampler["solver"] == "dopri5" else f" {sampler['steps']} steps"
    scale, interval = sampler["guidance_scale"], sampler["guidance_interval"]
    guidance = "no guidance" if scale == 1 else f"guidance {scale:g}"
    if scale != 1 and interval is not None:
        guidance += f" in [{interval[0]:g}, {interval[1]:g}]"
    layouts = f", {plan.share_coarse} of each layout" if plan.share_coarse > 1 else ""
    return Outcome(
        f"{output}\n{plan.samples:,} samples of {len(plan.classes):,} classes: {sampler['solver']}"
        f"{steps}, {guidance}, {evaluations:g} network evaluations each, in {plan.precision}"
        f"{layouts}",
        {
            "output": output,
            "checkpoint": checkpoint,
            "weights": plan.weights,
            "classes": plan.classes,
            "images": plan.samples,
            "format": plan.format,
            "precision": plan.precision,
            "share_coarse": plan.share_coarse,
            "sampler": sampler,
            "network_evaluations": evaluations,
            "segment_evaluations": whole.segment_evaluations,
        },
    )
