"""The main job through every real component at once, undisturbed and killed.

An S3 server reached over HTTP, an MLflow server, Ray, DeepSpeed, streaming and DALI.
Nothing is replaced by a stand-in. However it is ended, by Ctrl-C, with a worker, with everything,
since a rank stands still or computes nonsense, it goes on and ends bit-equal to the undisturbed run
(ZeRO-2 on gloo, fp32 on CPU), and with the same weights but for roundings where a node is lost for
good. One undisturbed run serves all tests.
"""

import gzip
import io
import json
import re
import shutil
import signal
import sqlite3
import threading
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.failure import WorkerFailed
from cluster.launcher import run
from tests.support.job import SMALL, final_state, job
from tests.support.ray_cluster import ray_cluster
from tests.support.worker_runs import distance
from trainer.checkpoint.reader import CheckpointReader
from trainer.cli.sample import main as sample
from trainer.config import paths
from trainer.config.composition import compose_job
from trainer.config.reading import to_dict
from trainer.evaluation.checkpoints import evaluate_checkpoints
from trainer.evaluation.config import CheckpointEvaluationConfig
from trainer.storage.lease import hold_lease
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig
from trainer.training.goodput import read_launches, total_time
from trainer.training.preflight import preflight
from trainer.training.step import TrainStep
from trainer.training.worker import train_worker

pytestmark = pytest.mark.slow


def test_progress_and_results_are_told(finished):
    assert re.search(
        r"640/6,400 images \(10%\)  [\d,]+ images/s  "
        r"loss: total [\d.]+, scale_1 [\d.]+, scale_0 [\d.]+  ETA ",
        finished.output,
    )
    assert f"{finished.uri}/runs/digits/evaluation/000000006400/grid.png" in finished.output
    assert f"{finished.uri}/runs/digits/checkpoints/000000006400" in finished.output
    for row in ("Fréchet distance (random_conv)", "real / untrained", "classifier reads"):
        assert row in finished.output
    page = r"look at the run: http://127\.0\.0\.1:\d+/#/experiments/\d+/runs%s\?workflowType=mach"
    for part in ("", f"/{finished.record.info.run_id}"):  # before it is known, and at the end
        assert len(re.findall(page % part, finished.output)) == 1
    assert "Traceback" not in finished.output


def test_no_silence_lasts_before_the_first_progress_line(finished):
    phases = re.findall(r"^\[\S+s\] (.*)$", finished.output.split("640/6,400")[0], re.MULTILINE)
    expected = (
        "loading libraries",
        "checking the store, the data set and MLflow",
        "writing scikit-learn's digits",
        "starting 2 workers",
        "2 of 2 workers have met",
        "building the model",
        "the model is there",
        "waiting for the first batch",
        "the first batch is there",
        "the first update is done",
    )
    told = iter(phases)
    for beginning in expected:
        assert any(phase.startswith(beginning) for phase in told), (beginning, phases)


def test_every_checkpoint_is_committed_and_whole(finished):
    checkpoints = CheckpointReader(finished.store, run="digits")
    for images in range(1280, 6401, 1280):
        manifest = checkpoints.manifest(images)
        assert manifest is not None
        assert manifest.world_size == 2
        assert len(manifest.objects) == 2


def test_results_are_in_the_store(finished):
    folder = "digits/evaluation/000000006400"
    grid = Image.open(io.BytesIO(finished.store.get(f"{folder}/grid.png")))
    assert grid.size == (10 * 52 + 4, 10 * 52 + 4)
    samples = np.load(io.BytesIO(finished.store.get(f"{folder}/samples.npz")))
    assert samples["arr_0"].shape == (100, 8, 8, 1)
    assert samples["arr_0"].dtype == np.uint8
    assert np.bincount(samples["arr_1"]).tolist() == [10] * 10


