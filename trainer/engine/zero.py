"""DeepSpeed ZeRO 1 and 2 behind the engine protocol, with the EMA sharded like the optimizer.

DeepSpeed keeps, per optimizer group, one flat fp32 partition on each rank. A fragment is the part
of one parameter inside that partition; the EMA is one more flat tensor of the same length. Nothing
here saves or loads files: checkpoints are made of fragments, so they do not depend on DeepSpeed's
own formats, world sizes or pickles.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.engine.adamw import adamw, moments_of
from trainer.engine.protocol import EngineConfig, UpdateOutcome
from trainer.engine.zero_config import zero_config
from trainer.schedule import OptimConfig
from trainer.state import Fragment


class ZeroEngine:
    """Training through `deepspeed.initialize`, on the process group that already exists.

    Args:
        model: The model, with the same weights on every rank, on its device.
        config: Engine settings (stage, precision, pass-through).
        optim: Optimizer settings.
        micro_batch: Images per rank and forward pass.
        accumulation: Forward passes per update.
        world_size: Number of ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        config: EngineConfig,
        optim: OptimConfig,
        micro_batch: int,
        accumulation: int,
        world_size: int,
    ) -> None:
        deepspeed = _import_deepspeed()
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self._deepspeed, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=adamw(model.parameters(), optim),
            config=zero_config(
                config,
                micro_batch=micro_batch,
                accumulation=accumulation,
                world_size=world_size,
                clip_norm=optim.clip_norm,
            ),
        )
        self._masters: list[Tensor] = self._zero.single_partition_of_fp32_groups
        self._ema = [master.detach().clone() for master in self._masters]

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

    def update(self, *, learning_rate: float, ema_decay: float) -> UpdateOutcome:
        """Apply the update; a non-finite global norm makes every rank skip it alike."""
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._deepspeed.step()
        if self._zero.overflow:
            return UpdateOutcome(applied=False, gradient_norm=float("inf"))
        with torch.no_grad():
            for ema, master in zip(self._ema, self._masters, strict=True):
                ema.lerp_(master, 1.0 - ema_decay)
        return UpdateOutcome(
            applied=True, gradient_norm=float(self._deepspeed.get_global_grad_norm())
        )

    def fragments(self) -> Sequence[Fragment]:
        """Return views of this rank's partition, one per parameter that overlaps it."""
        result = []
        for group, flat_ema in zip(self._zero.bit16_groups, self._ema, strict=True):
            for parameter in group:
                mapping: Any = parameter._hp_mapping
                if mapping is None:
                    continue
                address = mapping.hp_fragment_address
                flats = self._flats(mapping.param_group_index, flat_ema)
                result.append(
                    Fragment(
                        name=self._names[parameter],
                        start=mapping.lp_fragment_address.start,
                        shape=tuple(parameter.shape),
                        tensors={
                            kind: flat.narrow(0, address.start, address.numel)
                            for kind, flat in flats.items()
                        },
                    )
                )
        return result

    def load_fragments(self, updates: int) -> None:
        """Copy the overwritten fp32 shards into the model's weights on all ranks."""
        for master in self._masters:
            moments_of(self._zero.optimizer, master)["step"].fill_(updates)
        self._zero.update_lp_params()

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """Swap the shards, not full copies: EMA in, gather, and the masters back afterwards."""
        kept = [master.detach().clone() for master in self._masters]
        self._overwrite_masters(self._ema)
        self._zero.update_lp_params()
        try:
            yield self._deepspeed.module
        finally:
            self._overwrite_masters(kept)
        # Not after an error: the other ranks would not be in this collective.
        self._zero.update_lp_params()

    @torch.no_grad()
    def _overwrite_masters(self, shards: Sequence[Tensor]) -> None:
        for master, shard in zip(self._masters, shards, strict=True):
            master.copy_(shard)

    def _flats(self, group_index: int, flat_ema: Tensor) -> dict[str, Tensor]:
        master = self._masters[group_index]
        moments = moments_of(self._zero.optimizer, master)
        return {
            "master": master.detach(),
            "exp_avg": moments["exp_avg"],
            "exp_avg_sq": moments["exp_avg_sq"],
            "ema": flat_ema,
        }


def _import_deepspeed() -> Any:
    """Import DeepSpeed without compiling anything.

    It is imported late because the process that only drives a cluster must not need it. Its
    shared-memory collective for CPU is built with a C++ compiler on first use and serves
    inference only, so it is declared incompatible before anything asks for it.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's business, and a line per rank for every user.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated")
    return deepspeed
