import math

import pytest
import torch

from models.flow.solver import integrate
from models.flow.tableaus import SOLVERS


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
    for step in range(2):
        method = SOLVERS[name].method(step)
        assert sum(method.weights) + method.memory == 1
        for index, (node, coupling) in enumerate(zip(method.nodes, method.couplings, strict=True)):
            assert len(coupling) == index
            assert sum(coupling) == node


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("euler", [0, 1, 2]),
        ("midpoint", [0, 0.5, 1, 1.5, 2, 2.5]),
        ("heun", [0, 1, 1, 2, 2, 3]),
        ("ab2", [0, 1, 1, 2]),
    ],
)
def test_the_velocity_is_evaluated_at_the_nodes_and_as_often_as_counted(
    name: str, times: list[float]
) -> None:
    seen = []

    def slope(states: tuple[torch.Tensor, ...], time: float) -> tuple[torch.Tensor, ...]:
        seen.append((time - 2) / 3)
        return states

    states = (torch.ones(1, 1, 1, 1),)
    integrate(slope, states, start=2.0, end=11.0, steps=3, solver=SOLVERS[name])
    assert seen == pytest.approx(times)
    assert len(seen) == SOLVERS[name].evaluations(3)
    assert torch.equal(states[0], torch.ones(1, 1, 1, 1))


def test_adams_bashforth_is_the_textbook_formula_after_a_heun_step() -> None:
    y, before, step = 1.0, 0.0, 0.25
    for index in range(4):
        slope = -y
        heun = (slope - (y + step * slope)) / 2
        y, before = y + step * (heun if index == 0 else 1.5 * slope - 0.5 * before), slope
    (got,) = integrate(
        lambda states, _: (-states[0],),
        (torch.ones(1, 1, 1, 1, dtype=torch.float64),),
        start=0.0,
        end=1.0,
        steps=4,
        solver=SOLVERS["ab2"],
    )
    assert got.item() == pytest.approx(y, rel=1e-14)
