"""Checkpoints measured while a run is trained: no bit of it changes, none is measured twice."""

import json
import re
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from tests.support.job import final_state, job
from trainer.cli.launch import main
from trainer.evaluation.checkpoints import evaluate_checkpoints
from trainer.evaluation.config import CheckpointEvaluationConfig
from trainer.evaluation.reports import CheckpointReport

pytestmark = pytest.mark.slow

TINY = (
    "+exp=digits",
    "model.depth=1",
    "model.width=16",
    "train.global_batch=64",
    "train.total_images=384",
    "checkpoint.interval_images=256",
    "checkpoint.keep_last=100",
    "eval.samples=30",
    "eval.batch=10",
    "eval.sampler.steps=2",
    "eval.classifier=false",
    "eval.grid_interval_images=0",
)
RANKS = (*TINY, "cluster.backend=local", "cluster.workers=2")
FIGURE = "eval/frechet_random_conv"


@pytest.fixture
def home(tmp_path, empty_tracker):
    shutil.copy(empty_tracker, tmp_path)
    return tmp_path


def launch(home: Path, capfd, *words: str) -> tuple[int, str]:
    code = main([*words, f"home={home}"])
    written = capfd.readouterr()
    assert "Traceback" not in written.out + written.err
    return code, written.out + written.err


def measured(output: str) -> list[int]:
    found = re.findall(r"measured after ([\d,]+) images", output)
    return [int(images.replace(",", "")) for images in found]


def reports(home: Path) -> dict[int, CheckpointReport]:
    files = home.glob("store/runs/digits/evaluation/*/*/report.json")
    found = [CheckpointReport.from_json(file.read_bytes()) for file in files]
    return {report.images: report for report in found}


def curve(home: Path, name: str = FIGURE) -> dict[int, float]:
    with sqlite3.connect(home / "mlflow.db") as database:
        points = database.execute("SELECT step, value FROM metrics WHERE key = ?", [name])
        found = points.fetchall()
    assert len({step for step, _ in found}) == len(found)
    return dict(found)


def folder(home: Path, images: int) -> Path:
    return home / f"store/runs/digits/evaluation/{images:012d}"


def measured_later(home: Path, images: int, output: Path) -> CheckpointReport:
    config = CheckpointEvaluationConfig(
        checkpoint=f"{home}/store/runs/digits/checkpoints/{images:012d}",
        home=str(home),
        output=str(output),
        device="cpu",
    )
    (report,) = evaluate_checkpoints(config, report=lambda _line: None)
    return report


def test_all_ranks_measure_and_no_bit_of_training_changes(
    home, tmp_path_factory, empty_tracker, capfd, forked_ranks
):
    other = tmp_path_factory.mktemp("other")
    shutil.copy(empty_tracker, other)
    assert launch(other, capfd, *RANKS)[0] == 0
    words = [*RANKS, "eval.during.every_images=128"]
    code, output = launch(home, capfd, *words)
    assert (code, measured(output)) == (0, [128, 256])
    alone, beside = (final_state(f"{each}/store", "digits") for each in (other, home))
    assert [name for name in alone if not torch.equal(alone[name], beside[name])] == []
    assert alone.keys() == beside.keys()
    found = reports(home)
    assert sorted(found) == [128, 256]
    # It is what one process measures later, to the bit.
    assert measured_later(home, 128, other / "later") == found[128]
    end = json.loads((folder(home, 384) / "report.json").read_text())
    points = {images: report.distances[0].frechet for images, report in found.items()}
    assert curve(home) == {**points, 384: end["frechet"]}
    assert not list(home.rglob("begun.json"))

    # A longer run goes on from what was its end, which is measured already.
    before = {images: (folder(home, images)).stat().st_mtime_ns for images in (128, 256)}
    code, output = launch(home, capfd, *words, "train.total_images=512")
    assert (code, measured(output)) == (0, [])
    assert before == {images: folder(home, images).stat().st_mtime_ns for images in before}
    # What a launch was ended in before it could measure it is measured by the next one, here by
    # fewer samples, whose figures have a curve of their own.
    shutil.rmtree(folder(home, 512))
    few = "eval.during.samples=20"
    code, output = launch(home, capfd, *words, few, "train.total_images=640")
    assert (code, measured(output)) == (0, [512])
    assert reports(home)[512].measurement.samples == 20
    assert sorted(curve(home)) == [128, 256, 384, 512, 640]
    assert sorted(curve(home, "eval_during/frechet_random_conv")) == [512]


def test_what_cannot_be_measured_is_told_and_training_goes_on(home, capfd, forked_ranks):
    words = [*RANKS, "eval.during.every_images=128", "eval.sampler.guidance_scale=1e38"]
    code, output = launch(home, capfd, *words)
    assert code == 1  # nor could the end
    for images in (128, 256):
        told = rf"the checkpoint of {images} images is not measured: .*samples have diverged"
        assert len(re.findall(told, output)) == 1
    assert "384/384 images" in output
    assert "the run is trained to its end" in output
    assert curve(home) == {}
    assert not list(home.rglob("begun.json"))


def test_a_task_on_the_cluster_measures_while_training_goes_on(home, tmp_path):
    words = [*TINY, "cluster.workers=1", "cluster.address=local", "engine=plain"]
    words += ["cluster.spares=true"]  # of whose environment the task has another
    words += ["eval.during.every_images=256", "eval.during.where=beside"]
    with job(*words, home=home) as first:
        assert first.wait() == 0, first.output
        assert first.processes() == []
    # At the end of training what is under way is waited for.
    assert measured(first.output) == [256]
    found = reports(home)
    assert measured_later(home, 256, tmp_path / "later") == found[256]
    assert curve(home)[256] == found[256].distances[0].frechet
    with sqlite3.connect(home / "mlflow.db") as database:
        ((status,),) = database.execute("SELECT status FROM runs").fetchall()
    assert status == "FINISHED"
