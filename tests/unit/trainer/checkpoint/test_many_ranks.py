"""A thousand ranks and more: manifests that fit, and messages that do not grow with them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from benchmarks.checkpoints.manifest import announcements, make_manifest
from tests.unit.trainer.checkpoint.stores import MemoryStore
from tests.unit.trainer.checkpoint.worlds import (
    KINDS,
    RUN,
    SCIENCE,
    SHAPES,
    Savings,
    State,
    ThreadRanks,
    empty_state,
    on_ranks,
    random_state,
    same_bits,
)
from trainer.checkpoint import save_plan
from trainer.checkpoint.errors import InvalidManifest
from trainer.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.save_plan import RankState, SavePlan, plan_save
from trainer.checkpoint.slices import Span, slices_of
from trainer.state import Fragment

# As in a transformer: the same few shapes again and again, some of them smaller than the world.
LAYER = {"qkv.weight": (3456, 1152), "qkv.bias": (3456,), "norm.weight": (1152,), "scale": ()}
MODEL = {f"blocks.{n}.{name}": shape for n in range(8) for name, shape in LAYER.items()}


def planned(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> SavePlan:
    announced = list(announcements(shapes, ranks))
    return plan_save([each.parameters for each in announced], [each.spans for each in announced])


def part_of(shape: tuple[int, ...], rank: int, ranks: int) -> Span:
    numel = math.prod(shape)
    part = -(-numel // ranks)
    return Span(rank * part, max(0, min(part, numel - rank * part)))


@pytest.mark.parametrize("ranks", [1, 7, 64, 512, 1000, 1024, 4096])
def test_the_plan_of_zero_3_is_what_each_rank_holds_and_survives_the_way(ranks: int) -> None:
    plan = planned(MODEL, ranks)
    assert SavePlan.from_json(plan.to_json()) == plan
    assert sum(map(len, plan.cuts.values())) <= 2 * len(MODEL)
    for rank in {0, 1, ranks // 2, ranks - 1} & set(range(ranks)):
        held = {name: part_of(shape, rank, ranks) for name, shape in MODEL.items()}
        assert slices_of(rank, plan.cuts) == {n: span for n, span in held.items() if span.numel}


def test_experts_divided_over_neighbours_are_cut_by_arithmetic_too() -> None:
    """Rank r holds a part of the share r % 8 of a weight, as eight neighbours divide it."""
    ranks, shares, numel = 1024, 8, 3456 * 1152
    each = numel // ranks
    rows = [
        (rank % shares * (numel // shares) + rank // shares * each, each) for rank in range(ranks)
    ]
    announced = [RankState.of([KINDS], {"w": (3456, 1152)}, [row]) for row in rows]
    plan = plan_save([each.parameters for each in announced], [each.spans for each in announced])
    assert len(plan.cuts["w"]) == shares
    for rank in (0, 1, 9, 1023):
        assert slices_of(rank, plan.cuts) == {"w": Span(*rows[rank])}


@pytest.mark.parametrize("ranks", [64, 1024, 4096])
def test_a_manifest_grows_by_its_objects_alone(ranks: int) -> None:
    manifest = make_manifest(planned(MODEL, ranks), ranks)
    data = manifest.to_json()
    assert Manifest.from_json(data, run=manifest.run) == manifest
    assert len(data) < 10_000 + 150 * ranks


@pytest.mark.slow
def test_xl_by_4096_ranks_can_be_read_again() -> None:
    kinds = {**LAYER, "mlp.weight": (4608, 1152), "mlp.bias": (4608,), "ada.weight": (6912, 1152)}
    model = {
        f"scales.{scale}.blocks.{block}.{name}": shape
        for scale in range(3)
        for block in range(28)
        for name, shape in kinds.items()
    }
    assert len(make_manifest(planned(model, 4096), 4096).to_json()) < MAX_MANIFEST_BYTES / 16


def parts(state: State, ranks: int) -> list[list[Fragment]]:
    """What each rank holds under ZeRO-3."""
    return [
        [
            Fragment(
                name=name,
                start=span.start,
                shape=shape,
                tensors={kind: state[kind][name][span.start : span.stop] for kind in KINDS},
            )
            for name, shape in SHAPES.items()
            if (span := part_of(shape, rank, ranks)).numel > 0
        ]
        for rank in range(ranks)
    ]


def received(world: int) -> tuple[list[int], list[int], list[int]]:
    """Saves and restores; bytes that came to the first and to the last rank, and in its thread."""
    state, loaded, store = random_state(0), empty_state(), MemoryStore()
    mine, target = parts(state, world), parts(loaded, world)

    def act(rank: int, ranks: ThreadRanks) -> tuple[list[int], list[int]]:
        savings = Savings(store, ranks=ranks)
        savings.save(images=64, fragments=mine[rank], train_state={}, **SCIENCE)
        reader = CheckpointReader(store, run=RUN, ranks=ranks)
        manifest = reader.newest_valid()
        assert manifest is not None
        reader.restore(manifest, target[rank])
        return ranks.received, ranks.aside.received

    outcomes = on_ranks(world, act)
    assert same_bits(state, loaded)
    (first, _), (last, aside) = outcomes[0], outcomes[-1]
    return first, last, aside


def test_no_rank_receives_what_all_ranks_hold_but_the_first() -> None:
    few, many = received(2), received(16)
    # At a commit no rank but the first hears more than that it went well.
    assert many[2] == few[2]
    assert max(many[2]) <= 8
    # Beginning and resuming bring one plan and one manifest, to which a rank adds one object.
    assert sum(many[1]) - sum(few[1]) <= 14 * 400
    assert sum(many[0]) - sum(few[0]) <= 14 * 1500


def test_what_could_not_be_read_again_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(save_plan, "MAX_MANIFEST_BYTES", 4 * 1024**2)
    store, fragments = MemoryStore(), parts(random_state(0), 2)

    def act(rank: int, ranks: ThreadRanks) -> None:
        Savings(store, ranks=ranks).saver.prepare(fragments[rank], science={})

    outcomes = on_ranks(2, act)
    assert [type(outcome) for outcome in outcomes] == [InvalidManifest] * 2
    assert "Training does not begin" in str(outcomes[1])
    assert "engine.zero_stage" in str(outcomes[1])
    assert store.objects == {}
