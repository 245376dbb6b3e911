"""DeepSpeed ZeRO behind the engine protocol, with the EMA sharded like the optimizer.

Nothing here saves or loads files: checkpoints are made of fragments, so they do not depend on
DeepSpeed's own formats, world sizes or pickles.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cluster.tested import require_tested
from models.ema import EmaConfig
from models.transformer.lapflow import OnBuilt
from trainer.engine.ema import MovingAverages
from trainer.engine.expert_shards import ExpertShards, draw_initial_weights, shards_of, whole_shape
from trainer.engine.optimizer import OptimConfig, adamw, moments_of
from trainer.engine.protocol import Arrange, BuildModel, EngineConfig, UpdateOutcome
from trainer.engine.zero_config import zero_config
from trainer.engine.zero_partition import (
    StatePartition,
    WeightPartition,
    ZeroPartition,
    group_name,
    lend_groups,
    lend_weights,
    mark_expert_groups,
    partition_on_built,
)
from trainer.engine.zero_update import ZeroUpdate
from trainer.state import Fragment

TESTED_DEEPSPEED = ">=0.19.8,<0.19.9"
_UNUSED = {
    "deepspeed.autotuning.autotuner": ("Autotuner",),
    "deepspeed.runtime.zero.muon.original_muon": ("MuonWithAuxAdam", "adam_update", "muon_update"),
}
"""Modules of DeepSpeed that it imports, with what it takes from them."""


class ZeroEngine:
    """Training through `deepspeed.initialize`, on the process group that already exists.

    Args:
        build_model: Builds the model with the same initial weights on every rank.
        arrange: Says how that model is computed.
        config: Engine settings (stage, precision, pass-through).
        shards: Partitions the experts.
        optim: Optimizer settings.
        ema: Decays of the moving averages, and where they are kept.
        micro_batch: Images per rank and forward pass.
        grad_accum_steps: Forward passes per update.
        world_size: Number of ranks.
        device: Where the model is computed.
    """

    def __init__(
        self,
        build_model: BuildModel,
        *,
        arrange: Arrange,
        config: EngineConfig,
        shards: ExpertShards,
        optim: OptimConfig,
        ema: EmaConfig,
        micro_batch: int,
        grad_accum_steps: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        deepspeed = import_deepspeed()
        self._dtype, self._device = config.dtype, device
        settings = zero_config(
            config,
            micro_batch=micro_batch,
            grad_accum_steps=grad_accum_steps,
            world_size=world_size,
            clip_norm=optim.clip_norm,
        )
        stage = config.zero_stage
        self._build_model, self._experts = build_model, shards
        lend_groups(shards.exchanges.values())
        on_built = _on_built(shards, device=device, dtype=self._dtype)
        if stage == 3:
            on_built = partition_on_built(on_built, settings, self._dtype)
        model = build_model(on_built)
        arrange(model)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._shards = shards_of(model)
        if stage == 3:
            lend_weights(model)
        else:
            mark_expert_groups(model)
        with _keep_zero_optimizer():
            self._deepspeed, self._zero, _, _ = deepspeed.initialize(
                model=model, optimizer=adamw(self._optimizer_groups(), optim), config=settings
            )
        if stage < 3 and device.type == "cuda":
            _order_gradients(self._zero)
        self._partition: ZeroPartition = (
            WeightPartition(self._zero) if stage == 3 else StatePartition(self._zero)
        )
        self._own_update: ZeroUpdate | None = None
        if stage == 3 or config.offload_optimizer:
            self._averages = MovingAverages(self._partition.masters, config=ema)
        else:
            self._own_update = ZeroUpdate(self._zero, optim=optim, ema=ema)
            self._averages = self._own_update.averages

    def __call__(
        self, states: tuple[Tensor, ...], time: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Run the model in the engine's precision."""
        low = tuple(state.to(self._dtype) for state in states)
        return tuple(velocity.float() for velocity in self._deepspeed(low, time, labels))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add one micro-batch's gradient; ZeRO reduces it to the rank that owns the shard."""
        self._deepspeed.backward(loss)
        if not last:
            # DeepSpeed counts micro-batches in step(), which updates nothing before the last one.
            self._deepspeed.step()

    def update(
        self, *, learning_rate: float, ema_decays: Sequence[float] | Tensor
    ) -> UpdateOutcome:
        """Apply the update; a non-finite global norm makes every rank skip it alike."""
        if self._own_update is None:
            return self._update_by_deepspeed(learning_rate, ema_decays)
        outcome = self._own_update.apply(learning_rate=learning_rate, ema_decays=ema_decays)
        self._deepspeed.step()  # which counts micro-batches, and lets go of gradients
        return outcome

    def _update_by_deepspeed(
        self, learning_rate: float, ema_decays: Sequence[float] | Tensor
    ) -> UpdateOutcome:
        """Have DeepSpeed update what ZeRO-3, or host memory, holds; the host waits for the norm."""
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._averages.join()
        self._deepspeed.step()
        self._partition.zero_stale_grads()
        applied = not self._zero.overflow
        if applied:
            self._averages.follow(self._partition.masters, decays=ema_decays)
        norm = float(self._deepspeed.get_global_grad_norm()) if applied else float("inf")
        return UpdateOutcome(
            applied=torch.tensor(applied, device=self._device),
            gradient_norm=torch.tensor(norm, device=self._device),
        )

    def fragments(self) -> Sequence[Fragment]:
        """Return views of this rank's partition, one per parameter that overlaps it."""
        averages = self._averages.values()
        flats = [
            self._flats(master, {kind: values[place] for kind, values in averages.items()})
            for place, master in enumerate(self._partition.masters)
        ]
        result = []
        for each in self._partition.slices():
            name = self._names[each.parameter]
            shard = self._shards.get(name)
            shape = getattr(each.parameter, "ds_shape", each.parameter.shape)
            before = 0 if shard is None else shard.index * shape.numel()
            result.append(
                Fragment(
                    name=name,
                    start=before + each.start,
                    shape=whole_shape(shape, shard),
                    tensors={
                        kind: flat.narrow(0, each.offset, each.numel)
                        for kind, flat in flats[each.group].items()
                    },
                )
            )
        return result

    def load_fragments(self, updates: int) -> None:
        """Copy the overwritten fp32 shards into the model's weights on all ranks."""
        for master in self._partition.masters:
            moments_of(self._zero.optimizer, master)["step"].fill_(updates)
        self._partition.sync_params()

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """Swap the shards, not full copies: EMA in, gather, and the masters back afterwards."""
        with self._replace_masters(self._averages.copy_to) as model:
            yield model

    @contextmanager
    def initial_weights(self) -> Iterator[nn.Module]:
        """Draw the initial weights part by part into the shards, gather, and back afterwards."""
        with self._replace_masters(self._draw_masters) as model:
            yield model

    @contextmanager
    def _replace_masters(self, replace: Callable[[Sequence[Tensor]], None]) -> Iterator[nn.Module]:
        masters = self._partition.masters
        with self._averages.set_aside(masters), self._experts.passing_buffers():
            replace(masters)
            self._partition.sync_params()
            yield self._deepspeed.module
        # Not after an error: the other ranks would not be in this collective.
        self._partition.sync_params()

    @torch.no_grad()
    def _draw_masters(self, masters: Sequence[Tensor]) -> None:
        held = {each.parameter: each for each in self._partition.slices()}
        parameters = list(self._names)

        def take(number: int, value: Tensor) -> None:
            each = held.get(parameters[number])
            if each is not None:
                part = value.flatten()[each.start : each.start + each.numel]
                masters[each.group].narrow(0, each.offset, each.numel).copy_(part)

        draw_initial_weights(self._build_model, self._experts, take)

    def _flats(self, master: Tensor, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moments = moments_of(self._zero.optimizer, master)
        return {
            "master": master.detach(),
            "exp_avg": moments["exp_avg"],
            "exp_avg_sq": moments["exp_avg_sq"],
            **averages,
        }

    def _optimizer_groups(self) -> list[dict[str, Any]]:
        """One optimizer group for what every rank has, and one for each size of expert groups."""
        by_size: dict[int, list[Tensor]] = {1: []}
        for parameter, name in self._names.items():
            shard = self._shards.get(name)
            by_size.setdefault(1 if shard is None else shard.ranks, []).append(parameter)
        return [
            {"params": parameters, "name": "replicated"}
            if size == 1
            else {"params": parameters, "name": group_name(size), "moe": True}
            for size, parameters in sorted(by_size.items())
        ]


def _on_built(shards: ExpertShards, *, device: torch.device, dtype: torch.dtype) -> OnBuilt:
    """Partition the experts of each part, and bring it to the device, weights in a precision."""

    def on_built(part: nn.Module) -> None:
        shards.partition(part)
        for parameter in part.parameters():
            parameter.data = parameter.data.to(device, dtype)
        for buffer in part.buffers():
            buffer.data = buffer.data.to(device)

    return on_built


def _order_gradients(zero: Any) -> None:
    """Let gradients that are made on two streams wait for the buckets that they are copied into.

    DeepSpeed orders each stream with the reduction of a bucket where it offloads gradients. Else
    only the stream that fills a bucket waits until the one before it is reduced, and another one
    would write into that. A parameter larger than a bucket is reduced where its gradient is, which
    must not be given back before that.
    """
    switch = "_offload_gradient_safety_enabled"
    assert hasattr(zero, switch)  # in every tested version
    setattr(zero, switch, True)


@contextmanager
def _keep_zero_optimizer() -> Iterator[None]:
    """Let ZeRO-1 in bf16 add gradients up in fp32 with the optimizer that it has otherwise.

    DeepSpeed would take another one for that alone, which has no update that it skips: a gradient
    that is not finite ends training by an assertion.
    """
    from deepspeed.runtime import engine

    chosen = engine.BFLOAT16
    engine.BFLOAT16 = engine.ZERO_OPTIMIZATION
    try:
        yield
    finally:
        engine.BFLOAT16 = chosen


def import_deepspeed() -> Any:
    """Import DeepSpeed without compiling anything.

    It is imported late because the process that only drives a cluster must not need it. Its
    shared-memory collective for CPU is built with a C++ compiler on first use and serves
    inference only, so it is declared incompatible before anything asks for it.

    Raises:
        UntestedVersion: What is private in it is not known in this version.
    """
    require_tested("deepspeed", TESTED_DEEPSPEED)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Each takes about a second of every start, and nothing here uses it: the autotuner imports
    # MLflow, and Muon's update is compiled as it is imported, for which torch loads its compiler.
    for module, names in _UNUSED.items():
        unused = ModuleType(module)
        vars(unused).update((name, type(name, (), {})) for name in names)
        sys.modules.setdefault(module, unused)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's business, and a line per rank for every user.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
    return deepspeed
