"""DeepSpeed's configuration, rendered from typed fields by a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.engine.protocol import EngineConfig

KEEP_WEIGHTS: Mapping[str, int] = {
    "stage3_max_live_parameters": 10**12,
    "stage3_max_reuse_distance": 10**12,
}
"""Settings by which ZeRO-3 keeps all weights that a forward pass gathers for the backward pass.

They are more than any model has: the distance to a weight's next use counts every weight that is
used before, in either pass. With DeepSpeed's 10^9 those are gathered again that are further away.
"""


def zero_config(
    config: EngineConfig,
    *,
    micro_batch: int,
    grad_accum_steps: int,
    world_size: int,
    clip_norm: float,
) -> dict[str, Any]:
    """Render the dictionary that `deepspeed.initialize` takes.

    Args:
        config: The engine's typed fields; `config.deepspeed` is merged over the result.
        micro_batch: Images per rank and forward pass.
        grad_accum_steps: Forward passes per update.
        world_size: Number of ranks.
        clip_norm: Largest global gradient norm; 0 is off.

    Returns:
        A plain dictionary, JSON-able.
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "round_robin_gradients": False,
        # DeepSpeed's default of 500 million elements is a buffer of a gigabyte on each rank.
        "reduce_bucket_size": 50_000_000,
        "overlap_comm": True,
        # DeepSpeed's `reduce_scatter` is none: by default ranks all-reduce whole buckets, and keep
        # their part. Off, each part is reduced to the rank that keeps it, which is half the bytes.
        # Not with state in host memory, where DeepSpeed would wait for the device at each of them.
        "use_multi_rank_bucket_allreduce": config.offload_optimizer,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    rendered: dict[str, Any] = {
        "train_batch_size": micro_batch * grad_accum_steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": config.sum_precision(grad_accum_steps)},
        "zero_optimization": zero,
        # The optimizer is torch's AdamW, which needs no compiled extension, in host memory too.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        # It would wait for the device at the beginning and at the end of every step.
        "timers": {"throughput": {"enabled": False}},
    }
    return _merge(rendered, config.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merge(result[key], value)
        else:
            result[key] = value
    return result
