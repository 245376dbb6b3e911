"""Moving averages of a rank's weights: where they are kept, and how they follow them.

On the host it follows by the arithmetic of the device, on the device: its values come in chunk by
chunk, move towards the weights by the same `lerp_`, and go back, beside whatever the device
computes next. So both settings give the same bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from models.ema import EmaConfig, EmaDevice
from trainer.engine.ema_room import LANES, room_elements
from trainer.host_memory import host_buffer


def decays_on_device(config: EmaConfig, updates: Tensor) -> Tensor:
    """Decays of the update that follows so many applied ones, which only the device may know.

    Args:
        config: The averages.
        updates: Number of updates before this one, float64, 0-D.

    Returns:
        To the bit what `EmaConfig.decays_at` says, float64 [averages], on the device of `updates`.
    """
    long = [torch.full_like(updates, decay) for decay in config.long_decays]
    if config.warmup:
        ramp = (1 + updates) / (10 + updates)
        long = [torch.minimum(decay, ramp) for decay in long]
    return torch.stack(long)


class Lane(NamedTuple):
    """A queue of chunks that are updated one after the other, beside those of other lanes.

    Attributes:
        room: 1-D, on the device of the weights; holds the chunk that is updated.
        stream: What is queued on; None is the caller's own stream, or the CPU.
    """

    room: Tensor
    stream: torch.cuda.Stream | None


@torch.no_grad()
def follow_in_chunks(
    averages: Sequence[Tensor],
    weights: Sequence[Tensor],
    share: float | Tensor,
    *,
    lanes: Sequence[Lane],
) -> None:
    """Queue what moves averages towards weights that are in another memory.

    Args:
        averages: Contiguous float32 tensors, overwritten.
        weights: As many, of the same sizes.
        share: Weight of the weights, a number or one on their device; the averages keep the rest.
        lanes: Take chunks in turn; their rooms are of one length.
    """
    turns = cycle(lanes)
    chunk = lanes[0].room.numel()
    for average, weight in zip(averages, weights, strict=True):
        old, new = (torch.split(each.detach().view(-1), chunk) for each in (average, weight))
        for held, followed in zip(old, new, strict=True):
            lane = next(turns)
            with torch.cuda.stream(lane.stream):
                room = lane.room[: held.numel()]
                room.copy_(held, non_blocking=True)
                room.lerp_(followed, share)
                held.copy_(room, non_blocking=True)


class MovingAverage:
    """The average of the fp32 weights that a rank holds, in as many tensors of their shapes.

    Args:
        weights: Float32 tensors on one device; the average begins with their values.
        device: Keep it beside the weights, or in page-locked host memory. Weights that are in host
            memory themselves have it there, and follow there, whatever this says.
    """

    def __init__(self, weights: Sequence[Tensor], *, device: EmaDevice) -> None:
        self._lanes: list[Lane] = []
        if device == "host" and weights[0].is_cuda:
            self._move_out(weights)
        else:
            self._values = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def _move_out(self, weights: Sequence[Tensor]) -> None:
        numels = [weight.numel() for weight in weights]
        self._buffer = host_buffer(sum(weight.nbytes for weight in weights), page_locked=True)
        parts = torch.split(self._buffer.view(torch.float32), numels)
        self._values = [part.view_as(w) for part, w in zip(parts, weights, strict=True)]
        for value, weight in zip(self._values, weights, strict=True):
            value.copy_(weight)
        for _ in range(LANES):
            stream = torch.cuda.Stream(weights[0].device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                room = torch.empty(
                    room_elements(max(numels)), dtype=torch.float32, device=stream.device
                )
            self._lanes.append(Lane(room, stream))
            # Or what is under way would be written into memory that is given back.
            weakref.finalize(self, stream.synchronize).atexit = False

    @property
    def values(self) -> Sequence[Tensor]:
        """The average after all updates so far; on the host, still until the next update."""
        for stream in self._streams():
            stream.synchronize()
        return self._values

    def follow(self, weights: Sequence[Tensor], *, decay: float | Tensor) -> None:
        """Keep a share of the average, `decay`, and take the rest from the weights.

        On the host the average may still be under way when this returns, so the weights must stay
        as they are until `join`.

        Args:
            weights: What is averaged.
            decay: A number, or one that the device knows, which the host does not wait for.
        """
        share: float | Tensor = 1.0 - decay
        if isinstance(share, Tensor):
            share = share.to(weights[0].device, torch.float32)
        if self._lanes:
            for stream in self._streams():
                stream.wait_stream(torch.cuda.current_stream(stream.device))
                if isinstance(share, Tensor):
                    share.record_stream(stream)
            follow_in_chunks(self._values, weights, share, lanes=self._lanes)
            return
        with torch.no_grad():
            for value, weight in zip(self._values, weights, strict=True):
                value.lerp_(weight, share)

    def join(self) -> None:
        """Have the current stream wait until weights may be overwritten; the host does not wait."""
        for stream in self._streams():
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    @torch.no_grad()
    def copy_to(self, weights: Sequence[Tensor]) -> None:
        """Overwrite weights with the average."""
        for weight, value in zip(weights, self.values, strict=True):
            weight.copy_(value)

    @contextmanager
    def set_aside(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Let a `with` block overwrite the weights; they are themselves again after it."""
        self.join()
        kept = [weight.detach().clone() for weight in weights]
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, own in zip(weights, kept, strict=True):
                    weight.copy_(own)

    def _streams(self) -> Iterator[torch.cuda.Stream]:
        return (lane.stream for lane in self._lanes if lane.stream is not None)


class MovingAverages:
    """All averages that a run keeps of the fp32 weights that a rank holds.

    Args:
        weights: See `MovingAverage`.
        config: Their decays, and where they are.
    """

    def __init__(self, weights: Sequence[Tensor], *, config: EmaConfig) -> None:
        self._by_kind = {
            kind: MovingAverage(weights, device=config.device) for kind in config.kinds
        }

    def values(self) -> dict[str, Sequence[Tensor]]:
        """Return each average by its kind, after all updates so far: see `MovingAverage.values`."""
        return {kind: average.values for kind, average in self._by_kind.items()}

    def follow(self, weights: Sequence[Tensor], *, decays: Sequence[float] | Tensor) -> None:
        """Have each follow the weights by its decay, in the order of `EmaConfig.kinds`."""
        for average, decay in zip(self._by_kind.values(), decays, strict=True):
            average.follow(weights, decay=decay)

    def join(self) -> None:
        """Have the current stream wait until weights may be overwritten; the host does not wait."""
        for average in self._by_kind.values():
            average.join()

    def copy_to(self, weights: Sequence[Tensor]) -> None:
        """Overwrite weights with the average of `EmaConfig.decay`."""
        self._by_kind["ema"].copy_to(weights)

    @contextmanager
    def set_aside(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Let a `with` block overwrite the weights; they are themselves again after it."""
        self.join()
        with self._by_kind["ema"].set_aside(weights):
            yield