def test_the_end_writes_a_report_logs_it_and_names_it(finished, tmp_path):
    page = finished.store.get("digits/report.html").decode()
    assert f"read the report: {finished.uri}/runs/digits/report.html" in finished.output
    assert page.count("data:image/png;base64,") >= 3  # grid, film, grids on the way
    for words in ("Fréchet distance by random_conv", "Loss by scale", "Where the time went"):
        assert words in page
    assert finished.record.info.run_id not in page  # it needs no tracker
    artifact = finished.client.download_artifacts(
        finished.record.info.run_id, "report.html", str(tmp_path)
    )
    assert Path(artifact).read_text() == page
    film = Image.open(io.BytesIO(finished.store.get("digits/evaluation/000000006400/film.png")))
    assert film.width > film.height / 2


def test_what_the_time_went_into_is_told_everywhere(finished):
    report = json.loads(finished.store.get("digits/evaluation/000000006400/report.json"))
    told = report["time"]["seconds"]
    (sheet,) = read_launches(finished.store, "digits")
    assert total_time([sheet]) == told
    assert sum(told.values()) == pytest.approx(sheet.wall_s)
    assert {kind for kind, seconds in told.items() if seconds == 0} <= {
        *("restart", "lost_work", "waiting_for_room", "data_wait")
    }
    assert re.search(r"time +\S+ in all launches: .*step [\d.]+%", finished.output)
    metrics = finished.record.data.metrics
    assert metrics["time/step_s"] == told["step"]
    assert 0 < metrics["time/goodput"] < 1
    curve = report["time"]["curve"]
    assert curve
    assert all(0 <= images <= 6400 and 0 <= share < 1 for images, _, share in curve)
    assert [wall_s for _, wall_s, _ in curve] == sorted(wall_s for _, wall_s, _ in curve)


def test_a_run_is_measured_again_to_the_bit(finished, s3, tmp_path, monkeypatch):
    for name, value in finished.credentials.items():
        monkeypatch.setenv(name, value)
    store = StoreConfig(endpoint_url=s3.endpoint_url)
    config = CheckpointEvaluationConfig(
        checkpoint=f"{finished.uri}/runs/digits",
        store=store,
        home=str(tmp_path),
        output=str(tmp_path / "results"),
        device="cpu",
    )
    (again,) = evaluate_checkpoints(config, report=lambda _text: None)
    own = json.loads(finished.store.get("digits/evaluation/000000006400/report.json"))
    (distance,) = again.distances
    assert distance.features == own["features"]
    assert distance.frechet == own["frechet"]
    assert distance.diversity == own["diversity"]
    assert asdict(distance)["nearest"] == own["nearest"]
    assert asdict(distance)["real"] == own["real"]
    assert again.network_evaluations == own["network_evaluations"]
    assert again.real_images == own["real_images"]
    assert again.measurement.samples == own["samples"]
    assert again.measurement.sampler == own["settings"]["sampler"]


def test_mlflow_has_the_configuration_the_curves_and_the_pictures(finished):
    client, record = finished.client, finished.record
    assert record.info.status == "FINISHED"
    assert record.data.params["train.global_batch"] == "64"
    assert record.data.tags["checkpoint"].endswith("/runs/digits/checkpoints/000000006400")
    for name in (
        "loss/total",
        "loss/scale_0",
        "loss/scale_1",
        "optim/gradient_norm",
        "optim/learning_rate",
        "speed/images_per_s",
        "speed/data_wait_share",
        "system/memory_host_gib",
        "optim/skipped_updates",
    ):
        points = client.get_metric_history(record.info.run_id, name)
        assert [point.step for point in points] == list(range(640, 6401, 640)), name
    curve = [point.value for point in client.get_metric_history(record.info.run_id, "loss/total")]
    assert curve[-1] < 0.8 * curve[0]
    reached = [
        record.data.metrics[f"{group}/frechet_random_conv{what}"]
        for group, what in (("reference", ""), ("eval", ""), ("reference", "_untrained"))
    ]
    assert 0 < reached[0] < reached[1] < reached[2]
    assert record.data.metrics["eval/random_conv_diversity"] > 0
    paths = {
        item.path
        for folder in ("", "images")
        for item in client.list_artifacts(record.info.run_id, folder)
    }
    assert "config.yaml" in paths
    assert {"samples.png", "evaluation.png"} <= paths
    shown = {path.partition("+timestamp")[0] for path in paths if path.startswith("images/")}
    assert sorted(shown) == [
        "images/evaluation+step+6400",
        "images/samples+step+0",
        "images/samples+step+3200",
        "images/samples+step+6400",
    ]


