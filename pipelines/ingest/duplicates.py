"""Samples that hold the same bytes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Groups of samples with the same content.

    Attributes:
        groups: Contents that occur more than once.
        surplus: Samples that could be left out without losing any content.
        relabelled: Groups whose samples have different labels.
        examples: Sample ids of some groups, those with different labels first.
    """

    groups: int
    surplus: int
    relabelled: int
    examples: tuple[tuple[int, ...], ...]


def find_duplicates(
    digests: NDArray[np.uint8],
    *,
    sample_ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    examples: int,
) -> Duplicates:
    """Group samples by the digest of their content.

    Args:
        digests: uint8 [n, 16].
        sample_ids: int64 [n], rising.
        labels: int64 [n].
        examples: Groups to give the sample ids of.
    """
    if not len(digests):
        return Duplicates(groups=0, surplus=0, relabelled=0, examples=())
    words = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort(words.T)  # stable: equal digests stay in the order of their ids
    words, sample_ids, labels = words[order], sample_ids[order], labels[order]
    differs = np.any(words[1:] != words[:-1], axis=1)
    starts = np.concatenate([[0], np.flatnonzero(differs) + 1])
    sizes = np.diff(starts, append=len(words))
    mixed = np.minimum.reduceat(labels, starts) != np.maximum.reduceat(labels, starts)
    repeated = np.flatnonzero(sizes > 1)
    shown = repeated[np.lexsort((sample_ids[starts[repeated]], ~mixed[repeated]))][:examples]
    return Duplicates(
        groups=len(repeated),
        surplus=int((sizes[repeated] - 1).sum()),
        relabelled=int(mixed[repeated].sum()),
        examples=tuple(
            tuple(sample_ids[starts[group] :][: sizes[group]].tolist()) for group in shown
        ),
    )
