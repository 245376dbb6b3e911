"""Classifier-free guidance on every active scale."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.axes import Bands, VelocityModel


def guided(velocity_model: VelocityModel, *, scale: float, null_label: int) -> VelocityModel:
    """Wrap a velocity model so that it returns ``v_null + scale * (v_label - v_null)``.

    Both velocities come from one call on a batch of twice the size.

    Args:
        velocity_model: Network that was trained with some labels replaced by ``null_label``.
        scale: Guidance scale w; 1 leaves the velocity as it is.
        null_label: Label that stands for "no class".

    Returns:
        A velocity model for states that all hold the whole batch.
    """

    def velocity(states: Bands, time: Float[Tensor, "b"], labels: Int[Tensor, "b"]) -> Bands:
        doubled = tuple(torch.cat([state, state]) for state in states)
        pair_labels = torch.cat([labels, torch.full_like(labels, null_label)])
        pairs = (v.chunk(2) for v in velocity_model(doubled, torch.cat([time, time]), pair_labels))
        return tuple(null + scale * (labelled - null) for labelled, null in pairs)

    return velocity
