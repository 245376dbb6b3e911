"""The last words of a launch promise only what the same command can keep."""

import dataclasses

import pytest

from tests.support.configuration import configuration
from tests.support.saved import save_random_model
from trainer.cli.console import Console
from trainer.cli.ending import (
    FAILED,
    REFUSED,
    UNSAVED,
    end_failed,
    end_stopped,
    final_report,
    how_to_go_on,
)
from trainer.config import paths
from trainer.evaluation.reports import evaluation_key
from trainer.storage.open import open_store
from trainer.training.goodput import LaunchTime, total_time

URI = "s3://bucket/lapflow/runs/digits/checkpoints/000000001280"


@pytest.fixture
def job(tmp_path):
    return configuration("+exp=digits", f"home={tmp_path}")


def heard(*, saved=True, begun=True):
    console = Console()
    console.last_checkpoint = URI if saved else ""
    console.begun = begun
    return console


def test_a_stopped_run_goes_on_by_the_same_command_where_it_can(job):
    assert how_to_go_on(job, heard()) == f"run the same command again to continue {URI}"
    never = how_to_go_on(dataclasses.replace(job, resume="never"), heard())
    assert "without resume=never" in never
    assert URI in never
    assert "again" not in never
    assert "begins anew" in how_to_go_on(job, heard(saved=False))


def test_a_mistake_is_not_cured_by_the_same_command(job, capsys):
    begun = end_failed(job, heard(), ValueError("it diverged"))
    assert begun.exit_code == FAILED
    assert end_failed(job, heard(begun=False), ValueError("no such image")).exit_code == REFUSED
    output = capsys.readouterr()
    assert output.err.splitlines() == ["error: it diverged", "error: no such image"]
    assert "same command" not in begun.text + output.out + output.err
    assert begun.text == f"the run's last checkpoint is {URI}"


def test_a_failure_may_be_gone_the_next_time(job, capsys):
    lost = end_failed(job, heard(), RuntimeError("worker 1 was lost"))
    assert lost.exit_code == FAILED
    assert lost.text == f"once the cause is gone, run the same command again to continue {URI}"
    nothing = end_failed(job, heard(saved=False), RuntimeError("worker 1 was lost"))
    assert (nothing.text, nothing.exit_code) == ("", FAILED)
    assert capsys.readouterr().out == ""


@pytest.mark.slow  # MLflow makes its tables
def test_programs_are_told_how_a_launch_ended(job, capsys):
    console = heard()
    console.message({"kind": "progress", "images": 1500, "text": "1,500 images"})
    console.message({"kind": "tracked", "identity": "", "run_id": "4ae"})
    told = {
        "run": "digits",
        "uri": f"{job.home}/store/runs/digits",
        "images": 1500,
        "checkpoint": URI,
        "mlflow_run_id": "4ae",
        "time_s": None,
    }
    values = end_failed(job, console, RuntimeError("worker 1 was lost")).values
    assert values == {
        **told,
        "outcome": "failed",
        "error": "worker 1 was lost",
    }
    ended = end_stopped(job, console, signal_number=2)
    assert ended.exit_code == 130
    assert ended.values["look_at_it"] in ended.text
    assert ended.values == {**told, "outcome": "stopped", "look_at_it": ended.values["look_at_it"]}
    console.times.total = total_time([LaunchTime(wall_s=90.0)])
    assert end_stopped(job, console, signal_number=2).values["time_s"]["start"] == 90.0
    assert "time: 1m30s in all launches: start 100.0%" in capsys.readouterr().out
    lost = {"images": 1600, "uri": "x", "text": "disk full", "attempt": 0, "rank": 0}
    console.message({"kind": "checkpoint_failed", **lost})
    unsaved = end_stopped(job, console, signal_number=2)
    assert unsaved.exit_code == UNSAVED
    assert "could not be saved, the last after 1,600 images: disk full" in unsaved.error


def test_whoever_only_looks_leaves_a_damaged_report_where_it_is(job):
    store = open_store(paths.runs_uri(job), job.store)
    save_random_model(store, run=job.run, images=100)
    key = evaluation_key(job.run, 100, "report.json")
    store.put(key, damaged := b"{}")
    assert final_report(job, only_read=True) is None
    assert store.get(key) == damaged
    assert final_report(job) is None
    assert key not in store.list(f"{job.run}/")
