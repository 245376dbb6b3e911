"""What a rank holds of a model under DeepSpeed ZeRO, expert shards included.

DeepSpeed keeps, per optimizer group, one flat fp32 tensor on each rank, the master weights; moments
and EMA have the same layout. Where a parameter lies in it is read from DeepSpeed's own bookkeeping,
which is private to it and held to account by the conformance tests.

DeepSpeed reduces the gradients of an expert over the ranks that hold it, divides by the number of
all ranks, and shards the optimizer state of an expert over its replica group. That is the mean over
all images when each expert saw the images of its whole expert group, as it does here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import get_process_group_ranks

from models.transformer.lapflow import OnBuilt
from trainer.engine.exchange import Exchange
from trainer.engine.expert_layers import JointLayer
from trainer.engine.expert_shards import shards_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """Where a part of a parameter lies in a flat tensor.

    Attributes:
        parameter: The model's parameter.
        start: First element of the part, in the flattened parameter as this rank has it.
        group: Index of the flat tensor.
        offset: First element of the part in the flat tensor.
        numel: Length of the part, in elements.
    """

    parameter: nn.Parameter
    start: int
    group: int
    offset: int
    numel: int


class ZeroPartition(Protocol):
    """This rank's part of the master weights."""

    @property
    def masters(self) -> list[Tensor]:
        """The flat fp32 tensors, which the optimizer updates."""
        ...

    def slices(self) -> Iterator[Slice]:
        """Tell which parts of which parameters they hold."""
        ...

    def sync_params(self) -> None:
        """Make the weights of the model follow the masters; a collective call."""
        ...

    def zero_stale_grads(self) -> None:
        """Zero the gradients of an update that is over.

        DeepSpeed overwrites them in the next one, except those of weights that it does not use: of
        the scales that a stage leaves out. For them it would apply the old ones again.
        """
        ...


class StatePartition:
    """ZeRO-1 and ZeRO-2: the flattened weights of a group, cut into equal parts.

    Args:
        optimizer: DeepSpeed's optimizer of these stages.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def masters(self) -> list[Tensor]:
        """The flat fp32 tensors, which the optimizer updates."""
        masters: list[Tensor] = self._optimizer.single_partition_of_fp32_groups
        return masters

    def slices(self) -> Iterator[Slice]:
        """Tell which parts of which parameters they hold."""
        for parameters in self._optimizer.bit16_groups:
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    address = mapping.hp_fragment_address
                    yield Slice(
                        parameter=parameter,
                        start=mapping.lp_fragment_address.start,
                        group=mapping.param_group_index,
                        offset=address.start,
                        numel=address.numel,
                    )

    def sync_params(self) -> None:
        """Copy the masters into the model's weights on all ranks."""
        self._optimizer.update_lp_params()

    def zero_stale_grads(self) -> None:
        """Zero the gradients of an update that is over."""
        _zero_gradients(self.masters)


class WeightPartition:
    """ZeRO-3: each weight cut into equal parts, which are joined where the weight is used.

    Args:
        optimizer: DeepSpeed's optimizer of this stage.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def masters(self) -> list[Tensor]:
        """The flat fp32 tensors, which the optimizer updates."""
        masters: list[Tensor] = self._optimizer.fp32_partitioned_groups_flat
        return masters

    def slices(self) -> Iterator[Slice]:
        """Tell which parts of which parameters they hold."""
        for group, parameters in enumerate(self._optimizer.fp16_groups):
            offset = 0
            for parameter in parameters:
                part = parameter.partition_numel()
                start = parameter.ds_zero_partition_rank * part
                # The last parts are filled up with padding, and may be nothing else.
                numel = min(part, parameter.ds_numel - start)
                if numel > 0:
                    yield Slice(
                        parameter=parameter, start=start, group=group, offset=offset, numel=numel
                    )
                offset += part

    def sync_params(self) -> None:
        """Copy the masters into each rank's parts, and into the small weights that stay joined."""
        self._optimizer._partition_all_parameters()
        for group in range(len(self.masters)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if self._optimizer.persistent_parameters:
            joined = self._optimizer.persistent_parameters
            joined[0].all_gather(joined)

    def zero_stale_grads(self) -> None:
        """Zero the gradients of an update that is over."""
        self._optimizer.grad_partitions_flat_buffer.zero_()
        _zero_gradients(self.masters)


def _zero_gradients(masters: list[Tensor]) -> None:
    for master in masters:
        # Kept from one update to the next only where they are in host memory.
        if master.grad is not None:
            master.grad.zero_()


def group_name(size: int) -> str:
    """Return DeepSpeed's name of the groups of experts partitioned over `size` ranks."""
    return f"ep_size_{size}"


def lend_groups(exchanges: Iterable[Exchange]) -> None:
    """Let DeepSpeed reduce shards in the groups that there are, instead of forming its own.

    On GPUs each group has a communicator, with buffers of its own.
    """
    import deepspeed
    from deepspeed.utils import groups

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    for exchange in exchanges:
        name = group_name(exchange.ranks)
        groups._EXPERT_PARALLEL_GROUP[name] = exchange.group
        groups._EXPERT_PARALLEL_GROUP_RANKS[name] = get_process_group_ranks(exchange.group)
        groups._EXPERT_DATA_PARALLEL_GROUP[name] = exchange.replica_group
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = get_process_group_ranks(
            exchange.replica_group
        )


def mark_expert_groups(model: nn.Module) -> None:
    """Tell the engines of ZeRO-1 and ZeRO-2 which weights of a model are expert shards."""
    shards = shards_of(model)
    if not shards:
        return
    from deepspeed.moe.layer import MoE

    class ExpertGroup(MoE):  # type: ignore[misc]
        """The engine looks for one of these modules; what theirs do is not wanted here."""

        def __init__(self, size: int) -> None:
            nn.Module.__init__(self)
            self.num_experts = size

        def set_deepspeed_parallelism(self, _use_data_before_expert: bool = False) -> None:
            """The groups are there; `lend_groups` has seen to it."""

    model.expert_groups = nn.ModuleList(
        ExpertGroup(size) for size in sorted({exchange.ranks for exchange in shards.values()})
    )
    parameters = dict(model.named_parameters())
    for name, exchange in shards.items():
        # Read by DeepSpeed: not for all ranks to reduce, but for those of this group.
        parameters[name].allreduce = False  # type: ignore[attr-defined]
        parameters[name].group_name = group_name(exchange.ranks)  # type: ignore[attr-defined]


def partition_on_built(on_built: OnBuilt, settings: dict[str, Any], dtype: torch.dtype) -> OnBuilt:
    """Let each part of a model settle as ZeRO-3 keeps it: weights partitioned over their ranks."""
    from deepspeed import zero

    def on_built_and_partition(part: nn.Module) -> None:
        on_built(part)
        parameters = dict(part.named_parameters())
        for name, exchange in shards_of(part).items():
            parameter: Any = parameters[name]
            # Without the last of these three, DeepSpeed averages different shards in silence.
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = group_name(exchange.ranks)
            parameter.ds_zero_partition_process_group = exchange.replica_group
        zero.Init(module=part, config_dict_or_path=settings, dtype=dtype)
        for name, exchange in shards_of(part).items():
            partitioned: Any = parameters[name]
            assert partitioned.ds_process_group is exchange.replica_group, name

    return on_built_and_partition


def lend_weights(model: nn.Module) -> None:
    """Tell ZeRO-3 where weights are used other than by their own layer, to join them there."""
    from deepspeed import zero

    for module in model.modules():
        if isinstance(module, JointLayer):
            for parameter in module.borrowed:
                zero.register_external_parameter(module, parameter)
