"""A job's costs, and where its experts go: as configured, or where its cluster holds them fastest.

No model is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from cluster.hardware import HardwareError
from cluster.placement import Placement, PlacementError, check_placement
from models.transformer.config import Ties
from models.transformer.cost import (
    ModelShape,
    activation_elements,
    average_multiply_adds,
    multiply_adds,
    parameters,
    partitioned_parameters,
)
from pipelines.formats import format_count, format_table
from trainer.config.job import JobConfig, micro_batch
from trainer.config.reading import ConfigError
from trainer.config.shapes import encodes, flow_shape, picture_shape
from trainer.engine.zero_config import KEEP_WEIGHTS, zero_config
from trainer.planning.device_work import encoder_flops, launches
from trainer.planning.planner import Candidate, Choices, best, candidate, candidates, choose
from trainer.planning.report import placement_table
from trainer.planning.workload import ScaleLoad, Workload

_ROWS = 6
_BYTES = {"fp32": 4, "bf16": 2}


def resolve_placement(job: JobConfig) -> Placement:
    """Decide where the experts are, and make sure that model and cluster can hold them.

    With `engine.placement=auto` it is what `engine.memory` asks for with the configured ZeRO
    stage. Memory is checked where the cluster's is known.

    Raises:
        ConfigError: The placement cannot work or does not fit, nothing fits, or "auto" has no
            memory to go by. The message has the numbers and a fix.
    """
    return _resolve(job).placement


def settle(job: JobConfig) -> JobConfig:
    """Fill in what the settings leave to the planner.

    That is placement, recomputation, and whether tokens and weights that are gathered are kept.

    Raises:
        ConfigError: As `resolve_placement`.
    """
    found = _resolve(job)
    if found.keeps_weights and _leaves_kept_weights_open(job):
        job = _with_zero(job, dict(KEEP_WEIGHTS))
    engine = replace(
        job.engine,
        placement=found.placement.sharded or "replicated",
        activation_checkpointing=found.recomputed,
        regather_tokens=found.regathers,
    )
    return replace(job, engine=engine)


def _resolve(job: JobConfig) -> Candidate:
    found = predict_configured(job)
    if found is None or not found.fits:
        raise ConfigError(_no_room(job, found))
    return found


def choices(job: JobConfig, zero_stages: Sequence[int]) -> Choices:
    """What a job leaves to the planner, beside placements and the ZeRO stage."""
    return Choices(
        zero_stages=zero_stages,
        aim=job.engine.memory,
        keeps_tokens=job.engine.regather_tokens is None,
        keeps_weights=_leaves_kept_weights_open(job),
        recomputes=job.engine.activation_checkpointing is None,
    )


def predict_configured(job: JobConfig) -> Candidate | None:
    """Predict what the job's own placement and ZeRO stage cost.

    Returns:
        The prediction; None if "auto" finds nothing that fits.

    Raises:
        ConfigError: The placement cannot work, or "auto" has no memory to go by.
    """
    work, hardware, stage = workload(job), job.cluster.hardware, zero_stage(job)
    wanted = job.engine.placement
    if wanted == "auto":
        try:
            return choose(work, hardware, choices(job, [stage]))
        except HardwareError as error:
            raise ConfigError(f"engine.placement=auto: {error}") from error
    try:
        placement = Placement.of({} if wanted == "replicated" else wanted, scales=job.flow.scales)
        check_placement(
            placement,
            width=work.width,
            hidden=work.hidden,
            world_size=work.world_size,
            ranks_per_node=hardware.ranks_per_node(work.world_size),
            tied=work.tied,
        )
    except PlacementError as error:
        raise ConfigError(f"engine.{error}") from error
    return candidate(work, placement, zero_stage=stage, hardware=hardware)


def zero_stage(job: JobConfig) -> int:
    """ZeRO stage of the job, 0 for the plain engine."""
    return job.engine.zero_stage if is_zero(job) else 0


def stage_words(stage: int) -> str:
    """The setting by which a ZeRO stage is asked for; 0 is the plain engine."""
    return f"engine.zero_stage={stage}" if stage else "engine.kind=plain"


def is_zero(job: JobConfig) -> bool:
    """Whether DeepSpeed trains the job, with as many workers as it has."""
    return job.engine.kind_of(job.cluster.workers) == "zero"


def workload(job: JobConfig) -> Workload:
    """Reduce a job to the numbers that memory and time depend on.

    Raises:
        ConfigError: The batch cannot be dealt to the ranks and stages.
        TransformerConfigError: The model does not fit the images.
    """
    shape, scales = model_shape(job), job.flow.scales
    images, workers = micro_batch(job), job.cluster.workers
    stratified = job.flow.stage_choice == "stratified"
    stages = scales if stratified else 1
    share, left = divmod(job.train.global_batch, workers)
    if left or images < 1 or share % images or images % stages:
        unit = workers * stages
        near = max(1, round(job.train.global_batch / unit)) * unit
        raise ConfigError(
            f"train.global_batch={job.train.global_batch} with engine.micro_batch="
            f"{job.engine.micro_batch} cannot be dealt to cluster.workers={workers} with equal "
            f"shares of {stages} stage(s); use a multiple of {unit}, such as {near}, and a "
            f"micro_batch that divides a rank's share and is a multiple of {stages}"
        )
    zero = zero_config(
        job.engine, micro_batch=images, grad_accum_steps=1, world_size=workers, clip_norm=0.0
    )["zero_optimization"]
    return Workload(
        scales=tuple(_scale_loads(job, shape, images=images, stratified=stratified)),
        shared_parameters=parameters(shape).shared,
        width=shape.width,
        hidden=shape.mlp_width,
        depth=shape.depth,
        shared_modulation=shape.modulation == "shared",
        coarse_ahead=shape.attention != "full",
        tied=shape.ties.scales,
        world_size=workers,
        images=images,
        grad_accum_steps=share // images,
        element_bytes=_BYTES[job.engine.precision],
        gradient_bytes=_BYTES[job.engine.sum_precision(share // images)],
        offload=job.engine.offload_optimizer,
        ema_on_host=job.train.ema.device == "host",
        averages=len(job.train.ema.kinds),
        overlaps_exchange=job.engine.has_overlap(workers),
        regathers=job.engine.regathers,
        reduces_to_owners=not zero.get("use_multi_rank_bucket_allreduce", True),
        # What comes next, and so what to keep, is known to ZeRO-3 where all passes are alike.
        kept_parameters=zero.get("stage3_max_reuse_distance", Workload.kept_parameters)
        if _has_one_order(job)
        else 0,
        **_pick_given(
            zero,
            bucket_elements="reduce_bucket_size",
            reduces_in_backward="overlap_comm",
        ),
        **_device_work(job),
    )


def _device_work(job: JobConfig) -> dict[str, Any]:
    """What a device has to do beside the network's products."""
    is_eager = job.engine.compile == "off"  # nobody has counted the kernels of compiled blocks
    return {
        "encoder_flops": encoder_flops(picture_shape(job.data, job.codec).size ** 2)
        if encodes(job)
        else 0.0,
        "encodes_in_fp32": job.codec.encode_precision == "fp32",
        "launches": launches(
            scales=job.flow.scales, depth=job.model.depth, qk_norm=job.model.qk_norm
        )
        if is_eager
        else 0,
    }