def test_every_rank_is_profiled_into_the_store_and_mlflow(finished):
    kept = {key: finished.store.get(key) for key in finished.store.list("digits/profile/")}
    after = f"{(3 + 2) * 64:012d}"
    folder = f"digits/profile/{after}-attempt-00000"
    assert sorted(kept) == [f"{folder}/rank-{rank:05d}.json.gz" for rank in range(2)]
    for key, trace in kept.items():
        names = {event.get("name") for event in json.loads(gzip.decompress(trace))["traceEvents"]}
        assert "aten::scaled_dot_product_attention" in names, key
    shown = finished.client.list_artifacts(finished.record.info.run_id, f"profile/{after}")
    assert [each.path.rpartition("/")[2] for each in shown] == [
        key.rpartition("/")[2] for key in sorted(kept)
    ]
    assert f"profiled: 2; their traces are in {finished.uri}/runs/{folder}," in finished.output


def test_no_credential_is_written_anywhere(finished):
    secret = finished.credentials["AWS_SECRET_ACCESS_KEY"]
    assert len(secret) > 5
    run_id, home = finished.record.info.run_id, finished.home
    finished.client.download_artifacts(run_id, "config.yaml", str(home))
    files = [path for path in home.rglob("*") if path.is_file()]
    assert home / "config.yaml" in files
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert secret not in finished.output


def test_a_grid_is_drawn_from_any_checkpoint_or_the_newest_of_a_run(
    finished, s3, tmp_path, monkeypatch
):
    for name, value in finished.credentials.items():
        monkeypatch.setenv(name, value)
    grids = []
    for name in ("/checkpoints/000000001280", ""):
        output = tmp_path / f"{len(grids)}.png"
        words = [
            f"checkpoint={finished.uri}/runs/digits{name}",
            f"store.endpoint_url={s3.endpoint_url}",
            f"output={output}",
            *("classes=[3,5]", "columns=4", "sampler.steps=2"),
        ]
        assert sample(words) == 0
        grids.append(np.asarray(Image.open(output)))
    assert grids[0].shape == (2 * 52 + 4, 4 * 52 + 4)
    assert not np.array_equal(*grids)


@pytest.fixture
def home(empty_tracker, tmp_path):
    shutil.copy(empty_tracker, tmp_path)
    return tmp_path


def assert_same_state(state, undisturbed):
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


HANGS = r"warning: worker (\d): no update for \d+ s .*it stands in (.*);"


def assert_hang_is_told(told, output, store):
    """By the peer of a rank that stands still, which may be any of them, and its last words."""
    rank, place = told.groups()
    # It waits for the stopped one in a collective call, or for that of the vote.
    assert re.match(r"\w+ \((distributed_c10d|loop)\.py:\d+\)", place), place
    (key,) = store.list("digits/hangs/")
    assert key.endswith(f"/rank-{int(rank):05d}.txt")
    stacks = store.get(key).decode()
    assert "in train_worker" in stacks
    assert "watchdog" in stacks
    assert re.search(
        rf"attempt 0: worker {rank} on \S+ stood still, .*, and ended itself with exit code 75",
        output,
    )
    lost = [key for key in store.list("digits/lost/") if key.endswith(f"/rank-{int(rank):05d}.txt")]
    assert any("ERROR: no update for" in store.get(key).decode() for key in lost)


