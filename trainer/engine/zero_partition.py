"""What a rank holds of a model under DeepSpeed ZeRO, by stage: flat fp32 tensors and their slices.

DeepSpeed keeps, per optimizer group, one flat fp32 tensor on each rank, the master weights; moments
and EMA have the same layout. Where a parameter lies in it is read from DeepSpeed's own bookkeeping,
which is private to it and held to account by the conformance tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


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

    def publish(self) -> None:
        """Make the weights of the model follow the masters; a collective call."""
        ...

    def forget_gradients(self) -> None:
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

    def publish(self) -> None:
        """Copy the masters into the model's weights on all ranks."""
        self._optimizer.update_lp_params()

    def forget_gradients(self) -> None:
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

    def publish(self) -> None:
        """Copy the masters into each rank's parts, and into the small weights that stay joined."""
        self._optimizer._partition_all_parameters()
        for group in range(len(self.masters)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if self._optimizer.persistent_parameters:
            joined = self._optimizer.persistent_parameters
            joined[0].all_gather(joined)

    def forget_gradients(self) -> None:
        """Zero the gradients of an update that is over."""
        self._optimizer.grad_partitions_flat_buffer.zero_()
        _zero_gradients(self.masters)


def _zero_gradients(masters: list[Tensor]) -> None:
    for master in masters:
        # Kept from one update to the next only where they are in host memory.
        if master.grad is not None:
            master.grad.zero_()
