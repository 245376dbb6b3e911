"""Fixed-step explicit methods: Runge-Kutta, and a multistep one that is started by them."""

from collections.abc import Mapping
from dataclasses import dataclass


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
