"""The engine of one device, and what the others are held against: plain torch, nothing hidden.

Gradients are taken as autograd leaves them. Where the model computes in bf16 they are copied into
one fp32 tensor, and so they are where ranks add them up. The update is then one call each for the
norm, AdamW, the averages and the bf16 copy of the weights, whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.ema import EmaConfig
from trainer.engine.exchange import Exchange
from trainer.engine.expert_shards import ExpertShards, draw_initial_weights, shards_of, whole_shape
from trainer.engine.flat import FlatWeights
from trainer.engine.optimizer import OptimConfig
from trainer.engine.protocol import Arrange, BuildModel, UpdateOutcome
from trainer.engine.update import FlatAdamW, MasterUpdate
from trainer.state import Fragment


class _Sums(NamedTuple):
    """Gradients in fp32: one flat tensor, and the part of each parameter in it."""

    flat: Tensor
    views: list[Tensor]


class PlainEngine:
    """Training in plain torch.

    Every rank holds all weights but those of sharded experts, and the whole state of its weights.

    Args:
        build_model: Builds the model with the same initial weights on every rank.
        arrange: Says how that model is computed.
        shards: Partitions the experts.
        device: Where the model is computed.
        optim: Optimizer settings.
        ema: Decays of the moving averages, and where they are kept.
        grad_accum_steps: Forward passes per update.
        dtype: In which the model computes; weights, moments and averages are float32.
        sum_dtype: In which the gradients of several forward passes are added up.
    """

    def __init__(
        self,
        build_model: BuildModel,
        *,
        arrange: Arrange,
        shards: ExpertShards,
        optim: OptimConfig,
        ema: EmaConfig,
        grad_accum_steps: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        sum_dtype: torch.dtype = torch.float32,
    ) -> None:
        def on_built(part: nn.Module) -> None:
            shards.partition(part)
            part.to(device)

        self._build_model, self._experts, self._dtype = build_model, shards, dtype
        model = build_model(on_built)
        self._model: nn.Module = model
        self._grad_accum_steps = grad_accum_steps
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._shards = shards_of(model)
        self._order = {name: place for place, (name, _) in enumerate(model.named_parameters())}
        # Those of one group of ranks one after the other, so that they are added up at once.
        self._groups: dict[Exchange | None, list[str]] = {None: []}
        for name in self._order:
            self._groups.setdefault(self._shards.get(name), []).append(name)
        self._named = {
            name: model.get_parameter(name) for names in self._groups.values() for name in names
        }
        self._parameters = list(self._named.values())
        self._flat = FlatWeights(self._parameters, dtype=dtype)
        arrange(model)
        self._moments = [self._flat.like() for _ in range(2)]
        self._steps = torch.zeros((), device=device)
        self._update = MasterUpdate(
            FlatAdamW(
                self._flat.views(self._flat.master),
                *map(self._flat.views, self._moments),
                steps=self._steps,
                optim=optim,
            ),
            [self._flat.master],
            optim=optim,
            ema=ema,
        )
        self._sums: _Sums | None = None
        self._adds_up = grad_accum_steps > 1 and dtype != sum_dtype

    def __call__(
        self, states: tuple[Tensor, ...], time: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Run the model in the engine's precision."""
        states = tuple(state.to(self._dtype) for state in states)
        velocities: tuple[Tensor, ...] = self._model(states, time, labels)
        return tuple(velocity.float() for velocity in velocities)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add one micro-batch's gradient."""
        (loss / self._grad_accum_steps).backward()  # type: ignore[no-untyped-call]
        if self._adds_up:
            self._sums = self._joined(self._sums)

    def update(
        self, *, learning_rate: float, ema_decays: Sequence[float] | Tensor
    ) -> UpdateOutcome:
        """Average gradients over ranks, clip, apply AdamW, follow with the averages."""
        gradients = self._gradients()
        norm = self._global_norm(gradients)
        outcome = self._update.apply(
            gradients,
            norm,
            divisor=self._update.divisor(norm, ranks=self._ranks),
            learning_rate=learning_rate,
            ema_decays=ema_decays,
        )
        self._flat.publish()
        self._sums = None
        for parameter in self._parameters:
            parameter.grad = None
        return outcome

    def _gradients(self) -> list[Tensor]:
        """The gradients of this update in fp32: sums over the ranks that have the weight."""
        if self._ranks == 1 and self._dtype == torch.float32:
            return [
                torch.zeros_like(each) if each.grad is None else each.grad
                for each in self._parameters
            ]
        flat, views = self._sums if self._sums is not None else self._joined(None)
        if self._ranks > 1:
            first = 0
            for exchange, names in self._groups.items():
                # A shard's gradient already is a sum over its expert group, for whose images it was
                # used. Adding up its replica group, one rank of each expert group, makes it the sum
                # over all ranks, as it is for weights that every rank has; so both are divided by
                # the number of ranks.
                group = None if exchange is None else exchange.replica_group
                stop = first + len(names)
                dist.all_reduce(flat[self._flat.span(first, stop)], group=group)
                first = stop
        return views

    @torch.no_grad()
    def _joined(self, sums: _Sums | None) -> _Sums:
        """Add what autograd has left to one fp32 tensor, and let go of it."""
        gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        is_first = sums is None
        if sums is None:
            flat = torch.empty_like(self._flat.master)
            sums = _Sums(flat, self._flat.views(flat))
        into, used = [], []
        for place, gradient in zip(sums.views, gradients, strict=True):
            if gradient is not None:
                into.append(place)
                used.append(gradient)
            elif is_first:
                # AdamW passes over a parameter without a gradient, decay included. Sharded engines
                # give it zeros, and so does this one.
                place.zero_()
        (torch._foreach_copy_ if is_first else torch._foreach_add_)(into, used)
        return sums

    def _global_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of the mean over ranks, parts of other ranks included; alike on every rank."""
        norms, first = [], 0
        for exchange, names in self._groups.items():
            own = gradients[first : first + len(names)]
            first += len(names)
            norm = nn.utils.get_total_norm(own)
            if exchange is not None:
                square = norm.square()
                dist.all_reduce(square, group=exchange.group)
                norm = square.sqrt()
            norms.append(norm)
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        if self._ranks > 1:
            norm = norm / self._ranks
            # Each expert group adds up on its own, and on another node perhaps in another order.
            # Weights that are the same on all ranks stay so only if all clip by the same bits.
            dist.broadcast(norm, src=0)
        return norm

    def fragments(self) -> Sequence[Fragment]:
        """Return each parameter as one fragment: whole, or this rank's shard of it."""
        averages = self._update.averages.values()
        flats = {
            "master": self._flat.master,
            "exp_avg": self._moments[0],
            "exp_avg_sq": self._moments[1],
            **{kind: flat for kind, (flat,) in averages.items()},
        }
        views = {kind: self._flat.views(flat.detach()) for kind, flat in flats.items()}
        fragments = {}
        for place, (name, parameter) in enumerate(self._named.items()):
            shard = self._shards.get(name)
            fragments[name] = Fragment(
                name=name,
                start=0 if shard is None else shard.index * parameter.numel(),
                shape=whole_shape(parameter.shape, shard),
                tensors={kind: every[place].view(-1) for kind, every in views.items()},
            )
        return [fragments[name] for name in self._order]

    def load_fragments(self, updates: int) -> None:
        """Set the optimizer's step count, and have the model compute with what was overwritten."""
        self._steps.fill_(updates)
        self._flat.publish()

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """Swap the EMA in for the length of the block."""
        with self._other_weights():
            (average,) = self._update.averages.values()["ema"]
            self._flat.publish(average)
            yield self._model

    @contextmanager
    def initial_weights(self) -> Iterator[nn.Module]:
        """Draw the initial weights into the model for the length of the block."""
        with self._other_weights():
            self._draw()
            yield self._model

    @torch.no_grad()
    def _draw(self) -> None:
        in_order = [self._named[name] for name in self._order]
        draw_initial_weights(
            self._build_model, self._experts, lambda number, value: in_order[number].copy_(value)
        )

    @contextmanager
    def _other_weights(self) -> Iterator[None]:
        """Let a `with` block overwrite what the model computes with; it is as before after it."""
        kept: AbstractContextManager[None] = nullcontext()
        if not self._flat.is_copied:
            kept = self._update.averages.set_aside([self._flat.master])
        with kept, self._experts.passing_buffers():
            try:
                yield
            finally:
                self._flat.publish()
