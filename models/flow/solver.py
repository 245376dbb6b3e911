"""Fixed-step explicit solvers: Runge-Kutta methods, and a multistep one that is started by them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from models.axes import Bands

VelocityFunction = Callable[[Bands, float], Bands]
"""``(states, time) -> d states / d time``."""

Observer = Callable[[float, Bands], None]
"""Sees the time, and the states that a solver has come to; it must leave them as they are."""


def unobserved(_time: float, _states: Bands) -> None:
    """Stand in where nobody looks on."""


@dataclass(frozen=True, kw_only=True)
class Solver:
    """An explicit method as its Butcher tableau, with a memory of one step.

    Attributes:
        order: Order of convergence: the error at a fixed time falls as step ** order.
        nodes: Where in the step each evaluation lies, as shares of the step.
        couplings: For each evaluation, the weights of the ones before it that lead there.
        weights: Weights of the evaluations in the step.
        memory: Weight of the first evaluation of the step before; 0 for a Runge-Kutta method.
        starter: Method of the first step, which has none before it; None is the method itself.
    """

    order: int
    nodes: tuple[float, ...]
    couplings: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    memory: float = 0.0
    starter: "Solver | None" = None

    def method(self, step: int) -> "Solver":
        """The method of one step, counted from 0."""
        return self.starter if step == 0 and self.starter is not None else self

    def evaluations(self, steps: int) -> int:
        """Count the evaluations of the velocity in ``steps`` steps from a fresh start."""
        return sum(len(self.method(step).nodes) for step in range(steps))


_HEUN = Solver(order=2, nodes=(0.0, 1.0), couplings=((), (1.0,)), weights=(0.5, 0.5))

SOLVERS: Mapping[str, Solver] = {
    "euler": Solver(order=1, nodes=(0.0,), couplings=((),), weights=(1.0,)),
    "midpoint": Solver(order=2, nodes=(0.0, 0.5), couplings=((), (0.5,)), weights=(0.0, 1.0)),
    "heun": _HEUN,
    # Adams-Bashforth: order 2 for one evaluation a step.
    "ab2": Solver(
        order=2, nodes=(0.0,), couplings=((),), weights=(1.5,), memory=-0.5, starter=_HEUN
    ),
}


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
