"""The command as a Ray job on a cluster that `ray start` began."""

import shlex
import sqlite3
import time
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.support.job import ROOT, SMALL
from tests.support.ray_cluster import ray_cluster
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.store import StoreConfig, open_store

pytestmark = pytest.mark.slow

TOTAL = 12800
COMMAND = (
    *("python", "-m", "trainer.launch"),
    *(setting for setting in SMALL if not setting.startswith("cluster.address")),
    f"train.total_images={TOTAL}",
)


def newest_images(home: Path) -> int:
    store = open_store(f"{home}/store/runs", StoreConfig())
    manifest = CheckpointReader(store, run="digits").newest_valid()
    return 0 if manifest is None else manifest.images


def submit(client: JobSubmissionClient, deadline: float) -> None:
    """Submits the job `first`; a cluster answers before its agent, which starts jobs, is up."""
    while True:
        try:
            client.submit_job(
                entrypoint=shlex.join(COMMAND),
                submission_id="first",
                runtime_env={"working_dir": str(ROOT)},
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return


def test_stop_leaves_a_final_checkpoint_and_submitting_again_finishes(tmp_path, monkeypatch):
    monkeypatch.setenv("LAPFLOW_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_cluster(cpus=2) as cluster:
        deadline = time.monotonic() + 540
        # The command `ray job`, which the second submission is, imports for seconds.
        client = JobSubmissionClient(cluster.dashboard)
        submit(client, deadline)
        while newest_images(tmp_path) < 2560:
            assert time.monotonic() < deadline, client.get_job_logs("first")
            time.sleep(0.1)
        assert client.stop_job("first")
        while client.get_job_status("first") not in (JobStatus.STOPPED, JobStatus.FAILED):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        log = client.get_job_logs("first")
        stopped_at = newest_images(tmp_path)
        assert 2560 < stopped_at < TOTAL, log
        assert "stopped; run the same command again" in log
        assert f"{stopped_at:012d}" in log

        again = cluster.job(
            *("submit", "--submission-id", "second", "--working-dir", str(ROOT), "--", *COMMAND)
        )
        assert again.returncode == 0, again.stdout + again.stderr
        assert f"resumed after {stopped_at:,} images" in again.stdout
        assert "classifier reads the label" in again.stdout
        assert client.get_job_status("second") == JobStatus.SUCCEEDED
    assert newest_images(tmp_path) == TOTAL
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("SELECT name, status FROM runs").fetchall()
        steps = database.execute("SELECT step FROM metrics WHERE key = 'loss/total'").fetchall()
    assert runs == [("digits", "FINISHED")]
    assert sorted(step for (step,) in steps) == sorted(set(range(640, TOTAL + 1, 640)))
