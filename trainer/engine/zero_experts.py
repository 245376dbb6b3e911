"""Expert shards as DeepSpeed knows them: each over its own group of ranks.

DeepSpeed reduces the gradients of an expert over the ranks that hold it, divides by the number of
all ranks, and shards the optimizer state of an expert over its holders. That is the mean over all
images when each expert saw the images of its whole expert group, as it does here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from models.transformer.lapflow import Settle
from trainer.engine.expert_shards import ExpertShards, shards_of


def group_name(size: int) -> str:
    """Return DeepSpeed's name of the groups of experts divided over `size` ranks."""
    return f"ep_size_{size}"


def form_groups(sizes: Sequence[int]) -> None:
    """Let DeepSpeed form its groups for experts divided over these numbers of ranks."""
    import deepspeed
    from deepspeed.utils import groups

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    for size in sizes:
        groups._create_expert_and_data_parallel(size)


def mark_expert_groups(model: nn.Module, sizes: Sequence[int]) -> None:
    """Tell the engines of ZeRO-1 and ZeRO-2 which weights of a model are expert shards."""
    if not sizes:
        return
    from deepspeed.moe.layer import MoE

    class ExpertGroup(MoE):  # type: ignore[misc]
        """The engine looks for one of these modules; what theirs do is not wanted here."""

        def __init__(self, size: int) -> None:
            nn.Module.__init__(self)
            self.num_experts = size

        def set_deepspeed_parallelism(self, _use_data_before_expert: bool = False) -> None:
            """The groups have been formed."""

    model.expert_groups = nn.ModuleList(ExpertGroup(size) for size in sizes)
    parameters = dict(model.named_parameters())
    for name, exchange in shards_of(model).items():
        # Read by DeepSpeed: not for all ranks to reduce, but for those of this group.
        parameters[name].allreduce = False  # type: ignore[attr-defined]
        parameters[name].group_name = group_name(exchange.ranks)  # type: ignore[attr-defined]


def settle_divided(
    settle: Settle, shards: ExpertShards, settings: dict[str, Any], dtype: torch.dtype
) -> Settle:
    """Let each part of a model settle as ZeRO-3 keeps it: its weights divided over their ranks."""
    from deepspeed import zero
    from deepspeed.utils import groups

    holders = {
        size: groups._get_expert_data_parallel_group(group_name(size)) for size in shards.sizes
    }

    def settle_and_divide(part: nn.Module) -> None:
        settle(part)
        parameters = dict(part.named_parameters())
        for name, exchange in shards_of(part).items():
            parameter: Any = parameters[name]
            # Without the last of these three, DeepSpeed averages different shards in silence.
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = group_name(exchange.ranks)
            parameter.ds_zero_partition_process_group = holders[exchange.ranks]
        zero.Init(module=part, config_dict_or_path=settings, dtype=dtype)
        for name, exchange in shards_of(part).items():
            divided: Any = parameters[name]
            assert divided.ds_process_group is holders[exchange.ranks], name

    return settle_and_divide
