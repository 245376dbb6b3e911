"""The S3 store against a real server: what goes wrong is explained, without credentials."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from tests.support.s3_server import S3Server
from trainer.storage import s3
from trainer.storage.errors import (
    CheckpointError,
    InvalidKey,
    InvalidStoreUri,
    StoreError,
    StoreUnreachable,
)
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig

OPERATIONS: dict[str, Callable[[Store], object]] = {
    "get": lambda store: store.get("key"),
    "put": lambda store: store.put("key", b"1"),
    "create": lambda store: store.create("key", b"1"),
    "list": lambda store: store.list(""),
    "delete": lambda store: store.delete("key"),
    "delete_all": lambda store: store.delete_all(["key", "other"]),
}


def errors_of(store: Store) -> dict[str, CheckpointError]:
    """What each operation raises."""
    errors = {}
    for name, operation in OPERATIONS.items():
        with pytest.raises(CheckpointError) as caught:
            operation(store)
        errors[name] = caught.value
    return errors


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.make_bucket(f"errors-{uuid.uuid4().hex[:12]}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong-SECRET-4711"),
        ("AWS_ACCESS_KEY_ID", "wrong-KEY-4711"),
        ("AWS_SESSION_TOKEN", "token-4711\nand-more"),
    ],
)
def test_wrong_credentials(
    bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    for error in errors_of(open_store(f"{bucket}/run", StoreConfig(retries=1))).values():
        assert isinstance(error, StoreError)
        assert f"{bucket}/run" in str(error)
        assert "AWS_ACCESS_KEY_ID" in str(error) or "token contains a line break" in str(error)
        for secret in ("4711", "testing", "test:tester", "AWS4-HMAC"):
            assert secret not in str(error)
            assert secret not in str(error.__cause__)


@pytest.mark.slow
def test_a_missing_bucket(bucket: str) -> None:
    for error in errors_of(open_store("s3://no-such-bucket/run", StoreConfig())).values():
        assert isinstance(error, StoreError)
        assert "s3://no-such-bucket/run" in str(error)
        assert "the bucket does not exist; create it" in str(error)


def test_an_endpoint_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-4711")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-4711")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        store = open_store("s3://bucket/run", StoreConfig(endpoint_url=endpoint, retries=1))
        for error in errors_of(store).values():
            assert isinstance(error, StoreUnreachable)
            assert endpoint in str(error)
            assert "s3://bucket/run" in str(error)
            assert "4711" not in str(error)


def test_an_endpoint_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config = StoreConfig(endpoint_url=endpoint, retries=1, read_timeout_s=0.2)
        with pytest.raises(StoreUnreachable, match="does not answer"):
            open_store("s3://bucket/run", config).get("key")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no credentials anywhere."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")


@pytest.mark.slow
def test_a_public_bucket_is_read_without_credentials(s3: S3Server, nobody: None) -> None:
    """Swift answers unsigned requests under its own address of the account."""
    for name, acl in (("open", "public-read"), ("closed", "private")):
        s3.make_bucket(name)
        s3.client.put_bucket_acl(Bucket=name, ACL=acl)
        s3.client.put_object(Bucket=name, Key="run/key", Body=b"content")
    settings = {"endpoint_url": f"{s3.endpoint_url}/v1/AUTH_test", "retries": 1}
    store = open_store("s3://open/run", StoreConfig(**settings, anonymous=True))
    assert store.get("key") == b"content"
    assert store.get_range("key", 3, 2) == b"te"
    assert store.fingerprint("key")
    for refused in (
        lambda: store.put("key", b"1"),
        lambda: open_store("s3://closed/run", StoreConfig(**settings, anonymous=True)).get("key"),
        lambda: open_store("s3://open/run", StoreConfig(**settings)).get("key"),
    ):
        with pytest.raises(StoreError):
            refused()


def test_a_public_bucket_is_listed_without_credentials(nobody: None) -> None:
    listing = "<Contents><Key>run/key</Key><Size>7</Size></Contents>"
    answers = {"GET": (200, f"<ListBucketResult>{listing}</ListBucketResult>")}
    with service(answers, anonymous=True) as store:
        assert store.list("") == {"key": 7}
    with service(answers) as store, pytest.raises(StoreError, match=r"store\.anonymous=true"):
        store.list("")


def test_no_credentials(nobody: None) -> None:
    store = open_store("s3://bucket/run", StoreConfig(endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(StoreError, match="no usable credentials were found"):
        store.put("key", b"1")


def test_a_profile_that_does_not_exist() -> None:
    with pytest.raises(StoreError, match="nobody-here"):
        open_store("s3://bucket/run", StoreConfig(profile="nobody-here"))


UPLOADS = """\
<ListMultipartUploadsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
<Upload><Key>run/1/dead</Key><UploadId>4711</UploadId></Upload></ListMultipartUploadsResult>"""


@contextmanager
def service(answers: dict[str, tuple[int, str]], *, anonymous: bool = False) -> Iterator[Store]:
    """Runs a web server with one answer for each method, and gives a store there."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            status, body = answers[self.command]
            self.send_response(status)
            self.send_header("Content-Length", f"{len(body)}")
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_DELETE = do_PUT = answer  # noqa: N815

        def log_message(self, *values: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            endpoint = f"http://127.0.0.1:{server.server_address[1]}"
            config = StoreConfig(endpoint_url=endpoint, retries=1, anonymous=anonymous)
            yield open_store("s3://bucket/run", config)
        finally:
            server.shutdown()


def refusal(status: int, code: str) -> tuple[int, str]:
    return status, f"<Error><Code>{code}</Code></Error>"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"GET": refusal(403, "AccessDenied")},
            "grant s3:ListBucketMultipartUploads and s3:AbortMultipartUpload",
        ),
        (
            {"GET": (200, UPLOADS), "DELETE": refusal(403, "AccessDenied")},
            "grant s3:ListBucketMultipartUploads and s3:AbortMultipartUpload",
        ),
        ({"GET": refusal(501, "NotImplemented")}, "does not list or abort unfinished uploads"),
        ({"GET": refusal(405, "MethodNotAllowed")}, "does not list or abort unfinished uploads"),
    ],
)
def test_a_sweep_that_is_refused_tells_what_it_takes_and_what_is_affected(
    key: None, answers: dict[str, tuple[int, str]], message: str
) -> None:
    with service(answers) as store, pytest.raises(StoreError) as caught:
        store.abort_unfinished("1/", lambda key: True)
    assert "Cannot remove unfinished uploads of s3://bucket/run/1/" in str(caught.value)
    assert message in str(caught.value)
    assert "nothing but unfinished uploads is affected" in str(caught.value)
    assert "If-None-Match" not in str(caught.value)
    assert "s3:GetObject" not in str(caught.value)


