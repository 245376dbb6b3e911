"""The adaptive solver of the paper, Dormand-Prince 5(4), by torchdiffeq."""

import torch
from torch import Tensor

from models.axes import Bands
from models.flow.solver import VelocityFunction

_FIRST_STEP = 0.05
"""Share of the interval that is tried first; a step that is too long is made again."""


def integrate_adaptive(
    velocity: VelocityFunction,
    states: Bands,
    *,
    start: float,
    end: float,
    absolute_tolerance: float,
    relative_tolerance: float,
) -> Bands:
    """Integrate d states / d time = velocity(states, time) with steps that follow the error.

    A step is taken when, on every scale, the root mean square of the estimated error over all
    images and elements, each divided by its tolerance, is at most 1. All images share the steps.

    Args:
        velocity: Right-hand side; smooth in time between ``start`` and ``end``.
        states: States at ``start``.
        start: First time.
        end: Last time.
        absolute_tolerance: Part of the tolerance that does not depend on the state.
        relative_tolerance: Part of the tolerance in proportion to the state's size.

    Returns:
        The states at ``end``.
    """
    # It imports scipy, for half a second.
    from torchdiffeq import odeint

    def slope(time: Tensor, current: Bands) -> Bands:
        return velocity(current, time.item())

    times = torch.tensor([start, end], dtype=torch.float64, device=states[0].device)
    trajectory = odeint(
        slope,
        states,
        times,
        atol=absolute_tolerance,
        rtol=relative_tolerance,
        method="dopri5",
        # Land on the end: by default the last step goes beyond, where nothing was trained, and the
        # result is interpolated. The first step is given, because its own choice looks beyond too.
        options={"step_t": times[1:], "first_step": (end - start) * _FIRST_STEP},
    )
    return tuple(points[-1] for points in trajectory)
