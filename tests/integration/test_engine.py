"""One conformance suite for all engines, on real gloo ranks, against one plain process."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cluster.contract import ClusterConfig
from cluster.launcher import run
from tests.support import engine_worker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

# Without it all weights of a tiny model are small enough for ZeRO-3 to leave them whole.
DIVIDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 1000}}
ENGINES: list[dict[str, Any]] = [
    {"kind": "plain"},
    {"kind": "zero", "zero_stage": 1},
    {"kind": "zero", "zero_stage": 2},
    {"kind": "zero", "zero_stage": 3},
    {"kind": "plain", "placement": {1: 2}},
    {"kind": "zero", "zero_stage": 1, "placement": {1: 2}},
    {"kind": "zero", "zero_stage": 2, "placement": {0: 2, 1: 2}},
    {"kind": "zero", "zero_stage": 3, "placement": {1: 2}},
    {"kind": "zero", "zero_stage": 2, "offload_optimizer": True},
    {"kind": "zero", "zero_stage": 3, "offload_optimizer": True, "placement": {1: 2}},
    {"kind": "zero", "zero_stage": 3, "deepspeed": DIVIDED},
    {"kind": "zero", "zero_stage": 3, "deepspeed": DIVIDED, "placement": {1: 2}},
]


def on_ranks(worker: Callable[..., None], ranks: int, payload: dict[str, Any]) -> list[Any]:
    told: list[Any] = []
    config = ClusterConfig(backend="local", workers=ranks, gpus_per_worker=0)
    run(config, worker, payload, on_message=told.append, stop=threading.Event())
    return told


def assert_close(
    first: dict[str, list[float]], second: dict[str, list[float]], **tolerance
) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        torch.testing.assert_close(
            torch.tensor(values),
            torch.tensor(second[name]),
            msg=lambda m, n=name: f"{n}: {m}",
            **tolerance,
        )


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    (told,) = on_ranks(engine_worker.conformance, 1, {"variants": [{"kind": "plain"}]})
    return told


@pytest.fixture(scope="module")
def courses() -> list[dict[str, Any]]:
    """What happened to every engine on two ranks; each test looks at another side of it."""
    told = on_ranks(engine_worker.course, 2, {"engines": ENGINES})
    assert len(told) == len(ENGINES)
    return told


@pytest.fixture(scope="module")
def bf16() -> list[dict[str, Any]]:
    """What the engines do in bf16, the plain one and each ZeRO stage with a NaN at the end."""
    whole = [each | {"precision": "bf16", "poisoned": each in ENGINES[:4]} for each in ENGINES]
    # In two micro-batches, whose gradients are added up in fp32.
    summed = [
        each | {"precision": "bf16", "micro_batch": 2, "poisoned": each in ENGINES[:4]}
        for each in (*ENGINES[:6], *ENGINES[8:10])
    ]
    variants = [*whole, *summed]
    told = on_ranks(engine_worker.conformance, 2, {"variants": variants})
    assert len(told) == len(variants)
    return [{"variant": one, **other} for one, other in zip(variants, told, strict=True)]


def assert_trained_alike(told: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for result in told:
        torch.testing.assert_close(
            torch.tensor(result["history"]), torch.tensor(reference["history"]), rtol=1e-5, atol=0
        )
        assert_close(result["state"], reference["state"], rtol=1e-5, atol=1e-6)


def test_every_engine_trains_like_one_plain_process(reference, courses):
    clipped = [norm > engine_worker.OPTIM.clip_norm for _, norm in reference["history"]]
    assert any(clipped), "the test must exercise clipping"
    assert_trained_alike(courses, reference)


def test_accumulating_and_recomputing_change_nothing(reference):
    accumulating = [each | {"micro_batch": 2} for each in (*ENGINES[:5], ENGINES[-1])]
    recomputing = [
        {"kind": "plain", "activation_checkpointing": (0, 1)},
        ENGINES[-1] | {"activation_checkpointing": (0,)},
    ]
    variants = [*accumulating, *recomputing]
    told = on_ranks(engine_worker.conformance, 2, {"variants": variants})
    assert len(told) == len(variants)
    assert_trained_alike(told, reference)


def test_ways_of_reducing_change_nothing(reference):
    """Buckets of few weights, on the stream of the backward pass, to all ranks or to owners."""
    ways: list[dict[str, Any]] = [
        {"reduce_bucket_size": 300},
        {"reduce_bucket_size": 300, "use_multi_rank_bucket_allreduce": True},
        {"overlap_comm": False},
    ]
    engines = (ENGINES[1], ENGINES[2], ENGINES[5], ENGINES[1] | {"micro_batch": 2})
    variants = [
        each | {"deepspeed": {"zero_optimization": way}} for each in engines for way in ways
    ]
    told = on_ranks(engine_worker.conformance, 2, {"variants": variants})
    assert len(told) == len(variants)
    assert_trained_alike(told, reference)


def test_one_block_has_nothing_to_divide():
    shallow = {"model": {"depth": 1}}
    (alone,) = on_ranks(engine_worker.conformance, 1, {"variants": [{"kind": "plain"} | shallow]})
    variants = [each | shallow for each in ENGINES[4:8]]
    assert_trained_alike(on_ranks(engine_worker.conformance, 2, {"variants": variants}), alone)


def test_weights_that_an_update_does_not_use_have_a_zero_gradient():
    stages = [1, 0, 1, 1]  # stage 1 leaves the finest scale out
    (alone,) = on_ranks(
        engine_worker.conformance, 1, {"variants": [{"kind": "plain"}], "stages": stages}
    )
    accumulating = [each | {"micro_batch": 1} for each in (*ENGINES[1:3], ENGINES[-1])]
    variants = [*ENGINES, *accumulating]
    told = on_ranks(engine_worker.conformance, 2, {"variants": variants, "stages": stages})
    assert len(told) == len(variants)
    assert_trained_alike(told, alone)


def test_bf16_keeps_fp32_masters_and_stays_near(reference, bf16):
    for result in bf16:
        losses, wanted = (torch.tensor(each["history"])[:, 0] for each in (result, reference))
        variant = result["variant"]
        torch.testing.assert_close(losses, wanted, rtol=3e-2, atol=0, msg=str(variant))
        masters = torch.tensor(result["state"]["master/time_embed.hidden.weight"])
        assert not torch.equal(masters, masters.bfloat16().float()), variant


@pytest.fixture(scope="module")
def sums() -> dict[str, list[float]]:
    """What 7 gradients of 1/512 add to one, by precision and with every engine that has it."""
    by_precision: dict[str, list[dict[str, Any]]] = {
        "fp32": [{"kind": "plain"}],
        "bf16 added up in fp32": [each | {"precision": "bf16"} for each in ENGINES],
        "bf16": [each | {"precision": "bf16", "grad_accum_dtype": "bf16"} for each in ENGINES[:4]],
    }
    variants = [each for group in by_precision.values() for each in group]
    told = iter(on_ranks(engine_worker.adding_up, 2, {"variants": variants, "passes": 8}))
    return {name: [next(told)["sum"] for _ in group] for name, group in by_precision.items()}


def test_small_gradients_are_not_lost_in_the_sum(sums):
    exact = 1 + 7 / 512
    assert sums["fp32"] == pytest.approx([exact], rel=1e-5)
    kept = sums["bf16 added up in fp32"]
    # Ranks still exchange gradients in bf16, with ZeRO-1 the sums: each is rounded to 8 bits, once.
    assert kept == pytest.approx([exact] * len(kept), rel=2**-9)


def test_adding_up_in_bf16_loses_them(sums):
    assert sums["bf16"] == pytest.approx([1.0] * 4, abs=2e-3)


def test_moved_state_trains_on_bit_for_bit(courses):
    for engine, result in zip(ENGINES, courses, strict=True):
        assert result["resumed"] == result["state"], engine


def test_ema_and_initial_weights_are_in_the_model_only_inside_the_block(courses):
    for engine, result in zip(ENGINES, courses, strict=True):
        for got, wanted in (("inside", "expected"), ("beginning", "begun")):
            if not engine.get("placement"):
                assert result[got] == result[wanted], engine
            for one, other in zip(result[got], result[wanted], strict=True):
                torch.testing.assert_close(torch.tensor(one), torch.tensor(other))
        # The one used the model with other weights half way, the other did not.
        assert result["state"] == result["resumed"], engine


def test_a_nan_on_one_rank_is_skipped_by_all_and_training_goes_on(courses, bf16):
    poisoned = [*courses, *(result for result in bf16 if "applied" in result)]
    assert len(poisoned) == len(ENGINES) + 2 * 4
    for number, result in enumerate(poisoned):
        assert result["applied"] == [False, False], number
        assert result["unmoved"], number
        assert result["next"][0][0] > 0, number
