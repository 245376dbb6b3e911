"""Where in a stage to train: maps from unit uniforms to times.

They are pure, so the caller's random stream alone decides the times.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

TimeSampler = Callable[[Float[Tensor, "b"], float], Float[Tensor, "b"]]
"""``(uniforms in [0, 1), activation) -> times in [activation, 1]``, increasing in the uniform."""


def uniform(uniforms: Float[Tensor, "b"], activation: float) -> Float[Tensor, "b"]:
    """Times uniform on [activation, 1] (the paper's choice)."""
    return activation + (1 - activation) * uniforms


def logit_normal(uniforms: Float[Tensor, "b"], activation: float) -> Float[Tensor, "b"]:
    """Times whose place in [activation, 1] is the sigmoid of a standard normal number."""
    return activation + (1 - activation) * torch.sigmoid(torch.special.ndtri(uniforms))
