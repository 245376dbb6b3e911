"""A model's weights as one flat tensor in fp32, and one more in bf16 where it computes in that.

What is done to all weights alike is then one operation on one tensor: following with the average,
or copying fp32 weights into those that the model computes with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Elements: each weight begins where matrix products and vector instructions are fastest."""


class FlatWeights:
    """Weights that live in flat tensors, one after the other.

    The model's parameters become views: of the fp32 tensor itself, or of its copy in bf16.

    Args:
        parameters: Float32, on one device; their storage is let go.
        dtype: In which the model computes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, dtype: torch.dtype) -> None:
        self._parameters = list(parameters)
        self._starts: list[int] = []
        self._numel = 0
        # Shapes of all that a flat tensor is cut into: each weight, and what fills up behind it.
        self._shapes: list[Tensor] = []
        self._places: list[int] = []
        for parameter in self._parameters:
            self._starts.append(self._numel)
            self._places.append(len(self._shapes))
            self._shapes.append(torch.empty(parameter.shape, device="meta"))
            self._numel += parameter.numel()
            if left := -self._numel % ALIGNMENT:
                self._shapes.append(torch.empty(left, device="meta"))
                self._numel += left
        self.master = self.like()
        self._working = self.master if dtype == torch.float32 else self.like(dtype)
        working = self.views(self._working)
        for parameter, own, computing in zip(
            self._parameters, self.views(self.master), working, strict=True
        ):
            own.copy_(parameter.detach())
            parameter.data = computing
        self.publish()

    def like(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros for one number of each weight, flat, on the weights' device."""
        return torch.zeros(self._numel, dtype=dtype, device=self._parameters[0].device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The part of each weight in a flat tensor, in the weight's shape."""
        # In one call, for there may be a thousand of them in every update.
        cut = torch._C._nn.unflatten_dense_tensors(flat, self._shapes)
        return [cut[place] for place in self._places]

    def span(self, first: int, stop: int) -> slice:
        """Where the weights of a range of numbers lie in a flat tensor."""
        end = self._starts[stop] if stop < len(self._starts) else self._numel
        return slice(self._starts[first], end)

    @property
    def is_copied(self) -> bool:
        """Whether the model computes with a copy of the fp32 weights."""
        return self._working is not self.master

    @torch.no_grad()
    def publish(self, flat: Tensor | None = None) -> None:
        """Have the model compute with these weights, by default its own fp32 ones."""
        source = self.master if flat is None else flat
        if source is not self._working:
            self._working.copy_(source)
