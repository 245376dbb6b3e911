"""Counting network evaluations as they are made."""

from torch import Tensor

from models.axes import Bands, VelocityModel


class CountedModel:
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
