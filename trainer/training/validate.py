"""Combinations of settings that cannot work, refused before any process starts."""

from __future__ import annotations

from dataclasses import replace

from trainer.config.job import JobConfig, check_guidance, micro_batch, with_workers
from trainer.config.reading import ConfigError
from trainer.config.shapes import encodes, flow_shape
from trainer.engine.zero_config import zero_config
from trainer.planning.placing import resolve_placement, zero_stage

_ZERO_TUNING = (
    "allgather_bucket_size",
    "allgather_partitions",
    "overlap_comm",
    "reduce_bucket_size",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
)
"""DeepSpeed's ZeRO settings that change speed and buffers alone."""


def validate(job: JobConfig) -> None:
    """Refuse combinations that cannot work.

    Raises:
        ConfigError: Naming the keys, their values and a fix.
    """
    _check_name("run", job.run)
    _check_name("data.name", job.data.name)
    if job.tracking.sweep is not None:
        _check_name("tracking.sweep", job.tracking.sweep)
    _check_ranges(job)
    _check_batch(job)
    _check_data(job)
    _check_codec(job)
    _check_shapes(job)
    _check_engine(job)
    _check_during(job)
    if job.data.prepare == "digits" and (job.data.image_size, job.data.channels) != (8, 1):
        raise ConfigError(
            f"data.prepare=digits makes grey images of 8 x 8 pixels, but data.image_size="
            f"{job.data.image_size} and data.channels={job.data.channels}; set them to 8 and 1"
        )
    check_guidance(
        job.eval.sampler.guidance_scale,
        label_dropout=job.train.label_dropout,
        key="eval.sampler.guidance_scale",
    )


def fewer_workers(job: JobConfig) -> dict[int, int]:
    """Find with how many workers below its own number an elastic job goes on.

    Returns:
        By number of workers, from `cluster.min_workers`, how many consecutive ranks share a node
        then. Numbers to which the batch, its stages or groups of expert shards cannot be dealt, or
        with which a rank would not fit its memory, are left out.
    """
    found: dict[int, int] = {}
    least = job.cluster.min_workers
    if least is None or job.cluster.backend == "local":  # which starts nothing again
        return found
    for workers in range(least, job.cluster.workers):
        smaller = with_workers(job, workers)
        try:
            _check_batch(smaller)
            _check_engine(smaller)
            found[workers] = resolve_placement(smaller).unit
        except ConfigError:
            continue
    return found


def _check_engine(job: JobConfig) -> None:
    engine = job.engine
    if engine.kind == "plain" and engine.offload_optimizer:
        raise ConfigError(
            "engine.offload_optimizer=True needs engine.kind=zero: the plain engine keeps its "
            "state on the device"
        )
    # What tunes ZeRO alone may stay, for it is part of a run that moves from one engine to another.
    if engine.kind == "plain" and (given := sorted(set(engine.deepspeed) - {"zero_optimization"})):
        raise ConfigError(
            f"engine.deepspeed.{given[0]} needs engine.kind=zero: the plain "
            "engine has nothing of DeepSpeed; leave it out, or give engine=zero1 or zero2"
        )
    stray = sorted(set(engine.recomputed) - set(range(job.flow.scales)))
    if stray:
        raise ConfigError(
            f"engine.activation_checkpointing={list(engine.recomputed)} names scale "
            f"{stray[0]}; the scales are 0 (finest) to {job.flow.scales - 1}"
        )
    partitioned = zero_stage(job) == 3
    if partitioned and engine.compile != "off":
        raise ConfigError(
            f"engine.compile={engine.compile} does not go with engine.zero_stage=3, which gathers "
            "a layer's weights when Python calls it, while compiled code calls no layer; set "
            "engine.zero_stage=2 or 1, or engine.compile=off"
        )
    sharded = resolve_placement(job).sharded
    if (partitioned or sharded) and job.eval.sampler.adaptive:
        cause = f"engine.zero_stage={engine.zero_stage}" if partitioned else "sharded experts"
        raise ConfigError(
            f"eval.sampler.solver={job.eval.sampler.solver} takes another number of steps on every "
            f"rank, but with {cause} all ranks need one another in each; use a solver with fixed "
            "steps here (euler, midpoint, heun, ab2), and python -m trainer.evaluate, which holds "
            "the whole model in one process, for dopri5 on the finished checkpoint"
        )


def _check_during(job: JobConfig) -> None:
    during = job.eval.during
    if during.every_images and during.where == "beside" and job.cluster.backend != "ray":
        raise ConfigError(
            f"eval.during.where=beside needs a task on a Ray cluster, but cluster.backend="
            f"{job.cluster.backend}; set eval.during.where=inline, or cluster.backend=ray"
        )


def _check_name(key: str, name: str) -> None:
    allowed = all(c.isascii() and (c.isalnum() or c in "._-") for c in name)
    if not name or not allowed or name[0] in ".-" or len(name) > 100:
        raise ConfigError(
            f"{key}={name!r} cannot name a folder; use letters, digits, '.', '_' and '-', starting "
            "with a letter or digit, 100 at most"
        )


def _check_ranges(job: JobConfig) -> None:
    if job.eval.sampler.steps < job.flow.scales:
        raise ConfigError(
            f"eval.sampler.steps={job.eval.sampler.steps} must be at least {job.flow.scales}, one "
            "for each of flow.scales"
        )
    if job.data.classes < 1:
        raise ConfigError(f"data.classes={job.data.classes} must be at least 1")
    if job.data.space == "pixel" and job.data.channels not in (1, 3):
        raise ConfigError(
            f"data.channels={job.data.channels} must be 1 (grey) or 3 (RGB) for images"
        )
    if job.optim.warmup_images > job.train.total_images:
        raise ConfigError(
            f"optim.warmup_images={job.optim.warmup_images} is longer than the run, "
            f"train.total_images={job.train.total_images}, which would end before the learning "
            "rate is reached; shorten the warm-up, or lengthen the run"
        )
    _check_passed_on(job)


