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


def placements(ranks: int) -> list[dict[int, int]]:
    """Placements of three scales: on two ranks all, on four every size with every other.

    What a placement runs depends on which scales are sharded, and on which of them share a group.
    Two ranks show each set of sharded scales. On four, a scale's group meets each group of each
    other scale, and the three sizes and all three of four ranks are there.
    """
    sizes = [size for size in (1, 2, 4) if size <= ranks]
    chosen = set(product(sizes, repeat=SCALES))
    if ranks == 4:
        pairs = product(range(len(sizes)), repeat=2)
        chosen = {(sizes[a], sizes[b], sizes[(a + b) % len(sizes)]) for a, b in pairs}
        chosen |= {(4, 4, 4), (1, 2, 4)}
    return [{k: size for k, size in enumerate(each) if size > 1} for each in sorted(chosen)]


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
    cases: list[dict[str, Any]] = [{"placement": placement} for placement in placements(ranks)]
    everywhere = {0: 2, 1: ranks, 2: ranks}
    cases += [{"placement": everywhere, "options": options} for options in OPTIONS]
    cases += [{"placement": everywhere, "active": active} for active in (1, 2)]
    cases += [{"placement": everywhere, "checkpointed": (0, 2)}]
    kept = [{}, {"checkpointed": (0, 2)}, {"active": 2}, *({"options": each} for each in OPTIONS)]
    cases += [{"placement": everywhere, "regather": False} | each for each in kept]
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


WIDTH, HIDDEN, BLOCKS = 24, 96, 2
"""Of the network in float64; blocks are those with shards, all but the first."""
IMAGES, TOKENS = {2: 3, 1: 2, 0: 1}, {2: 3 * 4, 1: 2 * 16, 0: 1 * 64}
"""Of a rank, by scale."""
COARSE = {2: 2, 1: 2}
EVERYWHERE = COARSE | {0: 2}

# A case; how often a block's exchanges are made, and those of its forward pass again; and those of
# modulation.
COUNTED: list[tuple[dict[str, Any], int, int, int]] = [
    ({"placement": {2: 4}}, 1, 0, 1),
    ({"placement": COARSE}, 1, 0, 1),
    ({"placement": COARSE, "regather": False}, 1, 0, 1),
    ({"placement": COARSE, "options": {"ties": {"scales": (1, 2)}}}, 1, 0, 1),
    ({"placement": COARSE, "options": {"modulation": "shared"}}, 1, 0, 0),
    ({"placement": COARSE, "checkpointed": (1, 2)}, 1, 1, 1),
    # Those that are recomputed and those that are not travel apart.
    ({"placement": COARSE, "checkpointed": (2,)}, 2, 1, 1),
    ({"placement": {2: 2, 1: 4}}, 2, 0, 2),
    # The finest scale comes after the others, but with full attention.
    ({"placement": EVERYWHERE}, 2, 0, 2),
    ({"placement": EVERYWHERE, "active": 1}, 1, 0, 1),
    ({"placement": EVERYWHERE, "options": {"attention": "full"}}, 1, 0, 1),
    ({"placement": {0: 4}, "active": 2}, 0, 0, 0),
]


def test_a_block_takes_eight_exchanges_however_many_scales():
    cases = [case for case, *_ in COUNTED]
    told = on_ranks(expert_worker.collectives, 4, {"cases": cases})
    for (case, groups, again, modulations), result in zip(COUNTED, told, strict=True):
        blocks = BLOCKS * groups, BLOCKS * again
        calls = {
            "all_gather": 3 * blocks[0] + 2 * blocks[1] + modulations,
            "all_to_all": 2 * blocks[0] + blocks[1] + 2 * modulations,
            "reduce_scatter": 3 * blocks[0] + blocks[1] + modulations,
        }
        assert result["calls"] == {kind: count for kind, count in calls.items() if count}, case
        assert sum(calls.values()) == 8 * blocks[0] + 4 * blocks[1] + 4 * modulations


@pytest.mark.parametrize("size", [2, 4])
def test_what_leaves_a_rank_is_what_travels_by_design(size):
    cases = [
        {"placement": dict.fromkeys(scales, size), "regather": regather}
        for scales, regather in product([(2,), (2, 1)], [True, False])
    ]
    told = on_ranks(expert_worker.collectives, size, {"cases": cases})
    for case, result in zip(cases, told, strict=True):
        tokens = WIDTH * sum(TOKENS[k] for k in case["placement"])
        images = [IMAGES[k] for k in case["placement"]]
        block = (8 if case["regather"] else 6) * tokens + 6 * tokens // size
        modulation = 2 * max(images) * WIDTH + 2 * BLOCKS * sum(images) * 6 * WIDTH // size
        assert result["bytes"] == 8 * (size - 1) * (BLOCKS * block + modulation), case


