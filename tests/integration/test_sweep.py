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


def test_what_fails_leaves_the_rest_and_what_is_complete_is_not_made_again(home, capfd):
    words = ("train.seed=0,1,2", "tracking.sweep=seeds")
    damaged = home / "store/runs/digits-seed-1/checkpoints/000000000064/MANIFEST.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{}")
    code, answer, said = answered(capfd, *words)
    assert code == 1
    assert [(each["run"], each["outcome"]) for each in answer["runs"]] == [
        ("digits-seed-0", "complete"),
        ("digits-seed-1", "refused"),
        ("digits-seed-2", "complete"),
    ]
    assert "each of them is damaged" in answer["runs"][1]["error"]
    assert "run 3 of 3: digits-seed-2" in said

    damaged.unlink()
    code, answer, said = answered(capfd, *words)
    assert code == 0, said
    assert "sweep seeds: 3 runs, 2 of them complete" in said
    assert "run 1 of 1: digits-seed-1" in said
    assert said.count("the first update is done") == 1
    (table,) = answer["tables"]
    (row,) = table["rows"]
    assert sorted(row["runs"]) == ["digits-seed-0", "digits-seed-1", "digits-seed-2"]
    assert row["figures"]["eval/frechet_random_conv"]["training"] > 0

    client = local_client(home)
    experiment = client.get_experiment_by_name("lapflow")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("seeds")
    assert set(runs) == set(row["runs"])
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"
    assert "reason" not in parent.data.tags
    note = parent.data.tags["mlflow.note.content"]
    assert note == (home / "store/sweeps/seeds/table.md").read_text()
    assert "| run | images | GMAC |" in note
    assert "-m +exp=digits" in note

    # Nothing is left to do, and what a dry run says of that.
    code, answer, said = answered(capfd, *words, "dry_run=true")
    assert (code, answer["flops"]) == (0, 0.0)
    assert [each["is_complete"] for each in answer["runs"]] == [True, True, True]
    code, again, said = answered(capfd, *words)
    assert code == 0
    assert "loading libraries" not in said
    assert [each["outcome"] for each in again["runs"]] == ["complete"] * 3


def test_a_run_from_before_is_put_below_the_sweep_and_one_of_other_settings_is_no_result(
    home, capfd
):
    alone = [word for word in TINY if word != "--multirun"]
    assert main([*alone, "train.total_images=128", "run=digits-seed-0"]) == 0
    changed = ["run=digits-seed-1", "train.seed=1", "optim.learning_rate=0.5"]
    assert main([*alone, "train.total_images=128", *changed]) == 0
    capfd.readouterr()
    code, answer, _ = answered(capfd, "train.seed=0,1")
    assert code == 1
    assert [each["outcome"] for each in answer["runs"]] == ["complete", "refused"]
    assert "optim.learning_rate: 0.5 -> 0.001" in answer["runs"][1]["error"]
    (row,) = answer["tables"][0]["rows"]
    assert row["runs"] == ["digits-seed-0"]
    client = local_client(home)
    experiment = client.get_experiment_by_name("lapflow")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs["digits-seed"]
    assert parent.info.status == "FAILED"
    assert runs["digits-seed-0"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert "mlflow.parentRunId" not in runs["digits-seed-1"].data.tags


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
