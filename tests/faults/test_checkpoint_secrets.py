"""Credentials reach neither a file, nor a log, nor the store, whatever fails."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faulty_proxy import faulty_proxy
from tests.support.http_faults import Answer
from tests.support.job import SMALL, job
from tests.support.s3_server import S3Server, s3_server

pytestmark = pytest.mark.slow

CANARIES = {
    "secret": "canary-s3cr3t-7Qx",
    "wrong secret": "canary-wr0ng-8Rz",
    "token": "canary-t0ken-9Ty",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlfl0w-1Ab",
    "MLFLOW_TRACKING_TOKEN": "canary-mltok-2Bc",
    "WANDB_API_KEY": "canary-0ther-3Cd",
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    """A server whose secret is no word that stands anywhere else."""
    (tmp_path / "swift").mkdir()
    with s3_server(tmp_path / "swift", secret_key=CANARIES["secret"]) as server:
        yield server


@pytest.fixture
def scratch() -> Iterator[Path]:
    """For Ray, whose sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def hits(folder: Path) -> list[tuple[Path, str]]:
    """The files that hold a canary, and which."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found += [(path, name) for name in canaries_in(path.read_bytes())]
    return found


def canaries_in(data: bytes) -> list[str]:
    """The canaries in some bytes, or in the files of an archive."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            data += b"".join(map(archive.read, archive.namelist()))
    return [name for name, value in CANARIES.items() if value.encode() in data]


def test_no_secret_is_written_anywhere(
    server: S3Server,
    empty_tracker: Path,
    scratch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    home, profiles = tmp_path / "home", tmp_path / "profiles"
    home.mkdir()
    shutil.copy(empty_tracker, home)
    profiles.write_text(
        "".join(
            f"[{name}]\naws_access_key_id = {server.access_key}\n"
            f"aws_secret_access_key = {CANARIES[secret]}\n"
            f"aws_session_token = {CANARIES['token']}\n"
            for name, secret in (("right", "secret"), ("wrong", "wrong secret"))
        )
    )
    environment = {
        "AWS_SHARED_CREDENTIALS_FILE": str(profiles),
        "AWS_DEFAULT_REGION": "us-east-1",
        **{name: value for name, value in CANARIES.items() if name.isupper()},
    }
    bucket = server.make_bucket("secrets").removeprefix("s3://")
    outputs = []
    with faulty_proxy(server.endpoint_url) as proxy:
        arguments = [
            *SMALL,
            *("train.total_images=64000", "runtime.log_interval_images=640"),
            f"store.uri=s3://{bucket}",
            f"store.endpoint_url={proxy.endpoint_url}",
            *("store.retries=1", "checkpoint.patience_s=1"),
            f"cluster.scratch_dir={scratch}",
        ]
        # The key is refused from the second checkpoint on.
        refusal = Answer(status=403, code="SignatureDoesNotMatch")
        proxy.inject(refusal, when=lambda request: "checkpoints/000000002560" in request.path)
        with job(*arguments, "store.profile=right", home=home, environment=environment) as running:
            running.wait_for(r"checkpoint: \S+/000000001280")
            running.wait_for(r"000000002560 could not be saved: .*the access key or its secret is")
            running.wait_for(r"checkpoint: \S+/000000003840")
            running.kill_everything()  # so that nothing of it is tidied up
            outputs.append(running.output)
        with job(*arguments, "store.profile=wrong", home=home, environment=environment) as refused:
            assert refused.wait() == 2, refused.output
            outputs.append(refused.output)
        # The credentials may come from the environment as well.
        wrong = {
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_SECRET_ACCESS_KEY": CANARIES["wrong secret"],
            "AWS_SESSION_TOKEN": CANARIES["token"],
        }
        with job(*arguments, home=home, environment=environment | wrong) as refused:
            assert refused.wait() == 2, refused.output
            outputs.append(refused.output)
    for output in outputs[1:]:
        assert "refused with HTTP 403 SignatureDoesNotMatch" in output
    assert [canaries_in(output.encode()) for output in outputs] == [[]] * len(outputs)

    logs = list(scratch.rglob("session_*/logs/*"))
    assert len(logs) > 10
    assert (home / "mlflow.db").stat().st_size > 0
    assert [*hits(home), *hits(scratch)] == []
    listing = server.client.list_objects_v2(Bucket=bucket)
    assert listing["KeyCount"] > 5
    for item in listing["Contents"]:
        data = server.client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
        assert canaries_in(item["Key"].encode() + data) == []
    # And what is looked for would be found.
    assert {name for _, name in hits(tmp_path)} >= {"secret", "token"}
