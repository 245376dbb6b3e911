"""Sharded experts compute and learn what replicated ones do, on real gloo ranks."""

from itertools import product
from typing import Any

import pytest
import torch

from tests.integration.test_engine import on_ranks
from tests.support import expert_worker
from tests.support.engine_worker import OPTIM
from tests.support.expert_worker import SCALES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

EXACT = 1e-11
"""Rounding of float64 after a deep network; a wrong average is off by a factor."""


def placements(*sizes: int) -> list[dict[int, int]]:
    """Every placement of three scales with groups of these sizes."""
    return [
        {k: size for k, size in enumerate(each) if size > 1}
        for each in product(sizes, repeat=SCALES)
    ]


OPTIONS: list[dict[str, Any]] = [
    {"qk_norm": True},
    {"modulation": "shared"},
    {"class_tokens": 2},
    {"attention": "full"},
    {"ties": {"scales": (1, 2)}},
    {"ties": {"scales": (1, 2), "parts": ("mlp", "modulation")}, "modulation": "shared"},
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_those_of_the_replicated_model(ranks):
    sizes = [size for size in (1, 2, 4) if size <= ranks]
    cases: list[dict[str, Any]] = [{"placement": placement} for placement in placements(*sizes)]
    everywhere = {0: 2, 1: ranks, 2: ranks}
    cases += [{"placement": everywhere, "options": options} for options in OPTIONS]
    cases += [{"placement": everywhere, "active": active} for active in (1, 2)]
    cases += [{"placement": everywhere, "checkpointed": (0, 2)}]
    told = on_ranks(expert_worker.gradients, ranks, {"cases": cases})
    assert len(told) == len(cases)
    for case, result in zip(cases, told, strict=True):
        for loss_error, gradient_error, divided, same in result["errors"]:
            assert loss_error < EXACT, case
            assert gradient_error < EXACT, case
            assert same, case
            assert (divided > 0) == bool(case["placement"]), case


def test_heads_and_odd_group_sizes_do_not_matter():
    # 24 and its hidden 96 divide by 3; one head of 24, which 3 does not divide, is as good.
    cases = [
        {"placement": {2: 3, 0: 3}, "options": {"heads": 1}},
        {"placement": {1: 3}, "options": {"heads": 2}},
    ]
    told = on_ranks(expert_worker.gradients, 3, {"cases": cases})
    for result in told:
        assert all(max(errors[:2]) < EXACT for errors in result["errors"])


def distance(first: dict[str, list[float]], second: dict[str, list[float]], kind: str) -> float:
    """Relative distance of one kind of state over all parameters."""
    names = sorted(name for name in first if name.startswith(f"{kind}/"))
    one, other = (
        torch.cat([torch.tensor(state[name], dtype=torch.float64) for name in names])
        for state in (first, second)
    )
    return float((one - other).norm() / other.norm())


UPDATES = 20
LOOKS = (1, 10, 20)
"""After how many updates the whole state is compared; losses and norms are after each."""


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    """What one process learns."""
    payload = {"updates": UPDATES, "looks": LOOKS, "variants": [{"kind": "plain"}]}
    return on_ranks(expert_worker.trajectories, 1, payload)


@pytest.mark.parametrize(
    ("ranks", "variants"),
    [
        (
            2,
            [
                {"kind": "zero", "zero_stage": 1},
                {"kind": "plain", "placement": {2: 2, 1: 2}},
                {"kind": "zero", "zero_stage": 1, "placement": {2: 2}},
                {"kind": "zero", "zero_stage": 2, "placement": {2: 2, 1: 2, 0: 2}},
                {"kind": "zero", "zero_stage": 3, "placement": {2: 2, 1: 2}},
            ],
        ),
        (
            4,
            [
                {"kind": "zero", "zero_stage": 1, "placement": {2: 4, 1: 2}},
                {"kind": "zero", "zero_stage": 2, "placement": {2: 2, 0: 4}},
                {"kind": "zero", "zero_stage": 3, "placement": {2: 4, 1: 2}},
            ],
        ),
    ],
)
def test_twenty_updates_are_those_of_one_process(alone, ranks, variants):
    assert sum(each["history"][1] > OPTIM.clip_norm for each in alone) > UPDATES / 2
    payload = {"updates": UPDATES, "looks": LOOKS, "variants": variants}
    told = on_ranks(expert_worker.trajectories, ranks, payload)
    assert len(told) == UPDATES * len(variants)
    for number, variant in enumerate(variants):
        for update in range(UPDATES):
            got, wanted = told[number * UPDATES + update], alone[update]
            where = f"{variant} update {update}"
            torch.testing.assert_close(
                torch.tensor(got["history"]),
                torch.tensor(wanted["history"]),
                rtol=1e-6,
                atol=0,
                msg=lambda m, w=where: f"{w}: {m}",
            )
            assert (got["state"] is not None) == (update + 1 in LOOKS)
            for kind in ("master", "exp_avg", "ema") if got["state"] else ():
                assert distance(got["state"], wanted["state"], kind) < 1e-6, (where, kind)


def test_a_state_moves_between_placements_and_stages_and_trains_on():
    source = {"kind": "zero", "zero_stage": 2, "placement": {1: 4}}
    targets = [
        {"kind": "zero", "zero_stage": 1},
        {"kind": "zero", "zero_stage": 3, "placement": {1: 2, 0: 2}},
        {"kind": "zero", "zero_stage": 3, "placement": {1: 4}},
        {"kind": "plain", "placement": {0: 4}},
    ]
    told = on_ranks(expert_worker.moved, 4, {"source": source, "targets": targets})
    assert len(told) == len(targets)
    for target, result in zip(targets, told, strict=True):
        assert result["arrived"] == result["before"], target
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
            assert distance(result["end"], result["after"], kind) < 1e-6, (target, kind)
