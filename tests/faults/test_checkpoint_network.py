"""What networks do to saves and to restores over HTTP: silence, breaks, and slowness."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tests.support.faulty_proxy import Request
from tests.support.http_faults import Answer, Cut, Drip, Silence
from tests.support.remote_store import RemoteStore, load_state, save_state
from tests.support.save_loop import Training, restored, resumed
from tests.unit.trainer.checkpoint.worlds import RUN, random_state, same_bits
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.storage.errors import StoreUnreachable

pytestmark = pytest.mark.slow

LARGE = {"large.weight": (1025, 1024), "gain": (5,)}  # travels in two parts


def is_content(request: Request) -> bool:
    return request.method == "GET" and request.path.endswith(".safetensors")


def is_part(request: Request) -> bool:
    return request.method == "PUT" and "partNumber=" in request.path


def connections_break(remote: RemoteStore) -> None:
    """At the first part, so that others are on their way."""
    broken = threading.Event()

    def wait_for_part() -> None:
        if broken.wait():
            remote.proxy.down_for(0.5)

    threading.Thread(target=wait_for_part, daemon=True).start()
    remote.proxy.inject(Silence(), times=1, when=lambda request: is_part(request) and tell(broken))


def tell(event: threading.Event) -> bool:
    event.set()
    return True


def nothing_is_heard(remote: RemoteStore) -> None:
    remote.proxy.inject(Silence(), times=2, when=is_part)


def answers_are_errors(remote: RemoteStore) -> None:
    remote.proxy.inject(Answer(status=500, code="InternalError"), times=2, when=is_part)


@pytest.mark.parametrize("strike", [connections_break, nothing_is_heard, answers_are_errors])
def test_an_upload_in_parts_that_breaks_off_is_made_anew(
    remote: RemoteStore, strike: Callable[[RemoteStore], None]
) -> None:
    strike(remote)
    training = Training(remote.open(read_timeout_s=1), patience_s=60, keep_last=1)
    training.save(10, shapes=LARGE)
    report = training.until_reported(1)
    assert report.error is None
    assert report.upload_s > 1  # it was tried again
    assert resumed(remote.store, LARGE) == 10
    training.save(20, shapes=LARGE)
    assert training.until_reported(2).error is None
    assert len(remote.store.list("")) == 2
    assert remote.unfinished() == []


def test_a_black_hole_is_left_after_the_time_limit(remote: RemoteStore) -> None:
    save_state(remote.store, random_state(10), images=10)
    manifest = CheckpointReader(remote.store, run=RUN).newest_valid()
    store = remote.open(read_timeout_s=0.3)
    remote.proxy.inject(Silence())
    training = Training(store, patience_s=1.5)
    training.save(20)
    report = training.until_reported(1)
    assert "the service does not answer (ReadTimeoutError)" in str(report.error)
    for read in (lambda: load_state(store), lambda: restored(store, manifest)):
        before = len(remote.proxy.requests)
        with pytest.raises(StoreUnreachable, match="does not answer"):
            read()
        assert len(remote.proxy.requests) - before <= 2  # a request, and one more by boto3
    remote.proxy.heal()
    assert resumed(remote.store) == 10


@pytest.fixture
def large(remote: RemoteStore) -> Manifest:
    """A checkpoint of an object of three blocks."""
    save_state(remote.store, random_state(10, LARGE), images=10, shapes=LARGE)
    manifest = CheckpointReader(remote.store, run=RUN).newest_valid()
    assert manifest
    assert len(manifest.objects[0].block_sha256) == 3
    return manifest


@pytest.mark.usefixtures("eager_boto")
def test_answers_that_break_off_are_read_again(remote: RemoteStore, large: Manifest) -> None:
    before = len(remote.proxy.requests)
    remote.proxy.inject(Cut(after_bytes=1000), times=2, when=is_content)
    state = restored(remote.open(retries=3), large, LARGE)
    assert same_bits(state, random_state(10, LARGE))
    assert sum(map(is_content, remote.proxy.requests[before:])) == 3 + 2
    # If all of them do, it is the way and not the checkpoint that is bad.
    remote.proxy.inject(Cut(after_bytes=1000), when=is_content)
    with pytest.raises(StoreUnreachable, match=r"rank-00000\.safetensors.*does not answer"):
        restored(remote.open(retries=2), large, LARGE)


def test_answers_that_come_slowly_are_waited_for(remote: RemoteStore) -> None:
    """Slower than the time limit for silence: what counts is that something comes."""
    save_state(remote.store, random_state(10), images=10)
    remote.proxy.inject(Drip(bytes_per_s=500), when=is_content)
    began_s = time.monotonic()
    assert resumed(remote.open(read_timeout_s=2)) == 10
    assert time.monotonic() - began_s > 2
