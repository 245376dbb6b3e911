"""Kill a worker, kill everything, stop by Ctrl-C: the run ends bit-equal to an undisturbed one.

Real Ray workers, real DeepSpeed ZeRO-2 on gloo, real shards decoded by DALI, fp32 on CPU. The
undisturbed run had its store in S3; these have theirs in a folder.
"""

import shutil
import signal
import sqlite3

import pytest
import torch

from tests.support.job import SMALL, final_state, job

pytestmark = pytest.mark.slow

SECOND_CHECKPOINT = r"checkpoint: \S+/000000002560"


@pytest.fixture
def home(empty_tracker, tmp_path):
    shutil.copy(empty_tracker, tmp_path)
    return tmp_path


def assert_same_state(home, undisturbed):
    state = final_state(f"{home}/store", "digits")
    assert state.keys() == undisturbed.keys()
    assert state["images"] == 6400
    different = [name for name in state if not torch.equal(state[name], undisturbed[name])]
    assert different == []


def assert_no_point_twice(home):
    with sqlite3.connect(home / "mlflow.db") as database:
        points = database.execute("SELECT run_uuid, key, step FROM metrics").fetchall()
    assert len({run for run, _, _ in points}) == 1
    assert {step for _, key, step in points if key == "loss/total"} == set(range(640, 6401, 640))
    assert len(points) == len(set(points))


def test_a_killed_worker_is_replaced_and_a_killed_job_continued_when_run_again(finished, home):
    with job(*SMALL, home=home) as running:
        running.wait_for(SECOND_CHECKPOINT)
        running.workers()[0].kill()
        # It restarts by itself, from a checkpoint.
        running.wait_for(r"resumed after [\d,]+ images(.|\n)+checkpoint: \S+")
        running.kill_everything()
    with job(*SMALL, home=home) as again:
        assert again.wait() == 0, again.output
        assert "resumed after" in again.output
    assert_same_state(home, finished.state)
    assert_no_point_twice(home)


def test_ctrl_c_leaves_a_final_checkpoint_from_which_the_run_goes_on(finished, home):
    with job(*SMALL, home=home) as running:
        running.wait_for(SECOND_CHECKPOINT)
        running.signal_group(signal.SIGINT)
        assert running.wait() == 128 + signal.SIGINT, running.output
        final = running.wait_for(r"stopped; .* (\S+/checkpoints/(\d+))")
        assert 2560 < int(final[2]) < 6400
        assert running.processes() == []
    with job(*SMALL, home=home) as again:
        assert again.wait() == 0, again.output
        assert f"resumed after {int(final[2]):,} images from {final[1]}" in again.output
    assert_same_state(home, finished.state)
    with job(*SMALL, home=home) as complete:
        assert complete.wait() == 0
        assert "this run is complete" in complete.output
        assert "classifier reads the label" in complete.output
