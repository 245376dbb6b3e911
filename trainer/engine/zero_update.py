"""ZeRO-1 and ZeRO-2: DeepSpeed's partition and buckets, with a reduction and an update of our own.

DeepSpeed copies gradients out of a bucket to reduce them and back again, then into a buffer of
whole parameters, and joins that to a flat tensor for the update; it looks through all of them for
what is not finite, once more for their norm, and waits for the device several times. Here a bucket
is reduced where it is, the part of this rank goes to its place in the flat gradient at once, and
the update is `MasterUpdate`, which the host does not wait for.

What is private to DeepSpeed in this is held to account by the conformance tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.ema import EmaConfig
from trainer.engine.optimizer import OptimConfig, moments_of
from trainer.engine.protocol import UpdateOutcome
from trainer.engine.update import FlatAdamW, MasterUpdate


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """What one rank keeps of the gradient of one parameter.

    Attributes:
        owner: The rank, by its number in the parameter's process group.
        start: First element, in the flattened parameter.
        numel: Elements.
        offset: First element in the owner's flat gradient.
    """

    owner: int
    start: int
    numel: int
    offset: int


@dataclass(kw_only=True, eq=False)
class _Group:
    """The parameters of one optimizer group, which the same ranks hold.

    Attributes:
        process_group: Those ranks.
        parts: By DeepSpeed's number of each parameter: its parts, in order.
        own: Those of them that this rank keeps.
        numel: Elements of this rank's flat gradient, padding included.
        flat: The gradient, while there is one.
        written: Numbers of the parameters whose part has been written since the last update.
    """

    process_group: Any
    parts: dict[int, list[_Part]]
    own: dict[int, _Part]
    numel: int
    flat: Tensor | None = None
    written: set[int] = field(default_factory=set)

    def place(self, part: _Part) -> Tensor:
        """Where a part of this rank's is in the gradient."""
        assert self.flat is not None
        return self.flat.narrow(0, part.offset, part.numel)


