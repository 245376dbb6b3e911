"""What the arrays of a data set hold, and how moments are found in them."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError, UnreadableSourceError
from pipelines.ingest.latents.arrays.npy import MAX_BYTES, BadArrayError, parse_npy
from pipelines.ingest.listing import SourceImage

Holds = Literal["mean-std", "latents"]


class MisfitArrayError(DataError):
    """An array has another shape than it should have."""

    @classmethod
    def of_two(
        cls, name: str, shape: tuple[int, ...], example: str, wanted: tuple[int, ...]
    ) -> "MisfitArrayError":
        """Say that an array differs from another one of its data set."""
        return cls(
            f"{name} has the shape {list(shape)}, and {example} has {list(wanted)}; the arrays of "
            "one data set have one shape. Remove those of the other, or give each shape a data set "
            "of its own."
        )


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """What the arrays of a data set hold.

    Attributes:
        holds: Means, then standard deviations; or latents alone, whose deviation is 0.
        views: 2 where the mirrored image follows the image along the first axis, else 1.
        channels: Channels of a latent.
        scale: What latents were multiplied by, after the shift; 1 where they were not.
        shift: What was subtracted from them before; 0 where nothing was.
    """

    holds: Holds
    views: Literal[1, 2]
    channels: int
    scale: float = 1.0
    shift: float = 0.0

    def check(self, shape: tuple[int, ...], *, name: str) -> None:
        """Refuse a shape that does not fit.

        Args:
            shape: Shape of an array.
            name: What to call the array.

        Raises:
            MisfitArrayError: It is none of those that the layout allows.
        """
        accepted = [(*leading, *shape[-2:]) for leading in self._leading]
        if shape in accepted and shape[-1] == shape[-2]:
            return
        wanted = " or ".join(
            f"[{', '.join(map(str, leading))}, size, size]" for leading in self._leading
        )
        raise MisfitArrayError(
            f"{name} has the shape {list(shape)}; --arrays {self.holds} with --views {self.views} "
            f"and an autoencoder of {self.channels} channels needs {wanted}. Choose --arrays and "
            "--views as the files were written, or the --autoencoder that made them."
        )

    def moments(self, array: NDArray[Any]) -> NDArray[Any]:
        """Arrange an array that fits as [views, mean and deviation, channels, size, size].

        Values are the autoencoder's own, before shift and scale.

        Raises:
            BadArrayError: It holds numbers that no encoder gives.
        """
        size = array.shape[-1]
        if not np.isfinite(array).all():
            raise BadArrayError("it holds numbers that are not finite")
        kinds = 2 if self.holds == "mean-std" else 1
        found = array.reshape(self.views, kinds, self.channels, size, size).astype(np.float64)
        result = np.zeros((self.views, 2, self.channels, size, size))
        result[:, 0] = found[:, 0] / self.scale + self.shift
        if kinds == 2:
            if (found[:, 1] < 0).any():
                raise BadArrayError("it holds standard deviations below 0")
            result[:, 1] = found[:, 1] / abs(self.scale)
        return result

    @property
    def _leading(self) -> tuple[tuple[int, ...], ...]:
        """Accepted shapes, without height and width."""
        views = (2,) if self.views == 2 else ()
        if self.holds == "latents":
            return ((*views, self.channels),)
        return ((*views, 2 * self.channels), (*views, 2, self.channels))


def read_array(file: SourceImage) -> NDArray[Any]:
    """Read one array.

    Raises:
        BadArrayError: It is gone, damaged, or no array.
        UnreadableSourceError: It is there and cannot be read.
    """
    if file.size > MAX_BYTES:
        raise BadArrayError(f"it is {file.size} bytes long, more than {MAX_BYTES}")
    try:
        data = file.read()
    except FileNotFoundError:
        raise BadArrayError("it is gone") from None
    except OSError as error:  # of the disk, not of the array: the next start may read it
        raise UnreadableSourceError(
            f"{file.name} cannot be read ({error}). Let this user read it, or remove it, and run "
            "the same command again; finished shards are kept."
        ) from error
    return parse_npy(data)
