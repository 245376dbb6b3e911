"""The reference engine: gradients averaged by all-reduce, AdamW of torch, nothing hidden."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.ema import EmaConfig
from trainer.engine.ema import MovingAverages
from trainer.engine.expert_shards import ExpertShards, draw_initial_weights, shards_of, whole_shape
from trainer.engine.optimizer import OptimConfig, adamw, moments_of
from trainer.engine.protocol import Arrange, BuildModel, UpdateOutcome
from trainer.state import Fragment


class PlainEngine:
    """Training in plain torch; what the other engines are held against.

    Every rank holds all weights but those of sharded experts, and the whole state of its weights.

    Args:
        build_model: Builds the model with the same initial weights on every rank.
        arrange: Says how that model is computed.
        shards: Partitions the experts.
        device: Where the model is computed.
        optim: Optimizer settings.
        ema: Decays of the moving averages, and where they are kept.
        grad_accum_steps: Forward passes per update.
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
    ) -> None:
        def on_built(part: nn.Module) -> None:
            shards.partition(part)
            part.to(device)

        self._build_model, self._experts = build_model, shards
        model = build_model(on_built)
        arrange(model)
        self._model: nn.Module = model
        self._clip_norm = optim.clip_norm
        self._grad_accum_steps = grad_accum_steps
        self._named = dict(model.named_parameters())
        self._shards = shards_of(model)
        self._weights = list(self._named.values())
        self._averages = MovingAverages(self._weights, config=ema)
        self._optimizer = adamw(self._weights, optim)

    def __call__(
        self, states: tuple[Tensor, ...], time: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Run the model."""
        velocities: tuple[Tensor, ...] = self._model(states, time, labels)
        return velocities

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add one micro-batch's gradient."""
        (loss / self._grad_accum_steps).backward()  # type: ignore[no-untyped-call]

    def update(self, *, learning_rate: float, ema_decays: Sequence[float]) -> UpdateOutcome:
        """Average gradients over ranks, clip, apply AdamW, follow with the averages."""
        self._average_gradients()
        norm = self._global_norm()
        finite = bool(torch.isfinite(norm))
        if finite:
            if self._clip_norm > 0:
                nn.utils.clip_grads_with_norm_(self._weights, self._clip_norm, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._averages.join()
            self._optimizer.step()
            self._averages.follow(self._weights, decays=ema_decays)
        self._optimizer.zero_grad(set_to_none=True)
        return UpdateOutcome(applied=finite, gradient_norm=float(norm) if finite else float("inf"))

    def _average_gradients(self) -> None:
        if not dist.is_initialized():
            return
        for name, parameter in self._named.items():
            gradient = self._gradient(parameter)
            # A shard's gradient already is a sum over its expert group, for whose images it was
            # used. Adding up its replica group, one rank of each expert group, makes it the sum
            # over all ranks, as it is for weights that every rank has; so both are divided by
            # the number of ranks.
            shard = self._shards.get(name)
            dist.all_reduce(gradient, group=None if shard is None else shard.replica_group)
            gradient.div_(dist.get_world_size())

    def _global_norm(self) -> Tensor:
        """The norm over all weights, parts of other ranks included; the same bits on every rank."""
        whole = [self._gradient(p) for name, p in self._named.items() if name not in self._shards]
        norms = [nn.utils.get_total_norm(whole)]
        for exchange in dict.fromkeys(self._shards.values()):
            parts = [
                self._gradient(self._named[name])
                for name, its in self._shards.items()
                if its is exchange
            ]
            square = nn.utils.get_total_norm(parts).square()
            dist.all_reduce(square, group=exchange.group)
            norms.append(square.sqrt())
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        if dist.is_initialized():
            # Each expert group adds up on its own, and on another node perhaps in another order.
            # Weights that are the same on all ranks stay so only if all clip by the same bits.
            dist.broadcast(norm, src=0)
        return norm

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """The accumulated gradient; zero, not nothing, for weights that were not used.

        AdamW passes over a parameter without a gradient, decay included, while sharded engines,
        whose gradients are one flat tensor, give it zeros.
        """
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def fragments(self) -> Sequence[Fragment]:
        """Return each parameter as one fragment: whole, or this rank's shard of it."""
        result, averages = [], self._averages.values()
        for place, (name, parameter) in enumerate(self._named.items()):
            shard = self._shards.get(name)
            moments = moments_of(self._optimizer, parameter)
            tensors = {
                "master": parameter.detach().view(-1),
                "exp_avg": moments["exp_avg"].view(-1),
                "exp_avg_sq": moments["exp_avg_sq"].view(-1),
                **{kind: values[place].view(-1) for kind, values in averages.items()},
            }
            result.append(
                Fragment(
                    name=name,
                    start=0 if shard is None else shard.index * parameter.numel(),
                    shape=whole_shape(parameter.shape, shard),
                    tensors=tensors,
                )
            )
        return result

    def load_fragments(self, updates: int) -> None:
        """Set the optimizer's step count; weights and moments were overwritten in place."""
        for parameter in self._weights:
            moments_of(self._optimizer, parameter)["step"].fill_(updates)

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """Swap the EMA in for the length of the block."""
        with self._averages.set_aside(self._weights), self._experts.passing_buffers():
            self._averages.copy_to(self._weights)
            yield self._model

    @contextmanager
    def initial_weights(self) -> Iterator[nn.Module]:
        """Draw the initial weights into the model for the length of the block."""
        with self._averages.set_aside(self._weights), self._experts.passing_buffers():
            self._draw()
            yield self._model

    @torch.no_grad()
    def _draw(self) -> None:
        draw_initial_weights(
            self._build_model, self._experts, lambda n, value: self._weights[n].copy_(value)
        )
