"""A real S3 server for the tests: OpenStack Swift with its s3api, on free loopback ports.

Swift comes from PyPI into the same virtual environment as the tests, checks signatures, honours
`If-None-Match: *` and keeps its data on disk, so what passes here is not an artefact of a mock.
Four single-process servers start in about two seconds and hold about 240 MB together.
"""

from __future__ import annotations

import multiprocessing
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.support.ports import free_port

RINGS = ("account", "container", "object")
SERVERS = (*RINGS, "proxy")
START_TIMEOUT_S = 540.0
STOP_TIMEOUT_S = 5.0
FIRST_BUCKET = "first"

# Swift's proxy gives a storage server half a second to take a connection, and shuns it after ten
# failures, then answers 503. A busy machine does that to servers that are well.
BUSY_MACHINE_OPTIONS = (
    "conn_timeout = 60\nnode_timeout = 60\nrecoverable_node_timeout = 60\n"
    "error_suppression_limit = 1000000\n"
)
PIPELINE = (
    "catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth slo dlo copy "
    "symlink versioned_writes"
)
_FILTER_OPTIONS = {
    # Nothing answers there: Swift then works without a cache, which is what a short test wants.
    "cache": "use = egg:swift#memcache\nmemcache_servers = 127.0.0.1:1\nlog_level = CRITICAL",
    "s3api": "use = egg:swift#s3api\nlocation = us-east-1",
    "versioned_writes": "use = egg:swift#versioned_writes\nallow_object_versioning = true",
}


class S3ServerStartError(RuntimeError):
    """The Swift servers did not come up; the message ends with what they logged."""


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running S3 endpoint and the one account it knows.

    Attributes:
        endpoint_url: e.g. "http://127.0.0.1:41234".
        access_key: The account's key.
        secret_key: The account's secret.
        directory: Where the servers keep data and logs.
    """

    endpoint_url: str
    access_key: str
    secret_key: str
    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point boto3, streaming and MLflow at this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "S3_ENDPOINT_URL": self.endpoint_url,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint_url,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    @cached_property
    def client(self) -> Any:
        """A boto3 S3 client of this server, whatever the environment says."""
        import boto3
        from botocore.config import Config

        session = boto3.Session(
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )
        config = Config(s3={"addressing_style": "path"}, proxies={})
        return session.client("s3", endpoint_url=self.endpoint_url, config=config)

    def make_bucket(self, name: str) -> str:
        """Creates a bucket, or keeps the one that exists, and returns its `s3://name` URI."""
        client = self.client
        existing = {bucket["Name"] for bucket in client.list_buckets().get("Buckets", [])}
        if name not in existing:
            client.create_bucket(Bucket=name)
        return f"s3://{name}"


@contextmanager
def s3_server(directory: Path, *, secret_key: str = "testing") -> Iterator[S3Server]:
    """Runs Swift under `directory` until the block ends.

    Args:
        directory: An empty folder on a file system with extended attributes (not NFS).
        secret_key: Secret of its account.

    Raises:
        S3ServerStartError: A server ended early or the proxy did not answer in time.
    """
    ports = {name: free_port() for name in SERVERS}
    _write_configuration(directory, ports, secret_key)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in SERVERS:
            processes[name] = _start(name, directory)
        server = S3Server(
            endpoint_url=f"http://127.0.0.1:{ports['proxy']}",
            access_key="test:tester",
            secret_key=secret_key,
            directory=directory,
        )
        _wait_until_up(server, processes)
        yield server
    finally:
        _stop(list(processes.values()))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One S3 server for the whole test session; give every test a bucket of its own."""
    with s3_server(tmp_path_factory.mktemp("swift")) as server:
        yield server


