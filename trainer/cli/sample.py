"""The command that draws samples from any checkpoint: a grid, or a set of any size."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from cluster.contract import ClusterConfig, ClusterUnavailable
from cluster.failure import WorkerFailed, WorkerRefused
from cluster.launcher import run
from models.flow.sampler_config import whole_layouts
from pipelines.command import Outcome
from pipelines.console import say, visible
from pipelines.formats import format_duration
from pipelines.progress import Pace, Progress, figures_in
from trainer.cli.command import run_command
from trainer.cli.pictures import write_picture
from trainer.cli.worker_lines import WorkerLines
from trainer.config.reading import ConfigError, to_dict
from trainer.config.shapes import picture_shape
from trainer.evaluation.drawing import draw_samples
from trainer.evaluation.grid import grid_png
from trainer.evaluation.loading import ChosenModel, ModelSource, SamplerChoice
from trainer.evaluation.precision import Precision, PrecisionChoice, auto_precision
from trainer.evaluation.sample_formats import FormatName
from trainer.evaluation.sample_set import SamplePlan, SampleSet, WholeSet, part_size
from trainer.evaluation.samples import ImageSampler
from trainer.evaluation.strips import film, film_picture, interpolation, png_of
from trainer.storage.open import open_store

logger = logging.getLogger(__name__)

_FAILED = 1
_REPORT_INTERVAL_S = 10.0
_EXAMPLE = "checkpoint=~/lapflow/store/runs/digits"
_DESCRIPTION = f"""\
Draw samples from a checkpoint, or from a run's newest one: a grid, a film of how they come into
being, what lies between two seeds, or n=N of them into a folder.

  python -m trainer.sample {_EXAMPLE}
  python -m trainer.sample checkpoint=s3://bucket/runs/NAME/checkpoints/000001280000 \\
      store.endpoint_url=http://HOST:PORT classes=[207,360] columns=4 sampler.guidance_scale=4
  python -m trainer.sample {_EXAMPLE} film=true
  python -m trainer.sample {_EXAMPLE} interpolate=3:5
  python -m trainer.sample {_EXAMPLE} share_coarse=8   8 variations of a layout
  python -m trainer.sample {_EXAMPLE} n=50000 format=npz \\
      output=s3://bucket/samples cluster.backend=ray cluster.workers=8

