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

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("finished")]


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


def test_a_run_goes_on_after_ctrl_c_a_killed_worker_and_a_killed_job(finished, home):
    """One run through all three, so that each has to leave what the next goes on from."""
    with job(*SMALL, home=home) as interrupted:
        interrupted.wait_for(r"checkpoint: \S+/000000001280")
        interrupted.signal_group(signal.SIGINT)
        assert interrupted.wait() == 128 + signal.SIGINT, interrupted.output
        final = interrupted.wait_for(r"stopped; .* (\S+/checkpoints/(\d+))")
        assert 1280 < int(final[2]) < 6400
        assert interrupted.processes() == []
    with job(*SMALL, home=home) as killed:
        killed.wait_for(r"(?s)resumed after .+checkpoint: \S+")
        assert f"resumed after {int(final[2]):,} images from {final[1]}" in killed.output
        killed.workers()[0].kill()
        # It restarts by itself, from a checkpoint.
        killed.wait_for(r"(?s)resumed after .+resumed after [\d,]+ images.+checkpoint: \S+")
        killed.kill_everything()
    with job(*SMALL, home=home) as again:
        assert again.wait() == 0, again.output
        assert "resumed after" in again.output
    assert_same_state(home, finished.state)
    assert_no_point_twice(home)
    with job(*SMALL, home=home) as complete:
        assert complete.wait() == 0
        assert "this run is complete" in complete.output
        assert "classifier reads the label" in complete.output
