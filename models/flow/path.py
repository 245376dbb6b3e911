"""Paths from noise to data for one band.

A band whose scale enters at time ``activation`` follows ``state = alpha * data + sigma * noise``.
At the activation time alpha is 0, so a scale enters as scaled noise whatever its data; at time 1
the state is the data.
"""

import math
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from models.axes import Band


def expand_time(time: Float[Tensor, "b"]) -> Float[Tensor, "b 1 1 1"]:
    """Shape one time per image so that it broadcasts over a band."""
    return time[:, None, None, None]


class Coefficients(NamedTuple):
    """What makes state and velocity of data and noise at one time.

    state = alpha * data + sigma * noise; velocity = alpha_rate * data + sigma_rate * noise.
    """

    alpha: float
    sigma: float
    alpha_rate: float
    sigma_rate: float


class Path(Protocol):
    """A path of one band; ``activation`` is the time, below 1, at which its scale enters."""

    def state(self, data: Band, noise: Band, time: Float[Tensor, "b"], activation: float) -> Band:
        """Point of the path at ``time``, which lies in [activation, 1]."""
        ...

    def velocity(
        self, data: Band, noise: Band, time: Float[Tensor, "b"], activation: float
    ) -> Band:
        """Derivative of the state with respect to time."""
        ...

    def entry(self, noise: Band, activation: float) -> Band:
        """State at the activation time, which needs no data."""
        ...

    def coefficients(self, time: float, activation: float) -> Coefficients:
        """Weights of data and noise at one time, the same for all images."""
        ...


class LinearPath:
    """The paper's path: alpha = (t - tau) / (1 - tau), sigma = 1 - t; its velocity is constant."""

    def state(self, data: Band, noise: Band, time: Float[Tensor, "b"], activation: float) -> Band:
        """Point of the path at ``time``."""
        t = expand_time(time)
        return (t - activation) / (1 - activation) * data + (1 - t) * noise

    def velocity(
        self, data: Band, noise: Band, time: Float[Tensor, "b"], activation: float
    ) -> Band:
        """Derivative of the state, the same at all times."""
        del time
        return data / (1 - activation) - noise

    def entry(self, noise: Band, activation: float) -> Band:
        """State at the activation time."""
        return (1 - activation) * noise

    def coefficients(self, time: float, activation: float) -> Coefficients:
        """Weights of data and noise at one time."""
        length = 1 - activation
        return Coefficients((time - activation) / length, 1 - time, 1 / length, -1.0)


class GvpPath:
    """The paper's ablation: alpha = sin(pi r / 2), sigma = cos(pi t / 2).

    r = (t - tau) / (1 - tau) is the scale's own time.
    """

    def state(self, data: Band, noise: Band, time: Float[Tensor, "b"], activation: float) -> Band:
        """Point of the path at ``time``."""
        t, own = _angles(time, activation)
        return torch.sin(own) * data + torch.cos(t) * noise

    def velocity(
        self, data: Band, noise: Band, time: Float[Tensor, "b"], activation: float
    ) -> Band:
        """Derivative of the state at ``time``."""
        t, own = _angles(time, activation)
        toward_data = torch.cos(own) / (1 - activation) * data
        return math.pi / 2 * (toward_data - torch.sin(t) * noise)

    def entry(self, noise: Band, activation: float) -> Band:
        """State at the activation time."""
        return math.cos(math.pi / 2 * activation) * noise

    def coefficients(self, time: float, activation: float) -> Coefficients:
        """Weights of data and noise at one time."""
        quarter, length = math.pi / 2, 1 - activation
        t, own = quarter * time, quarter * (time - activation) / length
        return Coefficients(
            math.sin(own), math.cos(t), quarter / length * math.cos(own), -quarter * math.sin(t)
        )


def _angles(
    time: Float[Tensor, "b"], activation: float
) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
    """Global time and the scale's own time, each as a quarter turn per unit."""
    t = expand_time(time)
    return math.pi / 2 * t, math.pi / 2 * (t - activation) / (1 - activation)