def test_a_service_without_conditional_writes_is_told_by_name(key: None) -> None:
    with (
        service({"PUT": refusal(501, "NotImplemented")}) as store,
        pytest.raises(StoreError, match="PUT with If-None-Match"),
    ):
        store.create("key", b"1")


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:///run", "s3://KEY-4711:secret@bucket/run", "s3://b/"]
)
def test_bad_buckets_are_refused_without_quoting_them(uri: str) -> None:
    with pytest.raises(InvalidStoreUri) as caught:
        open_store(uri, StoreConfig())
    assert "4711" not in str(caught.value)


def test_bad_prefixes_are_refused() -> None:
    with pytest.raises(InvalidKey):
        open_store("s3://bucket/../other", StoreConfig())


@pytest.mark.parametrize(
    "url",
    [
        "localhost:9000",
        "ftp://x",
        "http://",
        "http://user:4711@host",
        "http://host/a?token=4711",
        "http://127.0.0.1:9/x#access_token=4711",
        "host#4711",
    ],
)
def test_bad_endpoints_are_refused_without_quoting_credentials(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidStoreUri) as caught:
        StoreConfig(endpoint_url=url)
    assert "4711" not in str(caught.value)
    monkeypatch.setenv("S3_ENDPOINT_URL", url)
    with pytest.raises(InvalidStoreUri):
        open_store("s3://bucket/run", StoreConfig())