def test_shards_keep_no_more_than_whole_experts():
    again = {"checkpointed": (1, 2)}
    cases: list[dict[str, Any]] = [
        {"placement": placement, "regather": regather}
        for placement, regather in product([{2: 2}, COARSE, EVERYWHERE], [True, False])
    ]
    cases += [{"placement": {}}, {"placement": {}} | again, {"placement": COARSE} | again]
    told = on_ranks(expert_worker.kept, 2, {"cases": cases})
    *shards, whole, whole_again, shards_again = (result["bytes"] for result in told)
    for case, found in zip(cases, shards, strict=False):
        tokens = sum(TOKENS[k] for k in case["placement"])
        # The MLP's activations are computed again. The conditions of two ranks are kept.
        fewer = BLOCKS * tokens * HIDDEN - 2 * IMAGES[2] * WIDTH
        if case["placement"] == EVERYWHERE:
            fewer -= 2 * IMAGES[0] * WIDTH
        if not case["regather"]:
            fewer -= BLOCKS * 2 * tokens * WIDTH
        assert whole - found == 8 * fewer, case
        assert found < whole or not case["regather"], case
    assert shards_again - whole_again == 8 * 2 * IMAGES[2] * WIDTH


@pytest.mark.parametrize(("size", "widths"), [(2, 5 + 5), (4, 7 + 8)])
def test_buffers_have_room_for_the_largest_exchange(size, widths):
    cases = [{"placement": dict.fromkeys(scales, size)} for scales in ((2,), (2, 1))]
    told = on_ranks(expert_worker.buffered, size, {"cases": cases})
    for case, result in zip(cases, told, strict=True):
        # To send: tokens for E ranks beside three widths in all. To receive: the same, or the
        # gradients and tokens of E ranks.
        assert widths == (size + 3) + max(size + 3, 2 * size)
        tokens = sum(TOKENS[k] for k in case["placement"])
        assert result["bytes"] == 8 * widths * tokens * WIDTH, case


def distance(first: dict[str, list[float]], second: dict[str, list[float]], kind: str) -> float:
    """Relative distance of one kind of state over all parameters."""
    names = sorted(name for name in first if name.startswith(f"{kind}/"))
    one, other = (
        torch.cat([torch.tensor(state[name], dtype=torch.float64) for name in names])
        for state in (first, second)
    )
    return float((one - other).norm() / other.norm())


UPDATES = 20
KEPT, RECOMPUTED = {"regather_tokens": False}, {"activation_checkpointing": (1, 2)}
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
                {"kind": "zero", "zero_stage": 3, "placement": {2: 2, 0: 2}} | RECOMPUTED,
                {"kind": "zero", "zero_stage": 1, "placement": {2: 2, 1: 2}} | KEPT,
            ],
        ),
        (
            4,
            [
                {"kind": "zero", "zero_stage": 1, "placement": {2: 4, 1: 2}},
                {"kind": "zero", "zero_stage": 2, "placement": {2: 2, 0: 4}},
                {"kind": "zero", "zero_stage": 3, "placement": {2: 4, 1: 2}},
                {"kind": "zero", "zero_stage": 3, "placement": {2: 4, 1: 4}} | KEPT,
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
        {"kind": "zero", "zero_stage": 3, "placement": {1: 4}, "regather_tokens": False},
        {"kind": "plain", "placement": {0: 4}},
    ]
    told = on_ranks(expert_worker.moved, 4, {"source": source, "targets": targets})
    assert len(told) == len(targets)
    for target, result in zip(targets, told, strict=True):
        assert result["arrived"] == result["before"], target
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
            assert distance(result["end"], result["after"], kind) < 1e-6, (target, kind)


def test_all_ranks_clip_by_the_same_bits_where_nodes_add_up_in_another_order():
    (told,) = on_ranks(expert_worker.unlike_nodes, 4, {"placement": {1: 2}})
    first, *others = told["ranks"]
    history, held = first
    # Or a norm's last bit would decide nothing.
    assert all(norm > OPTIM.clip_norm for _, norm in history)
    assert len(others) == 3
    for other_history, other_held in others:
        assert other_history == history
        # Of the shards each rank shares those with one other rank, and everything else with all.
        shared = held.keys() & other_held.keys()
        assert len(shared) >= len(held) / 2
        for name in shared:
            assert other_held[name] == held[name], name


def test_deepspeed_uses_the_groups_that_exchange_tokens():
    variants: list[dict[str, Any]] = [
        {"kind": "zero", "zero_stage": stage, "placement": placement}
        for placement in ({}, {1: 2}, {1: 2, 0: 4})
        for stage in (1, 3)
    ]
    told = on_ranks(expert_worker.group_ranks, 4, {"variants": variants})
    own = {2: [(0, 1), (0, 2)], 4: [(0, 1, 2, 3), (0,)]}
    for number, (variant, result) in enumerate(zip(variants, told, strict=True)):
        expected = [ranks for size in variant["placement"].values() for ranks in own[size]]
        if number == 0:
            # DeepSpeed's own, once in a process.
            expected.append((0, 1, 2, 3))
        assert sorted(result["formed"]) == sorted(expected), variant


def test_buffers_that_grew_for_sampling_are_not_kept_for_training():
    sharded = {"placement": {1: 2}}
    variants = [sharded | {"kind": "plain"}] + [
        sharded | {"kind": "zero", "zero_stage": stage} for stage in (1, 3)
    ]
    told = on_ranks(expert_worker.sampled_between, 2, {"variants": variants})
    for variant, result in zip(variants, told, strict=True):
        training, sampling, after, again, *rest = result["bytes"]
        assert 0 < training < sampling, variant
        assert after == 0, variant
        assert again == training, variant
        assert rest == [sampling, 0], variant
