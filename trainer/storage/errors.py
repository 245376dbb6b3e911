"""Everything that can go wrong with stores.

Each error is built from one message: a paragraph that names the place, the cause and what to do,
and never a credential. So an error of one rank can be raised on every rank as it is.
"""

from __future__ import annotations


class CheckpointError(Exception):
    """Base of all errors of this package."""


class StoreError(CheckpointError):
    """The store refused or failed an operation."""


class StoreUnreachable(StoreError):
    """The store does not answer, or answers that it is overloaded; trying later may help."""


class VanishedObject(StoreError):
    """Something that was written is not there any more; trying again does not bring it back."""


class MissingObject(CheckpointError):
    """There is no object under this key."""


class InvalidKey(CheckpointError, ValueError):
    """A name is not fit to be an object key, or would lead outside the store."""


class InvalidStoreUri(CheckpointError, ValueError):
    """The place of the checkpoints is not one this code can open."""


class RunHeld(CheckpointError, ValueError):
    """Another launch trains the run."""


class LeaseLost(CheckpointError, ValueError):
    """Another launch has taken the run over; a restart would not bring it back."""


class SupersededAttempt(CheckpointError):
    """Workers that were started later train the run."""
