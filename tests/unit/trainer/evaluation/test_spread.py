"""Figures over seeds: what is put together, and by which formulas."""

from __future__ import annotations

import copy
from dataclasses import replace
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.configuration import configuration
from trainer.cli import evaluate
from trainer.cli.evaluate import spread_table
from trainer.cli.sweep_table import RunResults, tables_of
from trainer.config.job import science
from trainer.config.sweeps import SweepPoint
from trainer.evaluation.figures import Distance
from trainer.evaluation.reports import CheckpointReport, Measurement
from trainer.evaluation.spread import MeasuredSet, spreads
from trainer.storage.store import StoreConfig

JOB = configuration("+exp=digits")
SCIENCE = science(JOB, data_digest="digest")


def trained_with(**train: Any) -> dict[str, Any]:
    return {**SCIENCE, "train": {**SCIENCE["train"], **train}}


def measured(
    run: str,
    frechet: float,
    *,
    seed: int = 1,
    images: int = 100,
    samples: int = 1000,
    features: str = "random_conv",
    chosen: dict[str, Any] = SCIENCE,
) -> MeasuredSet:
    return MeasuredSet(
        run=run,
        images=images,
        science=chosen,
        measurement=Measurement(
            attempt=f"{run}-{images}",
            weights="ema",
            samples=samples,
            seed=seed,
            sampler={
                "solver": "heun",
                "steps": 10,
                "guidance_scale": 1.0,
                "guidance_interval": None,
            },
            extractors={features: ""},
            held_out_index="c0ffee",
        ),
        distance=Distance(features=features, frechet=frechet, diversity=10 * frechet),
    )


def test_noise_of_samples_and_seeds_of_training_are_told_apart():
    values = {"a": (1.0, 1.2, 1.4), "b": (2.0, 2.1, 2.5), "c": (0.5, 0.9, 0.7)}
    sets = [
        measured(run, value, seed=seed, chosen=trained_with(seed=number))
        for number, (run, each) in enumerate(values.items())
        for seed, value in enumerate(each)
    ]
    (found,) = spreads(sets)
    assert found.runs == ("a", "b", "c")
    assert found.seeds == (0, 1, 2)
    means = [fmean(each) for each in values.values()]
    assert found.frechet.mean == pytest.approx(fmean(means))
    assert found.frechet.training == pytest.approx(stdev(means))
    within = fmean(stdev(each) ** 2 for each in values.values()) ** 0.5
    assert found.frechet.sampling == pytest.approx(within)
    diversity = found.figures["eval/random_conv_diversity"]
    assert diversity.training == pytest.approx(10 * stdev(means))


def test_one_run_has_no_spread_of_training_and_one_set_none_of_sampling():
    (alone,) = spreads([measured("a", 1.0)])
    assert (alone.frechet.mean, alone.frechet.sampling, alone.frechet.training) == (1.0, None, None)
    (noise,) = spreads([measured("a", 1.0), measured("a", 3.0, seed=2)])
    assert noise.frechet.sampling == pytest.approx(2**0.5)
    assert noise.frechet.training is None
    (far,) = spreads([measured("a", 1e200), measured("a", 3e200, seed=2)])
    assert far.frechet.sampling == pytest.approx(2**0.5 * 1e200)
    runs = [measured("a", 1.0), measured("b", 3.0, chosen=trained_with(seed=1))]
    (training,) = spreads(runs)
    assert training.frechet.training == pytest.approx(2**0.5)
    assert training.frechet.sampling is None


@pytest.mark.parametrize(
    "other",
    [
        measured("b", 9.0, samples=50_000),
        measured("b", 9.0, features="inception"),
        measured("b", 9.0, images=200),
        measured("b", 9.0, chosen=trained_with(seed=1, label_dropout=0.2)),
        measured("b", 9.0, chosen={**SCIENCE, "data_set": {"index_sha256": "other"}}),
        measured("b", 9.0, chosen={**SCIENCE, "train": [3], "eval": None}),
        measured("b", 9.0, chosen={"train": {"seed": {"a": 1}}}),
    ],
)
def test_what_does_not_compare_is_never_put_together(other):
    """Another protocol, another length of training, another training, other images."""
    first, second = spreads([measured("a", 1.0), other])
    assert (first.frechet.mean, second.frechet.mean) == (1.0, 9.0)