def _binary(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise S3ServerStartError(
            f"{path} is missing: install the development dependencies (pip install -e '.[dev]')."
        )
    return str(path)


def _write_configuration(directory: Path, ports: dict[str, int], secret_key: str) -> None:
    etc, devices = directory / "etc", directory / "node"
    etc.mkdir(parents=True)
    (devices / "d1").mkdir(parents=True)
    (etc / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = suffix\nswift_hash_path_prefix = prefix\n"
        "[storage-policy:0]\nname = Policy-0\ndefault = yes\n"
    )
    user = pwd.getpwuid(os.getuid()).pw_name
    for name in SERVERS:
        default = (
            f"[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = {ports[name]}\nworkers = 0\n"
            f"user = {user}\nswift_dir = {etc}\nlog_level = WARNING\n"
        )
        (etc / f"{name}.conf").write_text(default + _application(name, devices, secret_key))
    # In a process of its own: Swift imports eventlet, which leaves a module of its own at
    # `http.server`, whose servers wait for ever in a process that has no hub running.
    rings = multiprocessing.get_context("fork").Process(target=_write_rings, args=(etc, ports))
    rings.start()
    rings.join()
    if rings.exitcode != 0:
        raise S3ServerStartError(f"Swift's rings were not written (exit code {rings.exitcode}).")


def _write_rings(etc: Path, ports: dict[str, int]) -> None:
    from swift.common.ring import RingBuilder

    for name in RINGS:
        ring = RingBuilder(part_power=4, replicas=1, min_part_hours=1)
        ring.add_dev(
            {
                "region": 1,
                "zone": 1,
                "ip": "127.0.0.1",
                "port": ports[name],
                "device": "d1",
                "weight": 1.0,
            }
        )
        ring.rebalance()
        ring.get_ring().save(str(etc / f"{name}.ring.gz"))


def _application(name: str, devices: Path, secret_key: str) -> str:
    if name != "proxy":
        return (
            f"devices = {devices}\nmount_check = false\ndisable_fallocate = true\n"
            f"[pipeline:main]\npipeline = {name}-server\n"
            f"[app:{name}-server]\nuse = egg:swift#{name}\n"
        )
    account = f"use = egg:swift#tempauth\nuser_test_tester = {secret_key} .admin"
    options = {**_FILTER_OPTIONS, "tempauth": account}
    filters = "".join(
        f"[filter:{each}]\n{options.get(each, f'use = egg:swift#{each}')}\n"
        for each in PIPELINE.split()
    )
    return (
        f"[pipeline:main]\npipeline = {PIPELINE} proxy-server\n"
        f"[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"
        f"{BUSY_MACHINE_OPTIONS}{filters}"
    )


def _start(name: str, directory: Path) -> subprocess.Popen[bytes]:
    # The shim asks the kernel (PR_SET_PDEATHSIG) to end the server with its parent, so that a
    # killed test session leaves nothing behind.
    shim = (
        "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, int(signal.SIGTERM)); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    server = [_binary(f"swift-{name}-server"), str(directory / "etc" / f"{name}.conf")]
    with open(directory / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", shim, *server],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _wait_until_up(server: S3Server, processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Waits for an answer that all four servers had a part in.

    The proxy alone answers before the others listen, and then fails what it is asked.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + START_TIMEOUT_S
    refused: Exception | None = None
    while time.monotonic() < deadline:
        for name, process in processes.items():
            if process.poll() is not None:
                raise S3ServerStartError(
                    f"swift-{name}-server ended with code {process.returncode}.\n"
                    + _log_tail(server.directory / f"{name}.log")
                )
        try:
            server.client.create_bucket(Bucket=FIRST_BUCKET)
            server.client.put_object(Bucket=FIRST_BUCKET, Key="up", Body=b"")
            return
        except (BotoCoreError, ClientError) as error:
            refused = error
            time.sleep(0.05)
    logs = "\n".join(_log_tail(server.directory / f"{name}.log") for name in SERVERS)
    raise S3ServerStartError(
        f"{server.endpoint_url} did not answer in {START_TIMEOUT_S:.0f} s ({refused}).\n{logs}"
    )


def _log_tail(path: Path, lines: int = 20) -> str:
    return f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
