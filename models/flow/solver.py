"""Fixed-step explicit Runge-Kutta solvers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from models.axes import Bands

VelocityFunction = Callable[[Bands, float], Bands]
"""``(states, time) -> d states / d time``."""


@dataclass(frozen=True, kw_only=True)
class Solver:
    """An explicit Runge-Kutta method as its Butcher tableau.

    Attributes:
        order: Order of convergence: the error at a fixed time falls as step ** order.
        nodes: Where in the step each evaluation lies, as shares of the step.
        couplings: For each evaluation, the weights of the ones before it that lead there.
        weights: Weights of the evaluations in the step.
    """

    order: int
    nodes: tuple[float, ...]
    couplings: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


SOLVERS: Mapping[str, Solver] = {
    "euler": Solver(order=1, nodes=(0.0,), couplings=((),), weights=(1.0,)),
    "midpoint": Solver(order=2, nodes=(0.0, 0.5), couplings=((), (0.5,)), weights=(0.0, 1.0)),
    "heun": Solver(order=2, nodes=(0.0, 1.0), couplings=((), (1.0,)), weights=(0.5, 0.5)),
}


def evaluation_times(
    solver: Solver, *, start: float, end: float, steps: int
) -> tuple[tuple[float, ...], ...]:
    """List the times at which ``integrate`` evaluates the velocity, for each step."""
    return tuple(
        tuple(start + (end - start) * ((step + node) / steps) for node in solver.nodes)
        for step in range(steps)
    )


def integrate(
    velocity: VelocityFunction,
    states: Bands,
    *,
    start: float,
    end: float,
    steps: int,
    solver: Solver,
) -> Bands:
    """Integrate d states / d time = velocity(states, time) from ``start`` to ``end``.

    Args:
        velocity: Right-hand side.
        states: States at ``start``.
        start: First time.
        end: Last time.
        steps: Number of equal steps.
        solver: Method.

    Returns:
        The states at ``end``.
    """
    step_size = (end - start) / steps
    for times in evaluation_times(solver, start=start, end=end, steps=steps):
        slopes: list[Bands] = []
        for time, coupling in zip(times, solver.couplings, strict=True):
            slopes.append(velocity(_advance(states, slopes, coupling, step_size), time))
        states = _advance(states, slopes, solver.weights, step_size)
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