def _leaves_kept_weights_open(job: JobConfig) -> bool:
    """Whether ZeRO-3 could keep what it gathers, and the job does not say how much of it."""
    given = job.engine.deepspeed.get("zero_optimization", {})
    return _has_one_order(job) and KEEP_WEIGHTS.keys().isdisjoint(given)


def _has_one_order(job: JobConfig) -> bool:
    """Whether all passes use the same layers in the same order."""
    return job.flow.scales == 1 or job.flow.stage_choice == "stratified"


def model_shape(job: JobConfig) -> ModelShape:
    """Sizes of the job's model."""
    images = flow_shape(job.data, job.codec)
    return ModelShape.of(
        job.model,
        scales=job.flow.scales,
        channels=images.channels,
        image_size=images.size,
        # Where only the data set knows how many there are: their table is no weight to speak of.
        classes=max(1, images.classes),
    )


def one_scale_job(job: JobConfig) -> JobConfig:
    """The same images with one scale and its weights alone."""
    again = job.engine.activation_checkpointing
    return replace(
        job,
        flow=replace(job.flow, scales=1, critical_times=()),
        model=replace(job.model, ties=Ties()),
        engine=replace(
            job.engine, activation_checkpointing=None if again is None else tuple(set(again) & {0})
        ),
    )


