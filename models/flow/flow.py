"""The flow: every choice that training and sampling must share.

They are pure, so the caller's random stream alone decides the times.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from models.axes import Bands
from models.flow.config import FlowConfig, FlowConfigError
from models.flow.path import GvpPath, LinearPath, Path
from models.pyramid import check_size, split

TimeSampler = Callable[[Float[Tensor, "b"], float], Float[Tensor, "b"]]
"""``(uniforms in [0, 1), activation) -> times in [activation, 1]``, increasing in the uniform."""


def uniform(uniforms: Float[Tensor, "b"], activation: float) -> Float[Tensor, "b"]:
    """Times uniform on [activation, 1] (the paper's choice)."""
    return activation + (1 - activation) * uniforms


def logit_normal(uniforms: Float[Tensor, "b"], activation: float) -> Float[Tensor, "b"]:
    """Times whose place in [activation, 1] is the sigmoid of a standard normal number."""
    return activation + (1 - activation) * torch.sigmoid(torch.special.ndtri(uniforms))


_PATHS: Mapping[str, type[LinearPath] | type[GvpPath]] = {"linear": LinearPath, "gvp": GvpPath}
_TIME_SAMPLERS: Mapping[str, TimeSampler] = {"uniform": uniform, "logit_normal": logit_normal}


class Flow:
    """Stages, path, noise and time sampler of one configuration.

    Attributes:
        config: The choices it was made from.
        stages: When each scale is active.
        path: Path of every band.
        time_sampler: Map from unit uniforms to training times.
        scale_weights: Weight of each scale's loss, coarse to fine.
    """

    def __init__(self, config: FlowConfig) -> None:
        self.config = config
        self.stages = config.stages
        self.path: Path = _PATHS[config.path]()
        self.time_sampler = _TIME_SAMPLERS[config.time_sampler]
        self.scale_weights = config.scale_weights or (1.0,) * config.scales

    def noise_size(self, *, channels: int, image_size: int) -> int:
        """Count the normal numbers one image's noise is made from.

        Raises:
            PyramidError: The image size does not fit the number of scales.
        """
        return sum(channels * size**2 for size in self._drawn_sizes(image_size))

    def noise_bands(self, noise: Float[Tensor, "b n"], *, channels: int, image_size: int) -> Bands:
        """Shape standard normal numbers into the noise of every scale.

        Banded noise has the variance 1/4, 3/4 per element for two scales and 1/16, 3/16, 3/4 for
        three, coarse to fine; independent noise has variance 1.

        Args:
            noise: As many numbers for each image as ``noise_size`` says.
            channels: Channels of the images.
            image_size: Height and width of the images.

        Raises:
            FlowConfigError: ``noise`` holds another count of numbers.
            PyramidError: The image size does not fit the number of scales.
        """
        needed = self.noise_size(channels=channels, image_size=image_size)
        if noise.shape[1] != needed:
            raise FlowConfigError(
                f"{self.config.noise} noise of a {channels}x{image_size}x{image_size} image with "
                f"{self.config.scales} scales takes {needed} numbers, got {noise.shape[1]}."
            )
        sizes = self._drawn_sizes(image_size)
        drawn = torch.split(noise, [channels * size**2 for size in sizes], dim=1)
        bands = tuple(
            part.reshape(-1, channels, size, size) for part, size in zip(drawn, sizes, strict=True)
        )
        if self.config.noise == "banded":
            return split(bands[0], self.config.scales)
        return bands

    def _drawn_sizes(self, image_size: int) -> list[int]:
        """Grid sizes for which numbers are drawn, coarse to fine."""
        check_size(image_size, scales=self.config.scales)
        if self.config.noise == "banded":
            return [image_size]
        return [image_size >> k for k in reversed(range(self.config.scales))]
