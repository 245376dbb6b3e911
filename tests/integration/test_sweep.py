"""Several runs by one command, on real data: what fails, what is made again, what is shown."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.job import job
from tests.support.tracked import local_client
from trainer.cli.launch import main

pytestmark = pytest.mark.slow

TINY = (
    "--multirun",
    "+exp=digits",
    "engine=plain",
    "cluster.backend=local",
    "cluster.workers=1",
    "cluster.gpus_per_worker=0",
    "model.depth=1",
    "model.width=16",
    "train.global_batch=64",
    "checkpoint.interval_images=64",
    "runtime.log_interval_images=64",
    "eval.grid_interval_images=0",
    "eval.classifier=false",
    "eval.samples=20",
    "eval.sampler.steps=2",
)


@pytest.fixture
def home(empty_tracker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(empty_tracker, tmp_path)
    monkeypatch.setenv("LAPFLOW_HOME", str(tmp_path))
    return tmp_path


def answered(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    """Make a sweep; gives its exit code, its answer, and what it said."""
    code = main([*TINY, "train.total_images=128", *words, "--json"])
    told = capfd.readouterr()
    return code, json.loads(told.out), told.err


def runs_in_mlflow(home: Path) -> dict[str, Any]:
    client = local_client(home)
    experiment = client.get_experiment_by_name("lapflow")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_what_fails_leaves_the_rest_and_what_is_complete_is_not_made_again(home, capfd):
    words = ("train.seed=0,1,2", "tracking.sweep=seeds")
    # One was launched before by itself, and the checkpoints of another are damaged.
    assert main([*TINY[1:], "train.total_images=128", "run=digits-seed-0"]) == 0
    damaged = home / "store/runs/digits-seed-1/checkpoints/000000000064/MANIFEST.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{}")
    capfd.readouterr()
    code, answer, said = answered(capfd, *words)
    assert code == 1
    assert [(each["run"], each["outcome"]) for each in answer["runs"]] == [
        ("digits-seed-0", "complete"),
        ("digits-seed-1", "refused"),
        ("digits-seed-2", "complete"),
    ]
    assert "each of them is damaged" in answer["runs"][1]["error"]
    assert "sweep seeds: 3 runs, 1 of them complete" in said
    assert "run 2 of 2: digits-seed-2" in said
    assert answer["tables"][0]["rows"][0]["runs"] == ["digits-seed-0", "digits-seed-2"]
    assert runs_in_mlflow(home)["seeds"].info.status == "FAILED"

    damaged.unlink()
    code, answer, said = answered(capfd, *words)
    assert code == 0, said
    assert "run 1 of 1: digits-seed-1" in said
    assert said.count("the first update is done") == 1
    (table,) = answer["tables"]
    (row,) = table["rows"]
    assert row["runs"] == ["digits-seed-0", "digits-seed-1", "digits-seed-2"]
    assert row["figures"]["eval/frechet_random_conv"]["training"] > 0

    runs = runs_in_mlflow(home)
    parent = runs.pop("seeds")
    assert sorted(runs) == row["runs"]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"
    assert "reason" not in parent.data.tags
    note = parent.data.tags["mlflow.note.content"]
    assert note == (home / "store/sweeps/seeds/table.md").read_text()
    assert "| run | images | GMAC |" in note
    assert "-m +exp=digits" in note

    # Nothing is left to do; with other settings none of these runs is a result.
    code, again, said = answered(capfd, *words)
    assert code == 0
    assert "loading libraries" not in said
    assert again["tables"] == answer["tables"]
    for changed, is_complete in (((), True), (("optim.learning_rate=0.5",), False)):
        code, told, _ = answered(capfd, *words, *changed, "dry_run=true")
        assert code == 0
        assert [each["is_complete"] for each in told["runs"]] == [is_complete] * 3
        assert (told["flops"] == 0) == is_complete


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_run_with_a_checkpoint_and_begins_no_other(home, number):
    words = [*TINY, "train.total_images=6400000", "train.seed=0,1"]
    with job(*words, home=home) as sweep:
        sweep.wait_for(r"64,?\d*/6,400,000 images")
        if number == signal.SIGINT:
            sweep.signal_group(number)  # as a terminal does
        else:
            sweep.signal(number)
        assert sweep.wait() == 128 + number, sweep.output
        assert "1 stopped, 1 not begun" in sweep.output
        assert sweep.processes() == []
    (run,) = (home / "store/runs").iterdir()
    assert run.name == "digits-seed-0"
    assert list(run.glob("checkpoints/*/MANIFEST.json"))