def test_a_run_goes_on_after_a_hang_ctrl_c_a_killed_worker_and_a_killed_job(
    finished, s3, home, monkeypatch
):
    """One run through all of it, so that each has to leave what the next goes on from."""
    uri = f"{s3.make_bucket('killed')}/lapflow"
    words = (*SMALL, f"store.uri={uri}", f"store.endpoint_url={s3.endpoint_url}")

    def launch(*settings, interval_images=640):  # so that there is room for all of it
        interval = f"checkpoint.interval_images={interval_images}"
        return job(*words, interval, *settings, home=home, environment=finished.credentials)

    soon = ("runtime.hang_s=4", "shards.download_patience_s=1", "shards.download_timeout_s=1")
    # Soon after a save the next one is far: a rank that waits in one for another is less watched.
    with launch(*soon, interval_images=1280) as interrupted:
        interrupted.wait_for("the hang watchdog is armed: after 8 s without an update")
        interrupted.wait_for(r"checkpoint: \S+")
        stopped = interrupted.workers()[0]
        stopped.send_signal(signal.SIGSTOP)
        told = interrupted.wait_for(HANGS)
        # It restarts by itself, from a checkpoint.
        interrupted.wait_for(r"(?s)resumed after [\d,]+ images.+checkpoint: \S+")
        assert not stopped.is_running()
        interrupted.signal_group(signal.SIGINT)
        assert interrupted.wait() == 128 + signal.SIGINT, interrupted.output
        final = interrupted.wait_for(r"stopped; .* (\S+/checkpoints/(\d+))")
        assert 640 < int(final[2]) < 6400
        assert interrupted.processes() == []
    with launch() as killed:
        killed.wait_for(r"(?s)resumed after .+checkpoint: \S+")
        assert f"resumed after {int(final[2]):,} images from {final[1]}" in killed.output
        killed.workers()[0].kill()
        # It restarts by itself, from a checkpoint.
        killed.wait_for(r"(?s)resumed after .+resumed after [\d,]+ images.+checkpoint: \S+")
        killed.kill_everything()
    with launch() as again:
        assert again.wait() == 0, again.output
        assert "resumed after" in again.output
    for name, value in finished.credentials.items():
        monkeypatch.setenv(name, value)
    config = StoreConfig(endpoint_url=s3.endpoint_url)
    assert_same_state(final_state(uri, "digits", config), finished.state)
    assert_no_point_twice(home)
    store = open_store(f"{uri}/runs", config)
    assert_hang_is_told(told, interrupted.output, store)
    launches = read_launches(store, "digits")
    assert len(launches) == 3
    assert len(launches[0].attempts) == 2
    assert total_time(launches[:1])["restart"] > 8
    assert sum(total_time(launches).values()) == pytest.approx(
        sum(each.wall_s for each in launches)
    )
    with launch() as complete:
        assert complete.wait() == 0
        assert "this run is complete" in complete.output
        assert "classifier reads the label" in complete.output
    assert not (home / "store").exists()


OTHER_NODE = "127.0.0.3"


