"""Preflight asks a real S3 store and a tracking server all at once, and tells in one order."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.errors import MissingDatasetError
from pipelines.ingest.write import LabelledImage, write_dataset
from tests.support.faulty_proxy import FaultyProxy, Request, faulty_proxy
from tests.support.http_faults import Answer, Held
from tests.support.job import ROOT
from tests.support.s3_server import S3Server
from tests.unit.pipelines import pictures
from trainer.config.composition import compose_job
from trainer.config.job import JobConfig
from trainer.log_lines import show_logs
from trainer.metrics.mlflow_backend import TrackerUnreachable, import_mlflow
from trainer.storage.errors import StoreError
from trainer.training.at_once import Look
from trainer.training.preflight import preflight

pytestmark = pytest.mark.slow

PATIENCE_S = 120.0
BUCKET = "preflight"
KINDS: dict[str, Callable[[Request], bool]] = {
    "the store's probe": lambda request: "/store/runs/digits/probe-" in request.path,
    "the run's checkpoints": lambda request: "prefix=store" in request.path,
    "training images": lambda request: "/images/train/index.json" in request.path,
    "held-out images": lambda request: "/images/test/index.json" in request.path,
    "MLflow": lambda request: "/api/2.0/mlflow/" in request.path,
}
"""What a preflight asks for, and by what its requests are known."""


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """In front of a store with images, which is asked as MLflow too and does not know how."""
    with faulty_proxy(s3.endpoint_url) as proxy:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        bucket = s3.make_bucket(BUCKET)
        images = [LabelledImage(pictures.png(8, 8, seed=seed), seed % 10) for seed in range(20)]
        for split in ("train", "test"):
            if "Contents" not in s3.client.list_objects(Bucket=BUCKET, Prefix=f"images/{split}/"):
                write_dataset(images, f"{bucket}/images/{split}")
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint_url)
        yield proxy


def job_behind(proxy: FaultyProxy, home: Path, *words: str) -> JobConfig:
    return compose_job(
        [
            *("+exp=digits", f"home={home}", "data.prepare=none", "eval.classifier=false"),
            *(f"data.prefix=s3://{BUCKET}/images", f"store.uri=s3://{BUCKET}/store"),
            *(f"store.endpoint_url={proxy.endpoint_url}", f"tracking.uri={proxy.endpoint_url}"),
            *("store.retries=1", "shards.download_patience_s=0", "tracking.required=false", *words),
        ]
    )


def test_all_that_answers_late_is_asked_at_once(proxy, tmp_path):
    """The first request of each kind is answered when all of them are open."""
    import_mlflow()  # so that no time limit has to bear it
    all_open = threading.Barrier(len(KINDS))
    met = []

    def wait() -> None:
        with suppress(threading.BrokenBarrierError):
            met.append(all_open.wait(PATIENCE_S))

    for kind in KINDS.values():
        proxy.inject(Held(wait), times=1, when=kind)
    limits = (f"store.read_timeout_s={PATIENCE_S}", f"shards.download_timeout_s={PATIENCE_S}")
    lines: list[str] = []
    assert preflight(job_behind(proxy, tmp_path, *limits), report=lines.append) is None
    assert sorted(met) == [*range(len(KINDS))]
    assert lines[0].startswith(f"warning: MLflow at tracking.uri={proxy.endpoint_url} cannot be")
    assert lines[1] == f"data s3://{BUCKET}/images: 20 training and 20 held-out images"


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        (("the store's probe", "training images", "MLflow"), StoreError),
        (("training images", "MLflow"), MissingDatasetError),
        (("MLflow", "the run's checkpoints"), TrackerUnreachable),
        (("the run's checkpoints",), StoreError),
    ],
)
def test_of_several_failures_the_first_in_order_is_told_however_late(
    proxy, tmp_path, failing, told
):
    """Each fails after those behind it in the order have failed."""
    required = f"tracking.required={str('MLflow' in failing).lower()}"
    job = job_behind(proxy, tmp_path, required)
    for name in failing:
        if name != "MLflow":
            code = "NoSuchKey" if "images" in name else "AccessDenied"
            status = 404 if "images" in name else 403
            proxy.inject(Answer(status=status, code=code), when=KINDS[name])
    with pytest.raises(told):
        preflight(job, report=print)


def test_settings_of_a_store_are_typed_through_make(proxy, tmp_path):
    """The store is written to, and read from, before a data set that is not there is refused."""
    words = [
        *(f"home={tmp_path}", f"store.uri=s3://{BUCKET}/store", "tracking.required=false"),
        *(f"store.endpoint_url={proxy.endpoint_url}", f"tracking.uri={proxy.endpoint_url}"),
        *("data.prepare=none", f"data.prefix=s3://{BUCKET}/nothing"),
    ]
    # What is installed is not looked at anew.
    make = ["make", "--old-file=setup", "train", f"ARGS={' '.join(words)}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"There is no dataset at s3://{BUCKET}/nothing/train" in done.stderr
    probe = KINDS["the store's probe"]
    asked = [request.method for request in proxy.requests if probe(request)]
    assert asked == ["PUT", "DELETE"]


def test_what_looks_log_is_told_in_the_order_in_which_they_are_taken(capsys):
    second_has_logged = threading.Event()
    log = logging.getLogger("trainer.of_this_test")

    def first() -> int:
        assert second_has_logged.wait(PATIENCE_S)
        log.info("of the first")
        return 1

    def second() -> int:
        log.info("of the second")
        log.warning("amiss")
        second_has_logged.set()
        return 2

    with show_logs():
        looks = [Look("one", first), Look("two", second)]
        assert second_has_logged.wait(PATIENCE_S)
        log.info("of the caller")
        assert [look.take() for look in looks] == [1, 2]
    said = [line.partition("] ")[2] or line for line in capsys.readouterr().err.splitlines()]
    assert said[:3] == ["of the caller", "of the first", "of the second"]
    assert "amiss" in said[3]
    assert len(said) == 4
