import math

import pytest
import torch

from models.flow.solver import SOLVERS, evaluation_times, integrate


def error_at_one(name: str, *, steps: int) -> float:
    """Error on y' = cos(t) (1 + y^2) and its square w' = 2 y cos(t) (1 + w); y = tan(sin t + 0.1).

    The system is nonlinear, its right-hand side depends on time, and its states are coupled.
    """

    def slope(states: tuple[torch.Tensor, ...], time: float) -> tuple[torch.Tensor, ...]:
        y, w = states
        return math.cos(time) * (1 + y * y), 2 * y * math.cos(time) * (1 + w)

    def states_at(time: float) -> tuple[torch.Tensor, ...]:
        y = torch.full((1, 1, 1, 1), math.tan(math.sin(time) + 0.1), dtype=torch.float64)
        return y, y * y

    ends = integrate(slope, states_at(0), start=0.0, end=1.0, steps=steps, solver=SOLVERS[name])
    pairs = zip(ends, states_at(1), strict=True)
    return max((got - exact).abs().item() for got, exact in pairs)


@pytest.mark.parametrize("name", SOLVERS)
def test_observed_order_is_the_declared_order(name: str) -> None:
    errors = [error_at_one(name, steps=steps) for steps in (256, 512)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(SOLVERS[name].order, abs=0.1)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_tableau_is_explicit_and_consistent(name: str) -> None:
    solver = SOLVERS[name]
    assert sum(solver.weights) == 1
    for index, (node, coupling) in enumerate(zip(solver.nodes, solver.couplings, strict=True)):
        assert len(coupling) == index
        assert sum(coupling) == node


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_the_velocity_is_evaluated_where_announced(name: str, evaluations: int) -> None:
    seen = []

    def slope(states: tuple[torch.Tensor, ...], time: float) -> tuple[torch.Tensor, ...]:
        seen.append(time)
        return states

    states = (torch.ones(1, 1, 1, 1),)
    integrate(slope, states, start=0.2, end=0.9, steps=5, solver=SOLVERS[name])
    announced = evaluation_times(SOLVERS[name], start=0.2, end=0.9, steps=5)
    assert seen == [time for step in announced for time in step]
    assert len(seen) == 5 * evaluations
    assert torch.equal(states[0], torch.ones(1, 1, 1, 1))