def test_a_training_done_twice_counts_once():
    """Runs of one seed agree to the bit where nothing goes wrong: that is no spread over seeds."""
    twice = [measured("a", 1.0), measured("b", 1.0)]
    (found,) = spreads(twice)
    assert found.runs == ("a", "b")
    assert (found.frechet.mean, found.frechet.training) == (1.0, None)
    (found,) = spreads([*twice, measured("c", 3.0, chosen=trained_with(seed=1))])
    assert found.frechet.mean == 2.0
    assert found.frechet.training == pytest.approx(2**0.5)


def test_runs_whose_seed_nothing_tells_are_trainings_of_their_own():
    (found,) = spreads([measured("a", 1.0, chosen={}), measured("b", 3.0, chosen={})])
    assert found.frechet.training == pytest.approx(2**0.5)


def test_runs_of_a_sweep_that_differ_in_more_than_the_seed_have_rows_of_their_own():
    """What varies may be no science, as the number of workers is."""
    values = {(0, 1): 10.0, (0, 2): 21.0, (1, 1): 12.0, (1, 2): 23.0}
    results = []
    for (seed, workers), frechet in values.items():
        job = replace(JOB, run=f"digits-seed-{seed}-workers-{workers}")
        varied = {"train.seed": f"{seed}", "cluster.workers": f"{workers}"}
        one = measured(job.run, frechet, chosen=trained_with(seed=seed))
        results.append(RunResults(SweepPoint(words=(), varied=varied, job=job), [one], 1e9))
    (table,) = tables_of(results)
    assert table.head[:4] == ("cluster.workers", "images", "GMAC", "Fréchet")
    assert [(row[0], row[3], row[5], row[6]) for row in table.rows] == [
        *(("1", "11.0000", "1.4", "2"), ("2", "22.0000", "1.4", "2"))
    ]


def test_runs_have_the_same_noise_where_they_can():
    """Of a run that was measured by more sets, those count that the others have too."""
    sets = [measured("a", 1.0), measured("a", 100.0, seed=2)]
    sets += [measured("b", 2.0, chosen=trained_with(seed=1))]
    (found,) = spreads(sets)
    assert found.seeds == (1,)
    assert found.frechet.mean == 1.5
    assert found.frechet.sampling is None


def test_the_last_of_two_measurements_of_a_set_counts():
    (found,) = spreads([measured("a", 1.0), measured("a", 2.0)])
    assert found.frechet.mean == 2.0
    assert found.frechet.sampling is None


@pytest.mark.parametrize("older", [0, 1])
def test_runs_of_versions_that_know_different_settings_are_one_training(older):
    """Whichever comes first, what it does not know has its default."""
    of_before = copy.deepcopy(trained_with(seed=1))
    del of_before["model"]["attention"]
    sets = [measured("a", 1.0), measured("b", 2.0, chosen=of_before)]
    (found,) = spreads(sets[::-1] if older else sets)
    assert set(found.runs) == {"a", "b"}


def test_the_table_has_a_part_for_each_protocol():
    sets = [
        measured("runs/a", 1.0),
        measured("runs/b", 2.0, chosen=trained_with(seed=1)),
        measured("runs/a", 7.0, samples=50_000),
    ]
    first, second = spread_table(spreads(sets)).split("\n\n")
    assert first.splitlines()[1].split() == [
        *("a", "and", "1", "more", "100", "frechet_random_conv"),
        *("1.5", "1", "0.71", "2"),
    ]
    assert second.splitlines()[1].split() == ["a", "100", "frechet_random_conv", "7", "1", "1"]


def test_runs_below_a_folder_called_checkpoints_are_told_apart(monkeypatch):
    """Whatever stands above, the run is the folder that the checkpoint's own folder lies in."""
    above = "/data/checkpoints/runs"
    widths = {f"{above}/one": (16, 1.0), f"{above}/two": (32, 9.0)}
    told = []
    for run, (_, frechet) in widths.items():
        one = measured(run, frechet)
        report = CheckpointReport(
            checkpoint=f"{run}/checkpoints/000000000100",
            run=run.rpartition("/")[2],
            images=one.images,
            real_images=100,
            network_evaluations=10.0,
            distances=(one.distance,),
            measurement=one.measurement,
        )
        told.append(report)

    def opened(uri: str, _config: StoreConfig) -> tuple[None, None, Any]:
        width, _ = widths[uri.removesuffix("/checkpoints/000000000100")]
        return None, None, SimpleNamespace(science={**SCIENCE, "model": {"width": width}})

    monkeypatch.setattr("trainer.evaluation.choice.open_checkpoint", opened)
    found = spreads(evaluate._sets(told, StoreConfig()))
    assert [(each.runs, each.frechet.mean) for each in found] == [
        ((run,), frechet) for run, (_, frechet) in widths.items()
    ]
