"""Flow matching on Gaussian data in closed form: an oracle that shares no code with `models.flow`.

Let x ~ N(m, C) and write the bands of data and noise as linear maps B_p of pixels. Stacked over the
scales that a velocity may see, the states s = alpha x1 + sigma x0 and the velocities
u = alpha' x1 + sigma' x0 are jointly Gaussian, so the velocity of least squared error is

    E[u | s] = E u + Cov(u, s) Cov(s)^-1 (s - E s),

and what remains of u, the smallest loss that any network can reach, is the trace of
Cov(u) - Cov(u, s) Cov(s)^-1 Cov(s, u).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from models.axes import Bands
from models.flow.config import FlowConfig

Sees = Literal["causal", "full"]
"""Whether a scale's velocity knows its own and coarser states, or those of all active scales."""


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Square one-channel images, normally distributed.

    Attributes:
        mean: [n], row by row.
        covariance: [n, n].
    """

    mean: Tensor
    covariance: Tensor

    @property
    def size(self) -> int:
        return math.isqrt(len(self.mean))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        root = torch.linalg.cholesky(self.covariance)
        return (self.mean + noise @ root.T).reshape(count, 1, self.size, self.size)


def band_maps(size: int, scales: int) -> list[Tensor]:
    """Matrices from pixels to the bands, coarse to fine, from the definition of the pyramid."""
    pixels = torch.eye(size**2, dtype=torch.float64)
    maps, coarse = [], pixels
    for k in range(scales - 1):
        side = size >> k
        halve = torch.zeros((side // 2) ** 2, side**2, dtype=torch.float64)
        for row in range(side):
            for column in range(side):
                halve[(row // 2) * (side // 2) + column // 2, row * side + column] = 1 / 4
        below = halve @ coarse
        maps.append(coarse - 4 * halve.T @ below)
        coarse = below
    return [coarse, *reversed(maps)]


def independent_bands(size: int, scales: int, *, seed: int) -> Gaussian:
    """Random data whose bands are independent of each other, but not white within a band."""
    generator = torch.Generator().manual_seed(seed)
    n = size**2
    covariance = torch.zeros(n, n, dtype=torch.float64)
    for band in band_maps(size, scales):
        # Up is the transpose of Down, times the pixels of a block: it brings a band to pixels.
        lift = torch.linalg.pinv(band)
        root = torch.randn(n, n, generator=generator, dtype=torch.float64) / math.sqrt(n)
        inside = band @ (root @ root.T + 0.2 * torch.eye(n, dtype=torch.float64)) @ band.T
        covariance += lift @ inside @ lift.T
    return Gaussian(
        mean=torch.randn(n, generator=generator, dtype=torch.float64),
        covariance=0.5 * covariance,
    )


def correlated_bands(size: int, *, seed: int) -> Gaussian:
    """Random data with a general covariance."""
    generator = torch.Generator().manual_seed(seed)
    n = size**2
    root = torch.randn(n, n, generator=generator, dtype=torch.float64) / math.sqrt(n)
    return Gaussian(
        mean=torch.randn(n, generator=generator, dtype=torch.float64),
        covariance=root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64),
    )


class OptimalVelocity:
    """The best velocity for Gaussian data, as a velocity model, and its loss.

    Args:
        data: The data.
        config: The flow.
        sees: What a scale's velocity may depend on.
    """

    def __init__(self, data: Gaussian, config: FlowConfig, *, sees: Sees = "causal") -> None:
        maps = band_maps(data.size, config.scales)
        self._gvp = config.path == "gvp"
        self._sees = sees
        self._taus = config.stages.activation_times
        self._sizes = [len(band) for band in maps]
        self._grids = [math.isqrt(count) for count in self._sizes]
        joint = torch.cat(maps)
        self._mean = joint @ data.mean
        self._data = joint @ data.covariance @ joint.T
        noise = [band @ band.T for band in maps]
        if config.noise == "independent":
            noise = [torch.eye(count, dtype=torch.float64) for count in self._sizes]
        self._noise = torch.block_diag(*noise)

    def __call__(self, states: Bands, time: Tensor, labels: Tensor) -> Bands:
        """Velocities of the active scales; a finer scale may hold fewer images."""
        del labels
        times, which = time.unique(return_inverse=True)
        velocities = []
        for position, state in enumerate(states):
            held = state.shape[0]
            seen = len(states) if self._sees == "full" else position + 1
            stacked = torch.cat([s[:held].flatten(1) for s in states[:seen]], dim=1)
            gains, state_means, velocity_means, _ = self._regression(times, position, seen)
            mine = which[:held]
            centred = stacked - state_means[mine]
            velocity = velocity_means[mine] + (gains[mine] @ centred[:, :, None])[:, :, 0]
            velocities.append(velocity.reshape_as(state))
        return tuple(velocities)

    def smallest_loss(self, position: int) -> float:
        """Mean squared error of one scale over the times at which training sees it."""
        nodes, weights = np.polynomial.legendre.leggauss(40)
        stages = self._taus[position:]
        total = 0.0
        for tau in stages:
            times = torch.tensor(tau + (1 - tau) * (nodes + 1) / 2)
            *_, remaining = self._regression(times, position, position + 1)
            per_element = remaining.diagonal(dim1=1, dim2=2).mean(1)
            total += float((torch.tensor(weights) / 2 * per_element).sum())
        return total / len(stages)

    def _regression(
        self, times: Tensor, position: int, seen: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gain [t, n_p, n], means of states [t, n] and velocity [t, n_p], and what remains."""
        alpha, sigma, alpha_rate, sigma_rate = self._coefficients(times)
        own = slice(sum(self._sizes[:position]), sum(self._sizes[: position + 1]))
        past = slice(0, sum(self._sizes[:seen]))
        data, noise = self._data, self._noise

        def covariance(rows: slice, a: Tensor, s: Tensor, columns: slice, b: Tensor, r: Tensor):
            of_data = a[:, rows, None] * b[:, None, columns] * data[rows, columns]
            return of_data + (s * r)[:, None, None] * noise[rows, columns]

        among = covariance(past, alpha, sigma, past, alpha, sigma)
        across = covariance(own, alpha_rate, sigma_rate, past, alpha, sigma)
        alone = covariance(own, alpha_rate, sigma_rate, own, alpha_rate, sigma_rate)
        # Residual bands fill a subspace: the inverse on that subspace is all there is.
        gain = across @ torch.linalg.pinv(among, rtol=1e-10, hermitian=True)
        return (
            gain,
            alpha[:, past] * self._mean[past],
            alpha_rate[:, own] * self._mean[own],
            alone - gain @ across.transpose(1, 2),
        )

    def _coefficients(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Alpha and its rate [t, elements], sigma and its rate [t]."""
        tau = torch.repeat_interleave(
            torch.tensor(self._taus, dtype=torch.float64), torch.tensor(self._sizes)
        )
        own = (times[:, None] - tau) / (1 - tau)
        if not self._gvp:
            rate = (1 / (1 - tau)).expand_as(own)
            return own, 1 - times, rate, -torch.ones_like(times)
        turn = math.pi / 2
        return (
            (turn * own).sin(),
            (turn * times).cos(),
            turn / (1 - tau) * (turn * own).cos(),
            -turn * (turn * times).sin(),
        )