def changed_jobs(job: JobConfig) -> dict[str, JobConfig]:
    """Jobs that differ in one thing that could change the choice, by what that is."""
    images, workers, scales = micro_batch(job), job.cluster.workers, job.flow.scales
    stages = scales if job.flow.stage_choice == "stratified" else 1
    every = tuple(reversed(range(scales)))
    jobs = {f"{2 * images} images of a rank in a pass": _resize(job, images=2 * images)}
    if images % (2 * stages) == 0:
        jobs[f"{images // 2} images of a rank in a pass (engine.micro_batch)"] = replace(
            job, engine=replace(job.engine, micro_batch=images // 2)
        )
    if scales > 1 and not job.model.ties.scales:
        jobs["all scales tied (model.ties.scales)"] = replace(
            job, model=replace(job.model, ties=Ties(scales=every))
        )
    if is_zero(job) and not job.engine.offload_optimizer:
        if job.train.ema.device == "device":
            ema = replace(job.train.ema, device="host")
            jobs["train.ema.device=host"] = replace(job, train=replace(job.train, ema=ema))
        jobs["engine.offload_optimizer=true"] = replace(
            job, engine=replace(job.engine, offload_optimizer=True)
        )
    if is_zero(job):
        jobs |= {
            f"engine.deepspeed.zero_optimization={words}": _with_zero(job, settings)
            for words, settings in _zero_settings(job)
        }
    if job.engine.activation_checkpointing is not None and set(job.engine.recomputed) != set(every):
        jobs["all scales recomputed (engine.activation_checkpointing)"] = replace(
            job, engine=replace(job.engine, activation_checkpointing=every)
        )
    if workers % 2 == 0:
        jobs[f"{format_count(workers // 2, 'GPU')} and as many images on each"] = _resize(
            job, workers=workers // 2
        )
    jobs[f"{2 * workers} GPUs and as many images on each"] = _resize(job, workers=2 * workers)
    return jobs


def _zero_settings(job: JobConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings of ZeRO that could help, with fewer bytes."""
    if not workload(job).reduces_to_owners:
        yield (
            "{use_multi_rank_bucket_allreduce:false}",
            {"use_multi_rank_bucket_allreduce": False},
        )


def _with_zero(job: JobConfig, settings: dict[str, Any]) -> JobConfig:
    own = job.engine.deepspeed
    zero = {**own.get("zero_optimization", {}), **settings}
    return replace(job, engine=replace(job.engine, deepspeed={**own, "zero_optimization": zero}))


def _resize(job: JobConfig, *, images: int | None = None, workers: int | None = None) -> JobConfig:
    """The job with another micro-batch or number of workers, and as many micro-batches."""
    before, ranks = micro_batch(job), workers or job.cluster.workers
    now = images or before
    steps = job.train.global_batch // (job.cluster.workers * before)
    return replace(
        job,
        train=replace(job.train, global_batch=ranks * now * steps),
        engine=replace(job.engine, micro_batch=now),
        cluster=replace(job.cluster, workers=ranks),
    )


def _scale_loads(
    job: JobConfig, shape: ModelShape, *, images: int, stratified: bool
) -> Iterator[ScaleLoad]:
    again = job.engine.recomputed
    activations = activation_elements(shape)
    recomputed = activation_elements(shape, checkpointed=range(shape.scales))
    block = activation_elements(replace(shape, depth=1))
    partitioned = partitioned_parameters(shape)
    total = [0, *(multiply_adds(shape, active=a) for a in range(1, shape.scales + 1))]
    expert = shape.depth * (4 * shape.width**2 + 2 * shape.width * shape.mlp_width)
    for position, (own, tokens) in enumerate(
        zip(parameters(shape).per_scale, shape.tokens, strict=True)
    ):
        k = shape.scales - 1 - position
        # A stage s carries the scales k >= s, and stages have equal shares of the images.
        carried = images * (k + 1) / shape.scales
        yield ScaleLoad(
            parameters=own,
            unpartitioned=own - sum(partitioned[position].values()),
            modulation=partitioned[position]["modulation"],
            tokens=tokens,
            images=carried,
            max_images=int(carried) if stratified else images,
            multiply_adds=total[position + 1] - total[position],
            expert_multiply_adds=tokens * expert,
            activations=activations[position],
            recomputed_activations=recomputed[position],
            block_activations=block[position],
            activation_checkpointing=k in again,
        )


def _pick_given(settings: dict[str, Any], **names: str) -> dict[str, Any]:
    """The settings that are not left to DeepSpeed's defaults."""
    return {
        field: settings[name] for field, name in names.items() if settings.get(name) is not None
    }


def _no_room(job: JobConfig, found: Candidate | None) -> str:
    hardware, stage = job.cluster.hardware, zero_stage(job)
    stages = sorted({stage} | ({1, 2, 3} if stage else set()))
    limit = f"{hardware.gpu_memory_gib} GiB of cluster.hardware.gpu_memory_gib"
    if found is not None and found.fits_device:
        limit = (
            f"a rank's share of {hardware.host_memory_gib} GiB of cluster.hardware.host_memory_gib"
        )
    every = candidates(workload(job), hardware, replace(choices(job, stages), aim="fit"))
    table = placement_table(every[:_ROWS])
    fitting = best(every)
    if fitting is not None:
        fix = f"{fitting} does: {stage_words(fitting.zero_stage)} engine.placement="
        fix += "auto" if fitting.placement.sharded or fitting.extras else "replicated"
        if job.engine.memory == "fastest":
            fix += " engine.memory=fit"
    elif found is not None and found.fits_device:
        fix = "set engine.offload_optimizer=false and train.ema.device=device, or use more nodes"
    else:
        fix = (
            "lower engine.micro_batch, set engine.activation_checkpointing or "
            "engine.offload_optimizer=true, or use more or larger GPUs (python -m trainer.plan "
            "tells which of them is enough)"
        )
    return (
        f"engine.placement={found.placement if found else 'auto'} with {stage_words(stage)} "
        f"does not fit {limit}; {fix}. "
        f"What is predicted:\n{table}"
    )


def cost_table(job: JobConfig) -> str:
    """Render parameters, multiply-adds and memory per rank.

    Args:
        job: The validated configuration.

    Returns:
        Lines for a terminal.
    """
    shape = model_shape(job)
    count = parameters(shape)
    average = average_multiply_adds(shape, critical_times=job.flow.critical_times)
    found = _resolve(job)
    memory = found.memory
    share = job.train.global_batch // job.cluster.workers
    updates = -(-job.train.total_images // job.train.global_batch)
    rows = [
        ("parameters", _si(count.total, "")),
        ("  shared by all scales", _si(count.shared, "")),
        *(
            (f"  scale {shape.scales - 1 - position}", _si(own, ""))
            for position, own in enumerate(count.per_scale)
        ),
    ]
    for active in range(1, shape.scales + 1):
        scales = "coarsest scale" if active == 1 else f"{active} scales active"
        rows.append((f"multiply-adds, {scales}", _si(multiply_adds(shape, active=active), "MAC")))
    rows += [
        ("  average over time", _si(average, "MAC")),
        ("training, FLOPs per image", _si(6 * average, "FLOP")),
        ("training, FLOPs in all", _si(6 * average * job.train.total_images, "FLOP")),
        ("updates", f"{updates:,} of {job.train.global_batch:,} images"),
        ("batch", f"{job.cluster.workers} ranks x {share} images, {micro_batch(job)} in one pass"),
        ("engine", f"DeepSpeed, ZeRO-{found.zero_stage}" if found.zero_stage else "torch alone"),
        ("experts", ", ".join(filter(None, (str(found.placement), found.extras)))),
        ("memory per rank", ""),
        ("  weights", _gib(memory.weights)),
        ("  gradients", _gib(memory.gradients)),
        ("  optimizer and fp32 master", _gib(memory.optimizer)),
        ("  EMA", _gib(memory.ema)),
        ("  activations (estimate)", _gib(memory.activations)),
        ("  buffers of collectives", _gib(memory.buffers)),
        ("  total", _gib(memory.total)),
        *([("  in host memory", _gib(memory.host))] if memory.host else []),
    ]
    return format_table(rows)


def _si(value: float, unit: str) -> str:
    for factor, prefix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        # Parameters are counted in millions by the field, also above a thousand of them.
        if abs(value) >= factor and not (unit == "" and prefix in "EPTG"):
            return f"{value / factor:,.1f} {prefix}{unit}".rstrip()
    return f"{value:,.0f} {unit}".rstrip()


def _gib(value: float) -> str:
    return f"{value / 2**30:,.3f} GiB"
