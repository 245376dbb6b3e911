"""Samples and metrics on real gloo ranks: what one process would get."""

import threading
from typing import Any

import pytest
import torch

from cluster.contract import ClusterConfig
from cluster.launcher import run
from pipelines.encoded import as_png
from pipelines.ingest.write import LabelledImage, write_dataset
from tests.support import gather_worker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

SAMPLERS = [
    {"solver": "heun", "steps": 5, "guidance_scale": 2.0},
    {"solver": "ab2", "steps": 5},
    {"solver": "dopri5"},
]


def on_ranks(worker: Any, ranks: int, payload: dict[str, Any]) -> list[Any]:
    told: list[Any] = []
    config = ClusterConfig(backend="local", workers=ranks, gpus_per_worker=0)
    run(config, worker, payload, on_message=told.append, stop=threading.Event())
    return told


def test_samples_do_not_depend_on_the_number_of_ranks_to_the_bit_nor_on_the_batch():
    draws = {
        (ranks, batch): on_ranks(
            gather_worker.samples, ranks, {"images": 13, "batch": batch, "samplers": SAMPLERS}
        )
        for ranks, batch in ((1, 13), (1, 2), (2, 2), (3, 2))
    }
    for told in draws.values():
        assert all(message["images"] == [] for message in told if message["rank"] > 0)
    firsts = {
        key: [message for message in told if message["rank"] == 0] for key, told in draws.items()
    }
    assert firsts[2, 2] == firsts[1, 2]
    assert firsts[3, 2] == firsts[1, 2]
    for one, other, sampler in zip(firsts[1, 13], firsts[1, 2], SAMPLERS, strict=True):
        assert len(one["images"]) == 13
        assert other["evaluations"] == pytest.approx(one["evaluations"], rel=1e-12)
        torch.testing.assert_close(
            torch.tensor(other["images"]),
            torch.tensor(one["images"]),
            rtol=1e-6,
            atol=1e-6,
            msg=lambda m, s=sampler: f"{s}: {m}",
        )


def test_figures_are_the_same_to_the_bit_on_any_number_of_ranks_and_in_any_batch(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 700), ("test", 300)):
        pixels = torch.randint(0, 256, (count, 8, 8, 1), generator=generator).byte().numpy()
        images = [as_png(each) for each in pixels]
        images[17] = images[17][:40]
        labelled = [LabelledImage(image, n % 3) for n, image in enumerate(images)]
        write_dataset(labelled, f"{tmp_path}/data/{split}")
    payload = {"prefix": f"{tmp_path}/data", "images": 40, "compared": 30}
    told = {
        (ranks, batch): on_ranks(
            gather_worker.measured,
            ranks,
            {**payload, "batch": batch, "home": f"{tmp_path}/{ranks}-{batch}"},
        )
        for ranks, batch in ((1, 40), (1, 7), (2, 7), (3, 3))
    }
    (whole,) = told[1, 40]
    for found in told.values():
        for each in found:
            assert each["figures"] == whole["figures"]
            assert each["nfe"] == whole["nfe"] == [2.0, 2.0]
            assert each["real_images"] == [299, 1]
            assert each["pictures"] == (each["rank"] == 0 and whole["pictures"])
    for figures in whole["figures"]:
        assert 0 < figures["real"]["frechet"] < figures["frechet"]
        assert figures["real"]["images"] in (39, 40)
        more, real = figures["more"], figures["real"]["more"]
        assert (more["compared"], more["compared_real"]) == (30, 30)
        for each in (more, real):
            assert each["sliced_wasserstein"] > 0
            assert each["kernel_distance"] is not None
            assert 0 <= each["precision"] <= 1
            assert 0 <= each["recall"] <= 1
    parted = whole["figures"][0]["more"]
    assert parted["spatial_frechet"] > 0
    assert parted["inception_score"] > 1


@pytest.mark.parametrize("unsolvable", [0, 1, 3, 4])
def test_a_solver_that_comes_to_no_end_on_one_rank_does_so_on_all(unsolvable):
    told = on_ranks(gather_worker.unsolvable, 3, {"images": 5, "unsolvable": unsolvable})
    assert sorted(message["rank"] for message in told) == [0, 1, 2]
    (said,) = {message["said"] for message in told}
    assert "the velocity is not finite" in said


@pytest.mark.parametrize("blocks", [1, 2, 4, 9])
def test_a_first_rank_that_leaves_early_takes_the_others_along(blocks):
    told = on_ranks(gather_worker.left_early, 3, {"blocks": blocks})
    # One block in each of the turns that were begun, and two network evaluations for each.
    turns = -(-blocks // 3)
    assert sorted(message["rank"] for message in told) == [0, 1, 2]
    assert [message["calls"] for message in told] == [2 * turns] * 3


def test_the_first_rank_may_take_longer_than_a_collective():
    told = on_ranks(gather_worker.slow_first, 2, {"blocks": 3})
    assert sorted(message["rank"] for message in told) == [0, 1]


def test_metrics_are_reduced_over_ranks_as_declared():
    first, second = on_ranks(gather_worker.metrics, 2, {})
    assert first["values"] == second["values"]
    assert first["values"] == {
        "mean": 2.5,
        "weighted": 10.0 * 2 / 3,
        "empty here": 7.0,
        "sum": 3.0,
        "max": -1.0,
        "bin 0": (1 * 2.0 + 3 * 3.0) / 4,
    }


def test_messages_of_any_size_reach_whom_they_are_for():
    told = sorted(on_ranks(gather_worker.messages, 3, {}), key=lambda each: each["rank"])
    assert [each["least"] for each in told] == [5, 5, 5]
    assert all(all(each["broadcast"]) for each in told)
    assert told[0]["sent"] == [100_001, 1, 2]
    assert told[0]["collected"] == [[0], [1, 1], [100_000, 2]]
    assert told[1]["collected"] == told[2]["collected"] == []
