"""A real launch whose run another one wants: that one is refused, or has it, and the first ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipelines.documents import seal
from tests.support.job import ROOT, SMALL, job
from trainer.storage.lease import Holder
from trainer.storage.local import LocalStore

pytestmark = pytest.mark.slow


def test_a_launch_whose_run_is_taken_ends_as_a_failure_and_not_as_a_stop(
    empty_tracker: Path, tmp_path: Path
) -> None:
    shutil.copy(empty_tracker, tmp_path)
    store = LocalStore(tmp_path / "store/runs")
    settings = ("cluster.backend=local", "train.total_images=640000", "eval.grid_interval_images=0")
    with job(*SMALL, *settings, home=tmp_path) as robbed:
        robbed.wait_for(r"checkpoint: \S+/000000001280")
        second = subprocess.run(
            [sys.executable, "-m", "trainer.launch", *SMALL, *settings],
            cwd=ROOT,
            env={**os.environ, "LAPFLOW_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 2, second.stderr
        assert f"is being trained by another launch: process {robbed.pid} of " in second.stderr
        other = replace(Holder.here(), host="elsewhere", process="other-boot pid:[1] 77")
        record = json.dumps(seal(asdict(other))).encode()
        store.put(f"digits/lease/{2:012d}/holder.json", record)
        assert robbed.wait() == 1, robbed.output
    assert "error: run=digits was taken over by another launch (process" in robbed.output
    assert "on elsewhere" in robbed.output
    assert "Traceback" not in robbed.output
