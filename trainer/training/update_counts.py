"""How many updates were applied: the device counts, and the host asks when it has to know.

Whether an update is applied is decided on the device. A host that waited for each answer would
leave the device idle while it queues the next step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.state import TrainState


class UpdateCounts:
    """Counts the updates that follow a state.

    Args:
        state: The run's counters, which `settle` brings up to date.
        device: Where it is known what an update did.
    """

    def __init__(self, state: TrainState, device: torch.device) -> None:
        self._state = state
        self._noted = 0
        self._before = state.updates + state.skipped_updates
        self.applied = torch.full((), state.updates, dtype=torch.float64, device=device)

    def belongs_to(self, state: TrainState) -> bool:
        """Tell whether it is this state whose updates are counted."""
        return self._state is state

    def note(self, applied: Tensor) -> None:
        """Count one update, without waiting for it.

        Args:
            applied: Bool, 0-D, on the device.
        """
        # Whoever holds what was counted before keeps it.
        self.applied = self.applied + applied
        self._noted += 1

    def settle(self) -> None:
        """Write into the state how many were applied and skipped; waits for the device."""
        self._state.updates = int(self.applied)
        self._state.skipped_updates = self._before + self._noted - self._state.updates