@pytest.mark.slow
def test_listing_goes_past_one_page(bucket: str, s3: S3Server) -> None:
    store = open_store(f"{bucket}/run", StoreConfig())
    for number in range(5):
        store.put(f"n/{number}", b"")
    original = store._client.get_paginator  # type: ignore[attr-defined]

    class SmallPages:
        def paginate(self, **request: str) -> object:
            return original("list_objects_v2").paginate(**request, PaginationConfig={"PageSize": 2})

    store._client.get_paginator = lambda name: SmallPages()  # type: ignore[attr-defined]
    assert list(store.list("n/")) == [f"n/{number}" for number in range(5)]


@pytest.mark.slow
def test_an_unfinished_upload_is_no_object(bucket: str, s3: S3Server) -> None:
    name = bucket.removeprefix("s3://")
    client = s3.client
    upload = client.create_multipart_upload(Bucket=name, Key="run/large")["UploadId"]
    client.upload_part(
        Bucket=name, Key="run/large", UploadId=upload, PartNumber=1, Body=b"x" * 5 * 1024**2
    )
    store = open_store(f"{bucket}/run", StoreConfig())
    assert store.list("") == {}
    with pytest.raises(CheckpointError, match="no object"):
        store.get("large")


@pytest.mark.slow
def test_unfinished_uploads_of_the_dead_are_aborted(bucket: str, s3: S3Server) -> None:
    name, client = bucket.removeprefix("s3://"), s3.client
    for key in ("run/1/dead", "run/2/alive", "other/1/dead"):
        upload = client.create_multipart_upload(Bucket=name, Key=key)["UploadId"]
        client.upload_part(
            Bucket=name, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 5 * 1024**2
        )
    store = open_store(f"{bucket}/run", StoreConfig())
    assert store.abort_unfinished("", lambda key: key == "1/dead") == 1
    left = client.list_multipart_uploads(Bucket=name).get("Uploads", [])
    assert sorted(upload["Key"] for upload in left) == ["other/1/dead", "run/2/alive"]


@pytest.mark.slow
@pytest.mark.parametrize("refused", [None, "NotImplemented", "MissingContentMD5"])
def test_many_objects_are_deleted_in_few_requests(
    bucket: str, monkeypatch: pytest.MonkeyPatch, refused: str | None
) -> None:
    monkeypatch.setattr(s3, "MAX_DELETES", 3)
    store = open_store(f"{bucket}/run", StoreConfig())
    for number in range(8):
        store.put(f"n/{number}", b"")
    store.put("stays", b"")
    requests: list[str] = []

    def watch(model: object, **_details: object) -> tuple[object, dict[str, object]] | None:
        requests.append(model.name)  # type: ignore[attr-defined]
        if refused is None or requests[-1] != "DeleteObjects":
            return None
        answer = {"Error": {"Code": refused}, "ResponseMetadata": {"HTTPStatusCode": 400}}
        return SimpleNamespace(status_code=400, headers={}), answer

    store._client.meta.events.register("before-call.s3", watch)  # type: ignore[attr-defined]
    store.delete_all([f"n/{number}" for number in range(8)] + ["was/never/there"])
    assert requests.count("DeleteObjects") == 3
    assert requests.count("DeleteObject") == (0 if refused is None else 9)
    assert list(store.list("")) == ["stays"]


@pytest.mark.parametrize(
    ("code", "kind"), [("AccessDenied", StoreError), ("SlowDown", StoreUnreachable)]
)
def test_an_object_that_was_not_deleted_among_many_is_told(
    code: str, kind: type[StoreError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = open_store("s3://bucket/run", StoreConfig(endpoint_url="http://127.0.0.1:9"))

    def answer(**_details: object) -> tuple[object, dict[str, object]]:
        refusal = {"Key": "run/b", "Code": code, "Message": "no"}
        return SimpleNamespace(status_code=200, headers={}), {"Errors": [refusal]}

    store._client.meta.events.register("before-call.s3", answer)  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=f"Cannot delete s3://bucket/run/.*{code}") as caught:
        store.delete_all(["a", "b"])
    assert type(caught.value) is kind