def _check_passed_on(job: JobConfig) -> None:
    """Refuse what is passed on to DeepSpeed over settings of our own, or would move weights."""
    rendered = zero_config(
        replace(job.engine, deepspeed={}),
        micro_batch=1,
        grad_accum_steps=1,
        world_size=1,
        clip_norm=job.optim.clip_norm,
    )
    passed = job.engine.deepspeed
    own = sorted(set(passed) & set(rendered) - {"zero_optimization"})
    if own:
        raise ConfigError(
            f"engine.deepspeed.{own[0]} is decided by other settings (train.global_batch, "
            "engine.micro_batch, optim.clip_norm, engine.precision, engine.grad_accum_dtype); "
            "change those"
        )
    scaling = sorted(set(passed) & {"prescale_gradients", "gradient_predivide_factor"})
    if scaling:
        raise ConfigError(
            f"engine.deepspeed.{scaling[0]} would have no effect: gradients are added up as they "
            "are, and divided where they are kept; leave it out"
        )
    strange = sorted(
        name
        for name in passed.get("zero_optimization", {})
        if name not in _ZERO_TUNING and not name.startswith("stage3_")
    )
    if strange:
        raise ConfigError(
            f"engine.deepspeed.zero_optimization.{strange[0]} cannot be passed on: it would change "
            "where weights and their state are, which engine.zero_stage, engine.placement and "
            "engine.offload_optimizer decide; what can be is "
            f"{', '.join(_ZERO_TUNING)} and stage3_…"
        )


def _check_batch(job: JobConfig) -> None:
    batch, workers = job.train.global_batch, job.cluster.workers
    # With one stage per step a batch is not dealt to the stages.
    stages = job.flow.scales if job.flow.stage_choice == "stratified" else 1
    shares = f" with equal shares of flow.scales={stages} stages" if stages > 1 else ""
    multiple = f" and be a multiple of flow.scales={stages}" if stages > 1 else ""
    unit = workers * stages
    if batch % unit:
        raise ConfigError(
            f"train.global_batch={batch} cannot be dealt to cluster.workers={workers}{shares}; use "
            f"a multiple of {unit}, such as {max(1, round(batch / unit)) * unit}"
        )
    share, micro = batch // workers, micro_batch(job)
    if share % micro or micro % stages:
        fitting = [m for m in range(stages, share + 1, stages) if share % m == 0]
        raise ConfigError(
            f"engine.micro_batch={micro} must divide each rank's {share} images{multiple}; "
            f"possible values: {', '.join(map(str, fitting))}"
        )


def _check_data(job: JobConfig) -> None:
    data = job.data
    if data.streams and (data.prefix or data.prepare != "none"):
        raise ConfigError(
            f"data.streams does not go with data.prefix={data.prefix} and data.prepare="
            f"{data.prepare}; set them to null and none, or leave data.streams out"
        )
    weighed = [stream.weight is not None for stream in data.streams]
    if any(weighed) and not all(weighed):
        unweighed = data.streams[weighed.index(False)].prefix
        raise ConfigError(
            f"data.streams gives {unweighed} no weight and others one; give all of them a weight, "
            "or none, which takes each sample once per epoch"
        )
    if data.space == "latent" and data.augment.crop != "center":
        raise ConfigError(
            f"data.augment.crop={data.augment.crop} cannot be applied to latents, whose images "
            "were cropped when they were encoded; set data.augment.crop=center"
        )
    if data.images_prefix is not None and len(data.streams) > 1:
        raise ConfigError(
            f"data.images_prefix={data.images_prefix} names the images of one prefix of latents, "
            f"and data.streams has {len(data.streams)}; leave it out"
        )
    if data.space == "pixel" and data.images_prefix is not None:
        raise ConfigError(
            f"data.images_prefix={data.images_prefix} is for data.space=latent; leave it out"
        )


def _check_codec(job: JobConfig) -> None:
    size, codec = job.data.image_size, job.codec
    if job.data.space == "latent":
        if codec.kind == "identity":
            raise ConfigError(
                "data.space=latent needs the codec that made the latents, to show samples as "
                "images; set codec=sd_vae, codec=eq_vae, or codec.kind=autoencoder_kl and "
                "codec.source"
            )
        if job.data.channels != codec.channels:
            raise ConfigError(
                f"data.channels={job.data.channels} of latents must be codec.channels="
                f"{codec.channels}"
            )
    if encodes(job) and (size < codec.factor or size % codec.factor):
        near = max(1, round(size / codec.factor)) * codec.factor
        raise ConfigError(
            f"data.image_size={size} cannot be encoded with codec.factor={codec.factor}; use a "
            f"multiple of it, such as {near}"
        )


def _check_shapes(job: JobConfig) -> None:
    size = flow_shape(job.data, job.codec).size
    patch, scales = job.model.patch_size, job.flow.scales
    factor = job.codec.factor if encodes(job) else 1
    unit = patch * 2 ** (scales - 1)
    if size < unit or size % unit:
        most = 0
        while size % (patch * 2**most) == 0:
            most += 1
        latents = f", on latents of {size} x {size} elements (codec.factor={factor})"
        fix = f"at this size flow.scales can be at most {most}" if most else "change either"
        raise ConfigError(
            f"data.image_size={job.data.image_size} cannot hold flow.scales={scales} with "
            f"model.patch_size={patch}{latents if factor > 1 else ''}: the coarsest band must be a "
            f"whole number of patches, so the size must be a multiple of {factor * unit}; {fix}"
        )
