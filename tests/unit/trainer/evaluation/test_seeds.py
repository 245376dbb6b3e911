"""Checkpoints measured over seeds: of samples by one command, of training over several runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pipelines.encoded import as_png
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.shards import ShardedDataset, ShardsConfig
from tests.support.saved import save_random_model
from trainer.cli.evaluate import main
from trainer.config.job import EvalConfig
from trainer.config.reading import to_dict
from trainer.evaluation import checkpoints
from trainer.evaluation.checkpoints import evaluate_checkpoints
from trainer.evaluation.config import CheckpointEvaluationConfig
from trainer.evaluation.reference import EvalReference
from trainer.evaluation.reports import CheckpointReport
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

pytestmark = pytest.mark.slow

OWN = to_dict(EvalConfig(samples=12, batch=6, seed=3))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two runs that differ in their seed, and one that was trained otherwise."""
    place = tmp_path_factory.mktemp("store")
    pixels = torch.randint(256, (40, 8, 8, 3), generator=torch.Generator().manual_seed(0))
    images = [LabelledImage(as_png(each.byte().numpy()), k % 2) for k, each in enumerate(pixels)]
    for split, part in (("train", images[:24]), ("test", images[24:])):
        write_dataset(part, f"{place}/datasets/colours/{split}")
    index = ShardedDataset(f"{place}/datasets/colours/train", config=ShardsConfig()).digest
    store = open_store(f"{place}/runs", StoreConfig())
    for run, seed, label_dropout in (("a", 0, 0.1), ("b", 1, 0.1), ("c", 2, 0.2)):
        science = {
            "data_set": {"index_sha256": index},
            "train": {"seed": seed, "label_dropout": label_dropout},
            "eval": OWN,
        }
        save_random_model(store, run=run, science=science)
    return place


def asked(place: Path, tmp_path: Path, **changes: object) -> CheckpointEvaluationConfig:
    return CheckpointEvaluationConfig(
        checkpoint=f"{place}/runs/a",
        home=str(place / "home"),
        output=str(tmp_path / "results"),
        device="cpu",
        **changes,
    )


def quiet(_text: str) -> None:
    """Take a line and show it to nobody."""


def test_each_set_of_samples_is_what_its_seed_gives_alone(place, tmp_path, monkeypatch):
    config = asked(place, tmp_path, seeds=3)
    said: list[str] = []
    reports = evaluate_checkpoints(config, report=said.append)
    assert [report.measurement.seed for report in reports] == [3, 4, 5]
    for seed, line in zip((3, 4, 5), said, strict=True):
        assert line.startswith(f"a, 100 images, seed {seed}: ")
    assert len({report.distances[0].frechet for report in reports}) == 3
    alone = dataclasses.replace(config, seed=5, seeds=1, output=str(tmp_path / "alone"))
    assert evaluate_checkpoints(alone, report=quiet) == reports[2:]
    # What is measured is read: another seed more costs that one alone.
    measured: list[int] = []
    measure = checkpoints._Evaluation._measure

    def counted(self, manifest, measurement, precision):
        measured.append(measurement.seed)
        return measure(self, manifest, measurement, precision)

    monkeypatch.setattr(checkpoints._Evaluation, "_measure", counted)
    again = evaluate_checkpoints(dataclasses.replace(config, seeds=4), report=quiet)
    assert measured == [6]
    assert again[:3] == reports


def test_the_command_tells_mean_and_spread_of_runs_and_samples(place, tmp_path, capfd):
    words = [
        f"checkpoint={place}/runs/a",
        f'runs=["{place}/runs/b","{place}/runs/c"]',
        "seeds=2",
        f"home={place}/home",
        f"output={tmp_path}",
        "device=cpu",
    ]
    assert main(words) == 0
    *_, spread = capfd.readouterr().out.split("\n\n")
    rows = [line.split() for line in spread.splitlines() if "frechet" in line]
    assert [row[:3] for row in rows] == [["a", "and", "1"], ["c", "100", "frechet_random_conv"]]
    assert main([*words, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    first, second = told["spreads"]
    assert [len(first["runs"]), len(second["runs"])] == [2, 1]
    assert first["seeds"] == [3, 4]
    figure = first["figures"]["eval/frechet_random_conv"]
    values = [report["distances"][0]["frechet"] for report in told["reports"]]
    assert figure["mean"] == pytest.approx(sum(values[:4]) / 4)
    assert figure["training"] is not None
    assert second["figures"]["eval/frechet_random_conv"]["training"] is None


def test_real_images_are_read_once_for_runs_of_one_data_set(place, tmp_path, monkeypatch):
    read: list[str] = []
    before = EvalReference._read

    def counted(self, *words, **more):
        read.append(self.job.run)
        return before(self, *words, **more)

    monkeypatch.setattr(EvalReference, "_read", counted)
    runs = (f"{place}/runs/b", f"{place}/runs/c")
    reports = evaluate_checkpoints(asked(place, tmp_path, runs=runs), report=quiet)
    assert [report.run for report in reports] == ["a", "b", "c"]
    assert set(read) == {"a"}
    alone = dataclasses.replace(asked(place, tmp_path / "alone"), checkpoint=runs[1])
    (again,) = evaluate_checkpoints(alone, report=quiet)
    assert isinstance(again, CheckpointReport)
    assert again == reports[2]