class ZeroUpdate:
    """Reduces gradients and applies updates in the place of DeepSpeed's ZeRO-1 or ZeRO-2.

    Args:
        zero: DeepSpeed's optimizer, whose hooks fill its buckets; what they do with full ones is
            replaced. It has no state in host memory.
        optim: Optimizer settings.
        ema: Decays of the moving averages, and where they are kept.
    """

    def __init__(self, zero: Any, *, optim: OptimConfig, ema: EmaConfig) -> None:
        self._zero = zero
        self._ranks = dist.get_world_size(zero.dp_process_group)
        # Of one dimension, so that a mean is rounded once, to the precision that it is kept in.
        self._share = torch.tensor([1 / self._ranks], device=zero.bit16_groups[0][0].device)
        self._to_owners = not zero.use_multi_rank_bucket_allreduce
        self._groups = [_group_of(zero, number) for number in range(len(zero.bit16_groups))]
        masters: list[Tensor] = zero.single_partition_of_fp32_groups
        moments = [moments_of(zero.optimizer, master) for master in masters]
        # One count for all, for the groups are updated together.
        for each in moments[1:]:
            each["step"] = moments[0]["step"]
        flats = [master.detach() for master in masters]
        self._masters = flats
        self._update = MasterUpdate(
            FlatAdamW(
                flats,
                [each["exp_avg"] for each in moments],
                [each["exp_avg_sq"] for each in moments],
                steps=moments[0]["step"],
                optim=optim,
            ),
            flats,
            optim=optim,
            ema=ema,
        )
        self.averages = self._update.averages
        self._take_over()

    def _take_over(self) -> None:
        """Replace what DeepSpeed does with a full bucket, and after the backward pass."""
        zero = self._zero
        # By this switch it reduces a bucket as a whole, on the stream that is for it.
        zero.reduce_scatter = False
        zero.gradient_reduction_w_predivide = self._reduce
        zero._add_full_reduction_to_compact_grad_partition = lambda *_: None
        zero.copy_grads_in_partition = lambda parameter, *_: zero.clear_grad_attribute(parameter)
        zero.overlapping_partition_gradients_reduce_epilogue = self._end_backward
        zero.step = lambda *_: None
        zero.overflow = False

    @torch.no_grad()
    def _reduce(self, bucket: Tensor, wire_dtype: torch.dtype) -> Tensor:
        """Add up a bucket over ranks, where it is, and keep this rank's part.

        Args:
            bucket: Gradients of whole parameters, one after the other, flat.
            wire_dtype: In what they are exchanged.
        """
        zero = self._zero
        sent = bucket.to(wire_dtype)
        pieces: dict[tuple[int, int | None], list[tuple[Tensor, int, _Part]]] = {}
        begin = 0
        for number, place, parameter_id in zero.ipg_buckets[wire_dtype].params:
            for part in self._groups[number].parts[parameter_id]:
                piece = sent.narrow(0, begin + part.start, part.numel)
                owner = part.owner if self._to_owners else None
                pieces.setdefault((number, owner), []).append((piece, parameter_id, part))
            begin += zero.bit16_groups[number][place].numel()
        for (number, owner), cut in pieces.items():
            group = self._groups[number]
            joined = _join([piece for piece, _, _ in cut])
            if owner is None:
                dist.all_reduce(joined, group=group.process_group)
            else:
                dist.reduce(joined, group=group.process_group, group_dst=owner)
            reduced = torch.split(joined, [part.numel for _, _, part in cut])
            for mean, (_, parameter_id, part) in zip(reduced, cut, strict=True):
                if group.own.get(parameter_id) is part:
                    self._keep(group, parameter_id, mean)
        return sent

    def _keep(self, group: _Group, parameter_id: int, total: Tensor) -> None:
        """Take the mean over ranks into the flat gradient; add it to what is there."""
        if group.flat is None:
            group.flat = torch.empty(
                group.numel, dtype=self._zero.gradient_accumulation_dtype, device=total.device
            )
        place = group.place(group.own[parameter_id])
        if parameter_id in group.written:
            place.add_(total, alpha=1 / self._ranks)
        else:
            torch.mul(total, self._share, out=place)
            group.written.add(parameter_id)

    def _end_backward(self) -> None:
        """Reduce what the last buckets hold, and forget the gradients of parameters."""
        zero = self._zero
        zero.reduce_ipg_grads()
        zero.params_already_reduced = [False] * len(zero.params_already_reduced)
        if zero.overlap_comm and zero.reduction_stream is not None:
            # The device waits; the host does not, as DeepSpeed would have it.
            stream = torch.cuda.current_stream()
            stream.wait_stream(zero.reduction_stream)
            for group in self._groups:
                if group.flat is not None:
                    group.flat.record_stream(stream)
        zero._release_ipg_buffers()
        zero._clear_param_grad_only()
        zero._epilogue_ran_this_backward = True

    @torch.no_grad()
    def apply(self, *, learning_rate: float, ema_decays: Sequence[float] | Tensor) -> UpdateOutcome:
        """Apply the gradient of this update on all ranks, or on none when it is not finite."""
        norm = self._global_norm()
        divisor = self._update.divisor(norm)
        gradients = []
        for group in self._groups:
            gradient = self._whole(group)
            group.flat = None
            group.written.clear()
            if gradient.dtype != torch.float32:
                # By a tensor of one dimension, so that the quotient is in float32.
                gradient = gradient.float() if divisor is None else gradient / divisor.view(1)
            gradients.append(gradient)
        if self._zero.gradient_accumulation_dtype != torch.float32:
            divisor = None
        outcome = self._update.apply(
            gradients, norm, divisor=divisor, learning_rate=learning_rate, ema_decays=ema_decays
        )
        self._zero.update_lp_params()
        return outcome

    def _whole(self, group: _Group) -> Tensor:
        """The flat gradient, with zeros for padding and for what this update does not use.

        Those are the weights of scales that a stage leaves out; AdamW sees to them all the same.
        """
        if group.flat is None:
            device = self._masters[0].device
            dtype = self._zero.gradient_accumulation_dtype
            return torch.zeros(group.numel, dtype=dtype, device=device)
        for parameter_id, part in group.own.items():
            if parameter_id not in group.written:
                group.place(part).zero_()
        used = max((part.offset + part.numel for part in group.own.values()), default=0)
        group.flat[used:].zero_()
        return group.flat

    def _global_norm(self) -> Tensor:
        """The norm over the gradients of all weights, the same bits on every rank."""
        own = [
            group.place(part)
            for group in self._groups
            for parameter_id, part in group.own.items()
            if parameter_id in group.written
        ]
        square = torch.zeros((), device=self._masters[0].device)
        if own:
            norms = torch._foreach_norm(own, 2, dtype=torch.float32)
            square = torch.stack(norms).square().sum()
        dist.all_reduce(square, group=self._zero.dp_process_group)
        return square.sqrt()


def _group_of(zero: Any, number: int) -> _Group:
    """Read how DeepSpeed has cut the parameters of an optimizer group."""
    process_group = zero.real_dp_process_group[number]
    size = int(zero.partition_size[number])
    parameters: list[nn.Parameter] = zero.bit16_groups[number]
    parts: dict[int, list[_Part]] = {}
    begin = 0
    for parameter in parameters:
        end = begin + parameter.numel()
        parts[zero.get_param_id(parameter)] = [
            _Part(
                owner=owner,
                start=max(begin, owner * size) - begin,
                numel=min(end, (owner + 1) * size) - max(begin, owner * size),
                offset=max(begin, owner * size) - owner * size,
            )
            for owner in range(begin // size, -(-end // size))
        ]
        begin = end
    rank = dist.get_rank(process_group)
    return _Group(
        process_group=process_group,
        parts=parts,
        own={number: part for number, cut in parts.items() for part in cut if part.owner == rank},
        numel=size,
    )


def _join(pieces: Sequence[Tensor]) -> Tensor:
    """Join flat pieces of one tensor: where they lie side by side, without copying."""
    first, end = pieces[0], pieces[0].storage_offset()
    for piece in pieces:
        if piece.storage_offset() != end:
            return torch.cat(tuple(pieces))
        end += piece.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))
