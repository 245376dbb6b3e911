"""The last words of a launch promise only what the same command can keep."""

import dataclasses
import sys

import pytest

from tests.support.configuration import configuration
from trainer.cli.ending import FAILED, REFUSED, Console, failed, how_to_go_on

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
    assert failed(job, heard(), ValueError("it diverged")) == FAILED
    assert failed(job, heard(begun=False), ValueError("no such image")) == REFUSED
    output = capsys.readouterr()
    assert "same command" not in output.out + output.err
    assert f"the run's last checkpoint is {URI}" in output.out


def test_a_failure_may_be_gone_the_next_time(job, capsys):
    assert failed(job, heard(), RuntimeError("worker 1 was lost")) == FAILED
    sys.stdout.flush()
    said = capsys.readouterr().out
    assert f"once the cause is gone, run the same command again to continue {URI}" in said
    assert failed(job, heard(saved=False), RuntimeError("worker 1 was lost")) == FAILED
    assert capsys.readouterr().out == ""
