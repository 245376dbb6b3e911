"""The main job through every real component at once.

An S3 server reached over HTTP, an MLflow server, Ray, DeepSpeed, streaming and DALI.
Nothing is replaced by a stand-in.
"""

import io
import re
import subprocess
import sys

import mlflow
import numpy as np
import pytest
from PIL import Image

from tests.support.job import ROOT, SMALL, job
from tests.support.mlflow_server import mlflow_server
from trainer.checkpoint.saver import Checkpoints
from trainer.checkpoint.store import StoreConfig, open_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(s3, tmp_path_factory):
    """One run to its end; returns its output, store settings and the MLflow client and run."""
    home = tmp_path_factory.mktemp("job")
    uri = f"{s3.make_bucket('job')}/lapflow"
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        arguments = [
            *SMALL,
            f"store.uri={uri}",
            f"store.endpoint_url={s3.endpoint_url}",
            f"tracking.uri={server.uri}",
        ]
        credentials = {
            name: value for name, value in s3.environment.items() if name.startswith("AWS_")
        }
        with job(*arguments, home=home, environment=credentials) as running:
            assert running.wait(400) == 0, running.output
            output = running.output
        client = mlflow.MlflowClient(server.uri)
        (experiment,) = client.search_experiments(filter_string="name = 'lapflow'")
        (run,) = client.search_runs([experiment.experiment_id])
        yield output, uri, client, run, credentials, home


@pytest.fixture
def store(finished, s3, monkeypatch):
    for name, value in finished[4].items():
        monkeypatch.setenv(name, value)
    return open_store(f"{finished[1]}/runs", StoreConfig(endpoint_url=s3.endpoint_url))


def test_progress_and_results_are_told(finished):
    output, uri = finished[:2]
    assert re.search(
        r"1,280/12,800 images \(10%\)  [\d,]+ images/s  "
        r"loss: total [\d.]+, scale_1 [\d.]+, scale_0 [\d.]+  ETA ",
        output,
    )
    assert f"{uri}/runs/digits/evaluation/000000012800/grid.png" in output
    assert f"{uri}/runs/digits/checkpoints/000000012800" in output
    for row in ("Fréchet distance (random_conv)", "real halves / untrained", "classifier reads"):
        assert row in output
    assert "look at the run: http://127.0.0.1" in output
    assert "Traceback" not in output


def test_every_checkpoint_is_committed_and_whole(finished, store):
    catalogue = Checkpoints.reader(store, run="digits")
    for images in range(2560, 12801, 2560):
        manifest = catalogue.manifest(images)
        assert manifest is not None
        assert manifest.world_size == 2
        assert len(manifest.objects) == 2


def test_results_are_in_the_store(finished, store):
    folder = "digits/evaluation/000000012800"
    grid = Image.open(io.BytesIO(store.get(f"{folder}/grid.png")))
    assert grid.size == (10 * 52 + 4, 10 * 52 + 4)
    samples = np.load(io.BytesIO(store.get(f"{folder}/samples.npz")))
    assert samples["arr_0"].shape == (100, 8, 8, 1)
    assert samples["arr_0"].dtype == np.uint8
    assert np.bincount(samples["arr_1"]).tolist() == [10] * 10


def test_mlflow_has_the_configuration_the_curves_and_the_pictures(finished):
    client, run = finished[2:4]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.global_batch"] == "64"
    assert run.data.tags["checkpoint"].endswith("/runs/digits/checkpoints/000000012800")
    for name in (
        "loss/total",
        "loss/scale_0",
        "loss/scale_1",
        "gradient_norm",
        "learning_rate",
        "images_per_s",
        "data_wait_share",
        "memory_host_gib",
        "skipped_updates",
    ):
        points = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in points] == list(range(1280, 12801, 1280)), name
    curve = [point.value for point in client.get_metric_history(run.info.run_id, "loss/total")]
    assert curve[-1] < 0.8 * curve[0]
    assert run.data.metrics["eval/gap_closed"] > 0
    paths = {
        item.path
        for folder in ("", "samples", "evaluation")
        for item in client.list_artifacts(run.info.run_id, folder)
    }
    assert {
        "config.yaml",
        "samples/000000006400.png",
        "samples/000000012800.png",
        "evaluation/000000012800.png",
    } <= paths


def test_no_credential_is_written_anywhere(finished, s3):
    _, _, client, run, credentials, home = finished
    secret = credentials["AWS_SECRET_ACCESS_KEY"].encode()
    assert len(secret) > 5
    config = client.download_artifacts(run.info.run_id, "config.yaml", str(home))
    files = [path for path in home.rglob("*") if path.is_file()]
    assert config in map(str, files)
    assert [path for path in files if secret in path.read_bytes()] == []
    assert secret.decode() not in finished[0]


def test_a_grid_is_drawn_from_any_checkpoint(finished, s3, tmp_path):
    import os

    grids = []
    for images in (2560, 12800):
        output = tmp_path / f"{images}.png"
        subprocess.run(
            [
                *(sys.executable, "-m", "trainer.sample"),
                f"checkpoint={finished[1]}/runs/digits/checkpoints/{images:012d}",
                f"store.endpoint_url={s3.endpoint_url}",
                f"output={output}",
                "classes=[3,5]",
                "columns=4",
                "sampler.steps=2",
            ],
            cwd=ROOT,
            env={**os.environ, **finished[4]},
            check=True,
        )
        grids.append(np.asarray(Image.open(output)))
    assert grids[0].shape == (2 * 52 + 4, 4 * 52 + 4)
    assert not np.array_equal(*grids)
