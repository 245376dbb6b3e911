"""The command that draws a set of samples: by processes and by Ray, into folders and S3, killed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.job import ROOT, job
from tests.support.s3_server import S3Server
from tests.support.saved import save_random_model
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

pytestmark = pytest.mark.slow

SAMPLES = 40
WORDS = (f"n={SAMPLES}", "batch=4", "sampler.solver=euler", "sampler.steps=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("run")
    save_random_model(open_store(f"{place}/runs", StoreConfig()), run="small")
    return f"{place}/runs/small"


@pytest.fixture(scope="module")
def alone(run: str, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The images as one worker draws them, from PNG files."""
    folder = tmp_path_factory.mktemp("alone") / "set"
    words = (f"checkpoint={run}", *WORDS, f"output={folder}")
    with job(*words, home=folder.parent, module="trainer.sample") as running:
        assert running.wait() == 0, running.output
    assert (
        f"{SAMPLES} samples of 2 classes: euler 2 steps, no guidance, 2 network" in running.output
    )
    found = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    return np.stack([np.asarray(Image.open(path)) for path in found])


def test_four_workers_of_ray_draw_into_s3_what_one_process_draws(
    run: str, alone: np.ndarray, s3: S3Server, tmp_path: Path
) -> None:
    output = f"{s3.make_bucket('samples')}/set"
    words = [
        *(f"checkpoint={run}", *WORDS, f"output={output}", "format=npz"),
        *(f"store.endpoint_url={s3.endpoint_url}", "cluster.backend=ray", "cluster.workers=4"),
        "cluster.address=local",
    ]
    options = {"home": tmp_path, "environment": s3.environment, "module": "trainer.sample"}
    with job(*words, **options) as running:
        assert running.wait() == 0, running.output
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        store = open_store(output, StoreConfig(endpoint_url=s3.endpoint_url))
        (tmp_path / "samples.npz").write_bytes(store.get("samples.npz"))
        assert set(store.list("")) == {"plan.json", "samples.json", "samples.npz"}
    stored = np.load(tmp_path / "samples.npz")
    assert np.array_equal(stored["arr_0"], alone)
    assert np.bincount(stored["arr_1"]).tolist() == [SAMPLES // 2] * 2
    # The same command again finds it complete, and needs no worker to say so.
    with job(*words, "--json", **options) as again:
        assert again.wait() == 0, again.output
    assert "complete" in again.output
    assert '"network_evaluations": 2.0' in again.output


def test_a_killed_command_leaves_no_worker_and_goes_on_to_the_same_images(
    run: str, alone: np.ndarray, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    many = 50 * SAMPLES
    words = [
        *(f"checkpoint={run}", *WORDS, f"n={many}", f"output={folder}", "format=npz"),
        "cluster.workers=2",
    ]
    records = folder / "parts"
    with job(*words, home=tmp_path, module="trainer.sample") as running:
        while running.processes() and not any(records.glob("*.json")):
            time.sleep(0.02)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        while running.processes():
            time.sleep(0.02)
    there = len(list(records.glob("*.json")))
    assert 0 < there < many / 8
    with job(*words, home=tmp_path, module="trainer.sample") as running:
        assert running.wait() == 0, running.output
    assert f"going on: {8 * there} of {many} images are there" in running.output
    images = np.load(folder / "samples.npz")["arr_0"]
    assert len(images) == many
    assert np.array_equal(images[:SAMPLES], alone)
    assert {path.name for path in folder.iterdir()} == {"plan.json", "samples.json", "samples.npz"}


def test_a_full_disk_is_named_and_nothing_of_what_was_drawn_is_lost(
    run: str, alone: np.ndarray, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "trainer.sample", f"checkpoint={run}", *WORDS]
    command += ["format=npz", f"output={disk}/set", f"home={tmp_path}/home"]
    script = (
        f"mount -t tmpfs -o size=40k none {disk} || exit 77\n"
        f"{shlex.join(command)}; echo first $?; ls {disk}/set/parts\n"
        f"mount -o remount,size=1m {disk}\n"
        f"{shlex.join(command)}; echo second $?\n"
        f"cp {disk}/set/samples.npz {tmp_path}\n"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("this machine lets nobody mount a disk")
    first, _, second = done.stdout.partition("first 2")
    assert "second 0" in second, done.stdout + done.stderr
    assert "samples of 2 classes" not in first
    assert "the disk is full; free space or choose another folder" in done.stderr
    assert "00000.json" in second
    assert re.search(rf"going on: \d+ of {SAMPLES} images are there", done.stderr)
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], alone)
