"""What a failing store, its credentials and the network do to saves and to restores over HTTP.

Whatever happens, training goes on, what is committed is whole, and who has to act is told how.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.support.http_faults import Answer
from tests.support.remote_store import RemoteStore, load_state, remote_store, save_state
from tests.support.s3_server import S3Server
from tests.support.save_loop import Training, restored, resumed
from tests.unit.trainer.checkpoint.worlds import (
    RUN,
    random_state,
)
from trainer.checkpoint import layout
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.upload import SaveReport
from trainer.storage.errors import StoreError
from trainer.storage.retry import FIRST_PAUSE_S

pytestmark = pytest.mark.slow

LARGE = {"large.weight": (1025, 1024), "gain": (5,)}  # travels in two parts


@dataclass(frozen=True)
class Outage:
    """What a run met whose store was away for a minute."""

    report: SaveReport
    steps: int
    images: int
    lines: list[str]


@pytest.fixture(scope="module", autouse=True)
def outage(s3: S3Server) -> Iterator[Future[Outage]]:
    """Begin a run in a thread: the other tests take place while its store is away."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if remote.bucket in (line := record.getMessage()):
                lines.append(line)

    def run() -> Outage:
        training = Training(remote.open(), patience_s=900)
        training.save(10)
        training.until_reported(1)
        away = remote.proxy.down_for(60)
        training.save(20)
        report = training.until_reported(2)
        assert not away.is_alive()
        return Outage(report, training.steps, resumed(remote.store), list(lines))

    logger, handler = logging.getLogger("trainer.storage.retry"), Lines()
    with remote_store(s3) as remote, ThreadPoolExecutor(1) as pool:
        logger.addHandler(handler)
        yield pool.submit(run)
        logger.removeHandler(handler)


@pytest.mark.usefixtures("eager_boto")
@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown")])
def test_errors_for_half_of_the_requests(remote: RemoteStore, status: int, code: str) -> None:
    remote.proxy.inject(Answer(status=status, code=code), share=0.5)
    for images in (10, 20, 30):
        # boto3 bounds the tries that a client makes in vain, whatever one request may have.
        store = remote.open(retries=20)
        assert save_state(store, random_state(images), images=images, keep_last=1) == [
            store.uri(layout.checkpoint_key(RUN, images))
        ]
        assert resumed(store) == images
    assert len(remote.store.list("")) == 2  # the retired ones are gone


@pytest.mark.parametrize("when_busy", ["wait", "skip"])
def test_a_store_away_for_a_while_makes_a_save_late(
    remote: RemoteStore, when_busy: str, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(remote.open(), patience_s=600, when_busy=when_busy)
    assert training.save(10)
    training.until_reported(1)
    with ExitStack() as outage:
        outage.enter_context(remote.proxy.down())
        assert training.save(20)
        training.until(lambda: "Trying again in 2 s" in caplog.text)  # and training goes on
        assert len(training.reports) == 1
        if when_busy == "wait":
            threading.Timer(0.5, outage.close).start()
        begun = training.save(30)
        assert begun == (when_busy == "wait")
        assert len(training.reports) == (2 if begun else 1)
    report = training.until_reported(3 if begun else 2)
    assert [each.error for each in training.reports] == [None] * len(training.reports)
    assert training.reports[1].images == 20
    assert training.reports[1].upload_s >= FIRST_PAUSE_S
    assert training.reports[1].blocked_s < training.reports[1].upload_s
    assert report.images == resumed(remote.store) == (30 if begun else 20)
    skipped = [line for line in caplog.messages if "000000000030 is skipped" in line]
    assert len(skipped) == (not begun)


def test_a_store_gone_for_good_costs_checkpoints_and_not_the_run(remote: RemoteStore) -> None:
    training = Training(remote.open(), patience_s=2)
    training.save(10)
    training.until_reported(1)
    with remote.proxy.down():
        for number, images in enumerate((20, 30), start=2):
            before = training.steps
            assert training.save(images)
            report = training.until_reported(number)
            assert training.steps > before
            assert report.images == images
            assert report.size_bytes == 0
            assert report.upload_s >= 2
            # What, where, why, and what to do.
            for part in (
                f"Cannot write {remote.uri}/{RUN}/checkpoints/{images:012d}/",
                remote.proxy.endpoint_url,
                "the service does not answer",
                "check that it runs",
            ):
                assert part in str(report.error)
    assert resumed(remote.store) == 10
    training.save(40)
    assert training.until_reported(4).error is None
    assert resumed(remote.store) == 40
    positions = {layout.images_of(RUN, key) for key in remote.store.list("")}
    assert positions == {10, 40}


@dataclass(frozen=True)
class Refusal:
    """An error that the store answers, and words that tell what to do."""

    status: int
    code: str
    advice: str


REFUSALS = [
    Refusal(403, "AccessDenied", "grant s3:GetObject, s3:PutObject"),
    Refusal(400, "ExpiredToken", "the credentials have expired; give a valid key"),
    Refusal(403, "SignatureDoesNotMatch", "the access key or its secret is wrong; give a valid"),
    Refusal(403, "InvalidAccessKeyId", "the access key is unknown there; give a valid key"),
    Refusal(403, "QuotaExceeded", "the quota is used up; raise it or delete something"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=[refusal.code for refusal in REFUSALS])
def test_a_key_that_loses_its_rights_in_mid_run(remote: RemoteStore, refusal: Refusal) -> None:
    store = remote.open()
    training = Training(store, patience_s=0)
    training.save(10)
    training.until_reported(1)
    manifest = CheckpointReader(store, run=RUN).newest_valid()
    assert manifest
    remote.proxy.inject(Answer(status=refusal.status, code=refusal.code))
    training.save(20)
    report = training.until_reported(2)
    said = f"refused with HTTP {refusal.status} {refusal.code}: "
    assert f"Cannot write {remote.uri}/{RUN}/" in str(report.error)
    assert said in str(report.error)
    assert refusal.advice in str(report.error)
    # No checkpoint can be read either, which is not the same as that there is none.
    for read in (lambda: load_state(store), lambda: restored(store, manifest)):
        with pytest.raises(StoreError) as caught:
            read()
        assert said in str(caught.value)
    remote.proxy.heal()
    training.save(30)
    assert training.until_reported(3).error is None
    assert resumed(store) == 30


def test_a_store_away_for_a_minute_makes_a_save_late(outage: Future[Outage]) -> None:
    """The last test here, so that the minute has passed meanwhile."""
    seen = outage.result()
    assert seen.report.error is None
    assert seen.images == 20
    assert seen.report.blocked_s < 50 < seen.report.upload_s
    assert seen.steps > 1_000
    assert len(seen.lines) >= 5
    for line in seen.lines:
        assert "the service does not answer" in line
        assert "Trying again in" in line
