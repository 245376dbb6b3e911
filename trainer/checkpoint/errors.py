"""Everything that can go wrong with checkpoints and the stores they live in.

Each error is built from one message: a paragraph that names the place, the cause and what to do,
and never a credential. So an error of one rank can be raised on every rank as it is.
"""

from __future__ import annotations

from trainer.storage.errors import CheckpointError


class InvalidManifest(CheckpointError, ValueError):
    """A manifest is damaged, or describes something no save would have written."""


class NewerManifest(InvalidManifest):
    """A manifest was written in a format that came after this code."""


class DamagedCheckpoint(CheckpointError):
    """Objects of a committed checkpoint are missing or changed; an older one may be whole."""


class NonFiniteState(CheckpointError):
    """The state to save holds values that are not finite; the checkpoints before it are better."""


class CheckpointMismatch(CheckpointError, ValueError):
    """A whole checkpoint does not fit the model, or the ranks do not fit each other."""


class CheckpointConflict(CheckpointError):
    """Another writer's checkpoint stands where this one should go."""


class RankFailed(CheckpointError):
    """Another rank failed for a reason outside this package."""