def test_a_job_that_loses_a_node_for_good_ends_with_the_same_weights(finished, home):
    with ray_cluster(cpus=1, more_cpus=[1], dashboard=False) as cluster:
        words = (f"cluster.address={cluster.address}", "cluster.workers=1..2")
        more = ("cluster.shrink_after_s=1", "cluster.max_failures=1")
        with job(*SMALL, *words, *more, home=home, environment=cluster.environment) as shrinking:
            shrinking.wait_for(r"checkpoint: \S+/000000001280")
            cluster.lose(OTHER_NODE)
            assert shrinking.wait() == 0, shrinking.output
    told = shrinking.output
    assert "workers: as many as there is room for, of 1, 2" in told
    loss = re.search(rf"attempt 0: worker \d on {OTHER_NODE} \(the node does not answer\) .*", told)
    assert loss is not None, told
    assert re.search(r"[\d,]+ images were trained, [\d,]+ images are saved; .* at once", loss[0])
    assert re.search(r"attempt 1: 1 workers on 127\.0\.0\.2", told)
    checkpoints = CheckpointReader(open_store(f"{home}/store/runs", StoreConfig()), run="digits")
    worlds = [
        manifest.world_size
        for images in range(1280, 6401, 1280)
        if (manifest := checkpoints.manifest(images)) is not None
    ]
    assert worlds[0] == 2
    assert worlds[-1] == 1
    state = final_state(f"{home}/store", "digits")
    assert state.keys() == finished.state.keys()
    flat, wanted = (
        {name: tensor.numpy().ravel() for name, tensor in each.items()}
        for each in (state, finished.state)
    )
    # Other ranks add up in another order. Were each weight rounded independently in both runs, at
    # each of 100 updates, they would be 3.6e-7 apart (docs/checkpoints.md).
    for kind in ("master", "ema"):
        assert distance(flat, wanted, kind) < 1e-6, kind
    # One parameter may be all rounding: where gradients are nearly zero, Adam steps by their sign.
    for name, tensor in finished.state.items():
        apart = torch.linalg.vector_norm((state[name] - tensor).double())
        assert apart <= 1e-4 * torch.linalg.vector_norm(tensor.double()), name


# After the second checkpoint, and with more updates to the next one than may be skipped.
SPOILED_FROM = 2560 + 3 * 64


def spoiled(context, payload):
    """A rank whose images are none any more, for as many attempts as the payload says."""
    bands = TrainStep._bands

    def lose(self, *arguments, first_image):
        found = bands(self, *arguments, first_image=first_image)
        if first_image < SPOILED_FROM:
            return found
        return tuple(torch.full_like(band, torch.nan) for band in found)

    is_here = context.rank == 1 and context.attempt < payload["spoiled_attempts"]
    with mock.patch.object(TrainStep, "_bands", lose if is_here else bands):
        train_worker(context, payload)


def train_spoiled(home, lines, *settings, attempts):
    """Trains with a spoiled rank for so many attempts, and notes what is told."""
    job = compose_job([*SMALL, f"home={home}", "eval.classifier=false", *settings])
    preflight(job, report=lines.append)
    store = open_store(paths.runs_uri(job), job.store)
    with hold_lease(store, job.run, report=lines.append, on_lost=print) as lease:
        payload = {"job": to_dict(job), "lease": asdict(lease), "tracker_file": None}
        return run(
            job.cluster,
            spoiled,
            {**payload, "spoiled_attempts": attempts},
            on_message=lambda message: None,
            report=lines.append,
            stop=threading.Event(),
        )


def test_a_rank_that_spoils_all_updates_is_named_and_costs_nothing_but_time(finished, home):
    lines = []
    outcome = train_spoiled(home, lines, attempts=1)
    assert (outcome.status, outcome.restarts) == ("finished", 1)
    (loss,) = [line for line in lines if " attempt 0: worker " in line and "start again" in line]
    assert re.search(r"attempt 0: worker 1 on \S+ failed with RankDiverged: the gradient was", loss)
    assert "its data or its device is at fault, and not the settings" in loss
    assert "2,560 images are saved; the workers start again at once" in loss
    assert_same_state(final_state(f"{home}/store", "digits"), finished.state)


def test_a_rank_that_spoils_every_attempt_ends_the_run_with_its_last_good_state(home):
    lines = []
    with pytest.raises(WorkerFailed, match="Worker 1 failed with RankDiverged: the gradient was"):
        train_spoiled(home, lines, "cluster.max_failures_in_place=2", attempts=99)
    (end,) = [line for line in lines if "the workers are not started again" in line]
    assert "it is failure 2 in a row after the same" in end
    assert "cluster.max_failures_in_place=2" in end
    assert sum(" attempt " in line and "start again" in line for line in lines) == 1
    state = final_state(f"{home}/store", "digits")
    assert state["images"] == 2560
    assert all(tensor.isfinite().all() for tensor in state.values())
