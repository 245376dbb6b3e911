"""What a job costs, by formula: the table of a dry run. No model is built."""

from __future__ import annotations

from models.transformer.cost import average_multiply_adds, multiply_adds, parameters
from pipelines.formats import format_table
from trainer.config.job import JobConfig, micro_batch
from trainer.planning.placing import model_shape, resolve_placement, workload, zero_stage
from trainer.planning.prediction import rank_memory


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
    placement = resolve_placement(job)
    memory = rank_memory(workload(job), placement, zero_stage=zero_stage(job))
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
        ("experts", str(placement)),
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
