"""Who writes which slice, where several ranks hold the same one. Pure.

The slices of all ranks are rows of one array, as there are millions of them at a thousand ranks.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from trainer.checkpoint.cuts import Run, runs_of

Rows = npt.NDArray[np.int64]
"""[slices, 4]: number of the parameter, first element, number of elements, rank."""


def rows_of(spans: Rows, parameters: Rows, rank: int) -> Rows:
    """Return a rank's slices as rows.

    Args:
        spans: [slices, 2]: first element and number of elements of each.
        parameters: [slices]: number of the parameter of each.
        rank: The rank that holds them.
    """
    return np.column_stack([parameters, spans, np.full(len(parameters), rank, np.int64)])


def share_writes(held: Rows, *, world_size: int) -> Rows:
    """Choose one writer for each slice that is not empty.

    Args:
        held: The slices that ranks hold.
        world_size: Number of ranks.

    Returns:
        One row for each slice, with the rank that writes it, by parameter and first element: of
        ranks that hold the same slice the one that has least to write so far, so replicated state
        leaves through all links.
    """
    held = held[held[:, 2] > 0]
    held = held[np.lexsort(held.T[::-1])]
    others = np.any(held[1:, :3] != held[:-1, :3], axis=1)
    firsts = np.flatnonzero(np.concatenate([np.ones(min(len(held), 1), bool), others]))
    counts = np.diff(firsts, append=len(held))
    written = held[firsts].copy()
    load = np.zeros(world_size, np.int64)
    # What only one rank can write comes first: the shared slices then even the loads out.
    single = written[counts == 1]
    np.add.at(load, single[:, 3], single[:, 2])
    shared = np.flatnonzero(counts > 1)
    for number in shared[np.argsort(counts[shared], kind="stable")]:
        holders = held[firsts[number] : firsts[number] + counts[number], 3]
        writer = holders[np.argmin(load[holders])]
        load[writer] += written[number, 2]
        written[number, 3] = writer
    return written


def cuts_of(written: Rows, *, parameters: int) -> list[tuple[Run, ...]]:
    """Describe the slices of each parameter by runs.

    Args:
        written: The slices, by parameter and first element.
        parameters: Number of parameters.
    """
    cuts: list[tuple[Run, ...]] = [()] * parameters
    bounds = np.searchsorted(written[:, 0], np.arange(parameters + 1)).tolist()
    for number, (first, stop) in enumerate(pairwise(bounds)):
        cuts[number] = runs_of(written[first:stop, 1:].tolist())
    return cuts