Run the same command again and a set that was interrupted goes on."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ModelSource):
    """What to draw.

    Attributes:
        output: PNG file to write, or with `n` the folder or `s3://…` for the samples alone; None is
            samples.png, or the folder samples.
        n: How many samples to draw into a set, by all workers; None draws a grid.
        format: Of a set: "png" files in one folder for each class, one "npz" file as ADM's
            evaluator reads it, or "mds" shards.
        classes: Classes to draw: a row of the grid each, or equal parts of a set. None draws the
            first ten in a grid, the first three in a film, and all in a set.
        columns: Images per class in a grid; times of a film; samples of an interpolation.
        share_coarse: So many samples are variations of one layout: they share the noise of all
            scales but the finest, which is drawn once for all of them. A grid has a row for each
            layout, of each class as many as `columns` has room for, or one. With 1 each sample
            has a layout of its own.
        film: Draw instead what each scale held at each time, for one sample of each class.
        interpolate: Two seeds, `3:5`; draw what lies between their samples, a row for each class.
        seed: Seed of the noise.
        batch: Most images in one network call.
        precision: What the network computes in: "fp32", "tf32" (a GPU's faster products of
            float32) or "bf16"; "auto" is bf16 on a GPU and fp32 elsewhere.
        sampler: Changes to the run's own `eval.sampler`: solver, steps and guidance.
        cluster: Who draws a set; one process of this machine, unless set.
    """

    output: str | None = field(default=None, metadata={"place": "uri"})
    n: Annotated[int, Field(ge=1)] | None = None
    format: FormatName = "png"
    classes: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    columns: Annotated[int, Field(ge=1)] = 10
    share_coarse: Annotated[int, Field(ge=1)] = 1
    film: bool = False
    interpolate: str | None = None
    seed: Annotated[int, Field(ge=0)] = 1
    batch: Annotated[int, Field(ge=1)] = 64
    precision: PrecisionChoice = "auto"
    sampler: SamplerChoice = field(default_factory=SamplerChoice)
    cluster: ClusterConfig = field(
        default_factory=lambda: ClusterConfig(backend="local", workers=1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is not None and not self.classes:
            raise ConfigError(
                "classes=[] names no class; name some, as in classes=[3,5], or leave it away to "
                "draw the first ten"
            )
        self.seeds()
        asked = [name for name in ("n", "film", "interpolate") if getattr(self, name)]
        if len(asked) > 1:
            raise ConfigError(f"{' and '.join(asked)} are asked for at once; draw one by one")
        if self.share_coarse > 1 and asked not in ([], ["n"]):
            raise ConfigError(
                f"share_coarse={self.share_coarse} is for grids and sets; leave it out with "
                f"{asked[0]}"
            )
        if self.n is None:
            return
        if self.device != "auto":
            raise ConfigError(
                f"device={self.device} is for a grid; with n={self.n} each worker has a device of "
                "its own: a GPU where there are some, unless cluster.gpus_per_worker=0"
            )
        if self.output is not None and Path(self.output).suffix in (".png", ".npz"):
            raise ConfigError(
                f"output={self.output} names a file, but n={self.n} samples go into a folder; give "
                "one, or s3://bucket/folder"
            )

    def seeds(self) -> tuple[int, int] | None:
        """Return the seeds to interpolate between; None if that is not asked for.

        Raises:
            ConfigError: The text does not name two.
        """
        if self.interpolate is None:
            return None
        found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", self.interpolate)
        if found is None:
            raise ConfigError(
                f"interpolate={self.interpolate!r} must be two seeds, as in interpolate=3:5"
            )
        return int(found[1]), int(found[2])


def draw(config: SampleConfig) -> Outcome:
    """Draw what is asked for, and answer where it was written.

    Raises:
        ConfigError: For a class or weights the checkpoint does not have, guidance without a trained
            null label, a device that cannot be used, or an output that cannot be written or holds
            something else.
        AutoencoderError: If the autoencoder of its latents cannot be had.
        CheckpointError: If the checkpoint is missing or damaged, or a store fails.
        SolverError: If a solver that chooses its own steps comes to no end.
    """
    return _draw_picture(config) if config.n is None else _draw_set(config, config.n)


def _draw_picture(config: SampleConfig) -> Outcome:
    trained = config.load(precision=config.precision)
    shown = 3 if config.film else 10
    classes = tuple(config.classes or range(min(shown, trained.shape.classes)))
    trained.record.check_classes(classes)
    sampler = trained.image_sampler(
        config.sampler.over(trained.own.sampler),
        seed=config.seed,
        batch=config.batch,
        share_coarse=config.share_coarse,
    )
    columns = config.columns
    values: dict[str, Any] = {"images": len(classes)}
    if config.film:
        png = _film(config, trained.model, sampler, classes)
    elif seeds := config.seeds():
        png = _interpolation(config, trained.model, sampler, classes, seeds)
        values = {"images": len(classes) * config.columns, "seeds": seeds}
    else:
        images_per_class = columns
        if config.share_coarse > 1:
            columns = config.share_coarse
            images_per_class = max(1, config.columns // columns) * columns
        labels = torch.tensor(classes).repeat_interleave(images_per_class)
        logger.info("drawing %d images on %s", len(labels), trained.device)
        drawn = sampler.all(trained.model, labels)
        png = grid_png(drawn.images, columns=columns)
        values = {"images": len(labels), "network_evaluations": sum(drawn.nfe)}
    output = _write_picture(config, png)
    return Outcome(
        output,
        {
            "output": output,
            "checkpoint": trained.checkpoint,
            "weights": config.weights,
            "precision": trained.precision,
            "classes": classes,
            "columns": columns,
            **values,
        },
    )


def _film(
    config: SampleConfig, model: nn.Module, sampler: ImageSampler, classes: Sequence[int]
) -> bytes:
    logger.info("drawing %d images on %s, each by itself", len(classes), sampler.device)
    films = [
        film(sampler, model, label, index=index, moments=config.columns)
        for index, label in enumerate(classes)
    ]
    return png_of(film_picture(sampler, films, classes))


def _interpolation(
    config: SampleConfig,
    model: nn.Module,
    sampler: ImageSampler,
    classes: Sequence[int],
    seeds: tuple[int, int],
) -> bytes:
    logger.info("drawing %d images on %s", len(classes) * config.columns, sampler.device)
    first, last = (replace(sampler, seed=seed) for seed in seeds)
    images = interpolation(sampler, model, classes, ends=(first, last), steps=config.columns)
    return grid_png(images, columns=config.columns)


def _write_picture(config: SampleConfig, png: bytes) -> str:
    output = config.output or "samples.png"
    if "://" not in output:
        return str(write_picture(output, png))
    folder, _, name = output.rpartition("/")
    store = open_store(folder, config.store)
    store.put(name, png)
    return store.uri(name)


def _draw_set(config: SampleConfig, count: int) -> Outcome:
    chosen = config.choose()
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
    if config.precision != "auto":
        return config.precision
    gpus = config.cluster.gpus_per_worker
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


main = partial(
    run_command,
    SampleConfig,
    draw,
    module="trainer.sample",
    description=_DESCRIPTION,
    example=_EXAMPLE,
)
"""Runs the command, given its words or none for the process's own, and returns its exit code."""
