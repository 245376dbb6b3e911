"""How sampling asks the network: with classifier-free guidance, and counted."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.axes import Bands, VelocityModel


def guide(velocity_model: VelocityModel, *, scale: float, null_label: int) -> VelocityModel:
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


class NfeCounter:
    """A velocity model that counts the images it is called with; a guided pair counts as two."""

    def __init__(self, model: VelocityModel) -> None:
        self._model = model
        self._images = 0

    def __call__(self, states: Bands, time: Tensor, labels: Tensor) -> Bands:
        """Call the model."""
        self._images += time.shape[0]
        return self._model(states, time, labels)

    def take(self) -> int:
        """Return the count and begin again at zero."""
        images, self._images = self._images, 0
        return images
