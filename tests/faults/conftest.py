"""A remote store for each test, and boto3 without long pauses."""

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.support.remote_store import RemoteStore, remote_store
from tests.support.s3_server import S3Server


@pytest.fixture(scope="module")
def shared_remote(s3: S3Server) -> Iterator[RemoteStore]:
    """One for all tests of a file: a client of boto3 costs more than what most of them do."""
    with remote_store(s3) as remote:
        yield remote


@pytest.fixture
def remote(shared_remote: RemoteStore) -> RemoteStore:
    """Checkpoints in a bucket, of which there are none yet."""
    shared_remote.empty()
    return shared_remote


@pytest.fixture
def eager_boto(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses of boto3 between tries last no longer than 20 ms."""
    short = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.02)), time=time.time)
    monkeypatch.setattr("botocore.endpoint.time", short)
