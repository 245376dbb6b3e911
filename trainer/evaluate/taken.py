"""What is kept of samples that come block by block."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.evaluate.samples import SampleBlock

_MOST_BYTES = 2**30


class TakenSamples:
    """Keeps the samples as pictures, as far as there is room, and counts network evaluations.

    Args:
        whole: Keep them as they are too, all of them.
        most_bytes: Size of the pictures beyond which further ones are not kept.

    Attributes:
        whole: The images [b, c, h, w] and labels [b] of each block, if they were to be kept.
    """

    def __init__(self, *, whole: bool = False, most_bytes: int = _MOST_BYTES) -> None:
        self.whole: list[tuple[Tensor, Tensor]] = []
        self._keep_whole = whole
        self._room_bytes = most_bytes
        self._pictures: list[NDArray[np.uint8]] = []
        self._labels: list[NDArray[np.int64]] = []
        self._count = 0
        self._evaluations = torch.zeros(0, dtype=torch.float64)

    def add(self, block: SampleBlock) -> None:
        """Take a block."""
        if self._keep_whole:
            self.whole.append((block.images, block.labels))
        evaluations = len(block.images) * torch.tensor(block.evaluations, dtype=torch.float64)
        self._evaluations = self._evaluations + evaluations if self._count else evaluations
        self._count += len(block.images)
        bytes_ = (block.images * 127.5 + 127.5).round().clamp(0, 255).byte()
        pictures = (
            bytes_.permute(0, 2, 3, 1).contiguous().numpy()[: self._room_bytes // bytes_[0].nbytes]
        )
        self._pictures.append(pictures)
        self._labels.append(block.labels[: len(pictures)].numpy())
        # A later, smaller block must not follow on one that was cut.
        whole = len(pictures) == len(block.images)
        self._room_bytes = self._room_bytes - pictures.nbytes if whole else 0

    @property
    def evaluations(self) -> tuple[float, ...]:
        """Network evaluations in each segment, averaged over the samples."""
        return tuple((self._evaluations / self._count).tolist())

    def npz(self) -> bytes:
        """Pack the pictures as FID tools expect them: uint8 NHWC in arr_0, labels in arr_1."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, np.concatenate(self._pictures), np.concatenate(self._labels))
        return buffer.getvalue()
