"""Steps of the fixed-step explicit solvers; the methods are in `models.flow.tableaus`."""

from collections.abc import Callable

from torch import Tensor

from models.axes import Bands
from models.flow.tableaus import Solver

VelocityFunction = Callable[[Bands, float], Bands]
"""``(states, time) -> d states / d time``."""

Observer = Callable[[float, Bands], None]
"""Sees the time, and the states that a solver has come to; it must leave them as they are."""


def unobserved(_time: float, _states: Bands) -> None:
    """Stand in where nobody looks on."""


def integrate(
    velocity: VelocityFunction,
    states: Bands,
    *,
    start: float,
    end: float,
    steps: int,
    solver: Solver,
    observe: Observer = unobserved,
) -> Bands:
    """Integrate d states / d time = velocity(states, time) from ``start`` to ``end``.

    Nothing is remembered between calls, so the velocity may jump from one call to the next.

    Args:
        velocity: Right-hand side.
        states: States at ``start``.
        start: First time.
        end: Last time.
        steps: Number of equal steps.
        solver: Method.
        observe: Called after each step.

    Returns:
        The states at ``end``.
    """
    step_size = (end - start) / steps
    before: Bands = ()
    for step in range(steps):
        method = solver.method(step)
        slopes: list[Bands] = []
        for node, coupling in zip(method.nodes, method.couplings, strict=True):
            time = start + (end - start) * ((step + node) / steps)
            slopes.append(velocity(_advance(states, slopes, coupling, step_size), time))
        states = _advance(states, slopes, method.weights, step_size)
        if method.memory:
            states = _advance(states, [before], (method.memory,), step_size)
        before = slopes[0]
        observe(start + (end - start) * ((step + 1) / steps), states)
    return states


def _advance(
    states: Bands, slopes: list[Bands], weights: tuple[float, ...], step_size: float
) -> Bands:
    """Move each state by ``step_size`` times the weighted sum of its slopes."""
    return tuple(
        _move(state, [slope[position] for slope in slopes], weights, step_size)
        for position, state in enumerate(states)
    )


def _move(
    state: Tensor, slopes: list[Tensor], weights: tuple[float, ...], step_size: float
) -> Tensor:
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            state = state + step_size * weight * slope
    return state
