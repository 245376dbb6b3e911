"""Bad input gets one clear paragraph and a non-zero exit; nothing half-written counts."""

import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipelines.ingest.digits import ensure_digits
from trainer.cli.launch import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

TINY = [
    "+exp=digits",
    "cluster.backend=local",
    "cluster.workers=1",
    "engine=plain",
    "model.depth=1",
    "model.width=16",
    "train.global_batch=64",
    "train.total_images=256",
    "checkpoint.interval_images=128",
    "eval.samples=20",
    "eval.sampler.steps=2",
    "eval.classifier=false",
    "data.prepare=none",
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    ensure_digits(str(folder))
    return folder


@pytest.fixture
def copied(digits, tmp_path) -> Path:
    return Path(shutil.copytree(digits, tmp_path / "digits"))


@pytest.fixture
def launch(empty_tracker, tmp_path, monkeypatch, capfd):
    home = tmp_path / "home"
    monkeypatch.setenv("LAPFLOW_HOME", str(home))

    def run(*overrides: str) -> tuple[int, str]:
        if not home.exists():
            home.mkdir()
            shutil.copy(empty_tracker, home)
        code = main([*TINY, *overrides])
        written = capfd.readouterr()
        return code, written.out + written.err

    return run


@pytest.fixture
def mlflow_rows(tmp_path):
    def rows(query: str) -> list[tuple]:
        with sqlite3.connect(tmp_path / "home/mlflow.db") as database:
            return database.execute(query).fetchall()

    return rows


@pytest.fixture(scope="module")
def finished_home(digits, empty_tracker, tmp_path_factory) -> Path:
    """Train the run `first` to its end: 256 images, with a checkpoint half way."""
    home = tmp_path_factory.mktemp("first")
    shutil.copy(empty_tracker, home)
    assert main([*TINY, f"home={home}", f"data.prefix={digits}", "run=first"]) == 0
    return home


@pytest.fixture
def first(finished_home, digits, tmp_path) -> list[str]:
    """Give the test a copy of that run, and what names it."""
    shutil.copytree(finished_home, tmp_path / "home")
    return [f"data.prefix={digits}", "run=first"]


def assert_refused(code: int, output: str, *parts: str) -> None:
    assert code == 2, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    for part in parts:
        assert part in errors[0], errors[0]
    assert "Traceback" not in output


def test_missing_data(launch, tmp_path):
    assert_refused(*launch(f"data.prefix={tmp_path}/nowhere"), f"{tmp_path}/nowhere")


def test_empty_data(launch, tmp_path):
    folder = tmp_path / "empty" / "train"
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": []}))
    assert_refused(*launch(f"data.prefix={folder.parent}"), str(folder))


def test_a_corrupt_shard_stops_the_run_and_is_named(launch, copied, tmp_path):
    (shard,) = (copied / "train").glob("*.mds")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert_refused(*launch(f"data.prefix={copied}"), shard.name)
    assert not list((tmp_path / "home").rglob("MANIFEST.json"))


def test_a_truncated_image_is_counted_and_skipped_until_there_are_too_many(launch, tmp_path):
    from pipelines.ingest.write import LabelledImage, write_dataset
    from pipelines.shards import ShardedDataset

    whole = tmp_path / "whole"
    ensure_digits(str(whole))
    for split in ("train", "test"):
        images = ShardedDataset(f"{whole}/{split}")
        samples = [images.read(index) for index in range(len(images))]
        write_dataset(
            (
                LabelledImage(
                    sample.data[:40] if split == "train" and sample.sample_id == 9 else sample.data,
                    sample.label,
                )
                for sample in samples
            ),
            f"{tmp_path}/broken/{split}",
        )
    prefix = f"data.prefix={tmp_path}/broken"
    # One pass over all images meets the broken one.
    code, output = launch(prefix, "train.total_images=1536", "run=tolerant")
    assert code == 0, output
    assert "sample 9" in output
    code, output = launch(
        prefix, "train.total_images=1536", "run=strict", "loader.max_bad_fraction=0"
    )
    # Not refused at the start: the share is known only after reading.
    assert code in (1, 2), output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "sample 9" in error
    assert "max_bad_fraction" in error


def test_an_unreachable_store(launch, digits):
    code, output = launch(
        f"data.prefix={digits}",
        "store.uri=s3://bucket/lapflow",
        "store.endpoint_url=http://127.0.0.1:9",
        "store.retries=1",
        "store.connect_timeout_s=1",
    )
    assert_refused(code, output, "127.0.0.1:9")


def test_an_unreachable_tracker_is_refused_or_tolerated_as_configured(launch, digits, mlflow_rows):
    away = [f"data.prefix={digits}", "tracking.uri=http://127.0.0.1:9"]
    assert_refused(*launch(*away), "tracking.uri=http://127.0.0.1:9", "tracking.required=false")
    code, output = launch(*away, "tracking.required=false", "tracking.flush_timeout_s=1")
    assert code == 0, output
    assert "warning: MLflow" in output
    # A checkpoint has kept the curves, and the complete run sends them once MLflow is there.
    code, output = launch(away[0])
    assert code == 0, output
    assert "this run is complete" in output
    assert mlflow_rows("SELECT status FROM runs") == [("FINISHED",)]
    assert mlflow_rows("SELECT step FROM metrics WHERE key = 'loss/total'") == [(256,)]
    assert (
        len(mlflow_rows("SELECT step FROM metrics WHERE key = 'reference/frechet_random_conv'"))
        == 1
    )


def test_an_unwritable_home_and_store(launch, digits, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert_refused(*launch(f"data.prefix={digits}", f"home={blocked}/home"), f"{blocked}/home")
    assert_refused(*launch(f"data.prefix={digits}", f"store.uri={blocked}/store"), str(blocked))


def test_a_checkpoint_of_another_configuration_and_every_mode_of_resume(
    launch, first, digits, tmp_path
):
    prefix = f"data.prefix={digits}"
    assert_refused(
        *launch(*first, "optim.learning_rate=5e-4"),
        "optim.learning_rate: 0.001 -> 0.0005",
        "run=",
    )
    assert_refused(*launch(*first, "resume=never"), "resume=never", "run=first")
    assert_refused(*launch(prefix, "run=x", "resume=sometimes"), "sometimes", "auto")
    missing = f"{tmp_path}/home/store/runs/first/checkpoints/000000000999"
    assert_refused(*launch(prefix, "run=x", f"resume={missing}"), missing)
    source = f"{tmp_path}/home/store/runs/first/checkpoints/000000000128"
    code, output = launch(prefix, "run=second", f"resume={source}")
    assert code == 0, output
    assert f"resumed after 128 images from {source}" in output
    code, output = launch(*first, "train.total_images=512")
    assert code == 0, output
    assert "resumed after 256 images" in output


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(launch, first, tmp_path):
    newest = tmp_path / "home/store/runs/first/checkpoints/000000000256"
    (shard,) = newest.rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-5] ^= 4
    shard.write_bytes(data)
    code, output = launch(*first, "train.total_images=512")
    assert code == 0, output
    assert "SHA-256" in output
    assert "resumed after 128 images" in output


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(launch, first, tmp_path):
    shards = (tmp_path / "home/store/runs/first/checkpoints").rglob("*.safetensors")
    whole = {shard: shard.read_bytes() for shard in shards}
    assert len(whole) == 2
    longer = [*first, "train.total_images=512"]
    for shard, data in whole.items():
        shard.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
    assert_refused(*launch(*longer), "run=first", "damaged")
    for shard, data in whole.items():
        shard.write_bytes(data[:-9])
    assert_refused(*launch(*longer), "run=first", "damaged")
    for shard, data in whole.items():
        shard.write_bytes(data)
    code, output = launch(*longer)
    assert code == 0, output
    assert "resumed after 256 images" in output


def test_a_finished_run_is_evaluated_again_for_other_settings(launch, first):
    code, output = launch(*first, "eval.samples=30")
    assert (code, "this run is complete" in output) == (0, False)
    assert "of 30 samples" in output


def test_a_run_goes_on_when_nobody_reads_its_output(launch, first, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr("sys.stdout", os.fdopen(writing, "w"))
    code, output = launch(*first, "train.total_images=512")
    assert code == 0, output
    assert "error" not in output
    assert (tmp_path / "home/store/runs/first/evaluation/000000000512/report.json").exists()


def test_a_resumed_run_shows_its_present_settings_and_where_it_is_shown(
    launch, first, tmp_path, mlflow_rows
):
    code, output = launch(*first, "train.total_images=512", "checkpoint.keep_last=2")
    assert code == 0, output
    tags = dict(mlflow_rows("SELECT key, value FROM tags WHERE key LIKE 'setting.%'"))
    assert tags["setting.train.total_images"] == "512"
    assert tags["setting.checkpoint.keep_last"] == "2"
    parameters = dict(mlflow_rows("SELECT key, value FROM params"))
    assert parameters["train.global_batch"] == "64"
    assert "train.total_images" not in parameters
    ((experiment,),) = mlflow_rows("SELECT experiment_id FROM experiments WHERE name = 'lapflow'")
    # The other one is of the place that this run was copied from.
    *_, (run,) = mlflow_rows("SELECT run_uuid FROM runs ORDER BY start_time")
    pages = (
        f"trainer.ui home={tmp_path}/home   opens http://127.0.0.1:5000/#/experiments/{experiment}"
    )
    # Before the workers have begun the run, its page is not known to be there.
    before, after = f"{pages}/runs?workflowType", f"{pages}/runs/{run}?workflowType"
    assert (output.count(before), output.count(after)) == (1, 1)


def test_a_run_whose_worker_was_killed_has_failed_in_mlflow(launch, first, tmp_path, mlflow_rows):
    def kill() -> None:
        news = tmp_path / "home/store/runs/first/checkpoints/000000000384/MANIFEST.json"
        deadline = time.monotonic() + 120
        while not news.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            if process.ppid() != os.getpid():  # the rank, a child of the server of forks
                process.kill()

    threading.Thread(target=kill, daemon=True).start()
    settings = ["train.total_images=1000000", "checkpoint.keep_last=100000"]
    code, output = launch(*first, *settings)
    assert code == 1, output
    assert "SIGKILL" in output
    assert "once the cause is gone, run the same command again to continue" in output
    newest = "SELECT status FROM runs ORDER BY start_time DESC LIMIT 1"
    assert mlflow_rows(newest) == [("FAILED",)]


def test_a_run_whose_loss_is_no_number_stops_unsaved_and_says_what_may_help(
    launch, first, tmp_path
):
    checkpoints = tmp_path / "home/store/runs/hot/checkpoints"
    # Ten updates: too few to be ended for their gradients.
    settings = ["train.total_images=640", "optim.learning_rate=1e20"]
    code, output = launch(first[0], "run=hot", *settings)
    assert code == 1, output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "training has diverged" in error
    assert "the loss was not finite in the last" in error
    assert "lower optim.learning_rate=1e+20" in error
    assert "precision" not in error
    assert "same command" not in output
    assert "Traceback" not in output
    assert "evaluating" not in output
    assert "256 images: the loss is not finite, so nothing is saved" in output
    saved = {int(manifest.parent.name) for manifest in checkpoints.glob("*/MANIFEST.json")}
    assert saved <= {128}


def test_a_signal_stops_the_run_and_is_the_callers_own_after_it(launch, first, tmp_path):
    checkpoints = tmp_path / "home/store/runs/first/checkpoints"

    def interrupt() -> None:
        while not (checkpoints / "000000000384/MANIFEST.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def own(_number, _frame) -> None:
        """Keep a late signal from this process."""

    before = signal.signal(signal.SIGTERM, own), signal.getsignal(signal.SIGINT)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        settings = ["train.total_images=1000000", "checkpoint.keep_last=100000"]
        code, output = launch(*first, *settings)
        assert code == 128 + signal.SIGTERM, output
        assert "stopped; run the same command again to continue" in output
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGINT) is before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_latents_are_refused_before_anything_starts(launch, digits):
    code, output = launch(f"data.prefix={digits}", "data.space=latent")
    assert_refused(code, output, "data.space=latent", "codec=sd_vae")
