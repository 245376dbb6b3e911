"""The proxy that the fault tests stand on: transparent when told nothing, faulty when told."""

import hashlib
import http.server
import io
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any
from urllib.request import urlopen

import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError

from tests.support.faulty_proxy import FaultyProxy, Request, faulty_proxy
from tests.support.http_faults import Answer, Cut, Drip, Flip, Silence
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.slow

MIB = 1 << 20
BUCKET = "proxied"
CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    s3.make_bucket(BUCKET)
    with faulty_proxy(s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def client(s3: S3Server, proxy: FaultyProxy) -> Any:
    """A client of the store behind the proxy that never tries again."""
    return client_of(replace(s3, endpoint_url=proxy.endpoint_url))


def client_of(server: S3Server, **config: Any) -> Any:
    import boto3

    session = boto3.Session(server.access_key, server.secret_key, region_name="us-east-1")
    path_style = Config(
        s3={"addressing_style": "path"}, proxies={}, retries={"total_max_attempts": 1}, **config
    )
    return session.client("s3", endpoint_url=server.endpoint_url, config=path_style)


def is_get(request: Request) -> bool:
    return request.method == "GET"


def body(client: Any, key: str, **more: Any) -> bytes:
    content: bytes = client.get_object(Bucket=BUCKET, Key=key, **more)["Body"].read()
    return content


def test_every_kind_of_request_passes_unchanged(client: Any, s3: S3Server) -> None:
    for number, content in enumerate((b"", b"x", CONTENT)):
        client.put_object(Bucket=BUCKET, Key=f"few/{number}", Body=content, Metadata={"a": "b"})
        assert body(client, f"few/{number}") == body(s3.client, f"few/{number}") == content
    head = client.head_object(Bucket=BUCKET, Key="few/2")
    assert (head["ContentLength"], head["Metadata"]) == (len(CONTENT), {"a": "b"})
    assert body(client, "few/2", Range="bytes=1000-70000") == CONTENT[1000:70001]
    assert body(client, "few/2", Range="bytes=-5") == CONTENT[-5:]
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix="few/")["Contents"]
    assert [entry["Key"] for entry in listed] == ["few/0", "few/1", "few/2"]
    client.copy_object(Bucket=BUCKET, Key="copy", CopySource=f"{BUCKET}/few/2")
    assert body(client, "copy") == CONTENT
    client.delete_object(Bucket=BUCKET, Key="few/0")
    doomed = {"Objects": [{"Key": "few/1"}, {"Key": "few/2"}]}
    client.delete_objects(Bucket=BUCKET, Delete=doomed)
    assert client.list_objects_v2(Bucket=BUCKET, Prefix="few/")["KeyCount"] == 0
    with pytest.raises(ClientError, match="NoSuchKey"):
        body(client, "few/0")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=BUCKET, Key="copy", Body=CONTENT, IfNoneMatch="*")


def test_signatures_count_behind_it(s3: S3Server, proxy: FaultyProxy) -> None:
    wrong = replace(s3, endpoint_url=proxy.endpoint_url, secret_key="wrong")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client_of(wrong).put_object(Bucket=BUCKET, Key="key", Body=CONTENT)


def test_a_connection_serves_many_requests(client: Any, proxy: FaultyProxy) -> None:
    client.put_object(Bucket=BUCKET, Key="key", Body=CONTENT)
    connections = []
    serve = proxy._serve
    proxy._serve = lambda socket: (connections.append(socket), serve(socket))  # type: ignore
    for _ in range(20):
        assert body(client, "key") == CONTENT
        client.put_object(Bucket=BUCKET, Key="key", Body=CONTENT)
    assert not connections


def test_chunked_requests_pass(s3: S3Server, proxy: FaultyProxy) -> None:
    """As clients send a body whose length they do not know."""
    url = s3.client.generate_presigned_url(
        "put_object", Params={"Bucket": BUCKET, "Key": "chunked"}
    )
    own = s3.endpoint_url.removeprefix("http://")
    connection = HTTPConnection(proxy.endpoint_url.removeprefix("http://"))
    pieces = [b"a" * 70_000, b"b", b"c" * 200_000]
    for _ in range(2):  # the connection stays usable
        connection.putrequest("PUT", url.split(own)[1], skip_host=True)
        connection.putheader("Host", own)  # the signature was made for it
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders(iter(pieces), encode_chunked=True)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"")
    assert body(s3.client, "chunked") == b"".join(pieces)


def test_parts_of_32_mib_go_up_and_down_in_little_memory(client: Any) -> None:
    from boto3.s3.transfer import TransferConfig

    content = os.urandom(MIB) * 96
    config = TransferConfig(multipart_threshold=32 * MIB, multipart_chunksize=32 * MIB)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    client.upload_fileobj(io.BytesIO(content), BUCKET, "large", Config=config)
    digest = hashlib.sha256()
    for piece in client.get_object(Bucket=BUCKET, Key="large")["Body"].iter_chunks(MIB):
        digest.update(piece)
    after_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert digest.digest() == hashlib.sha256(content).digest()
    assert client.head_object(Bucket=BUCKET, Key="large")["ETag"].endswith('-3"')
    # boto3 itself holds the three parts.
    assert after_kib - before_kib < 160 * 1024
    upload = client.create_multipart_upload(Bucket=BUCKET, Key="left")["UploadId"]
    part = client.upload_part(Bucket=BUCKET, Key="left", UploadId=upload, PartNumber=1, Body=b"x")
    assert part["ETag"]
    client.abort_multipart_upload(Bucket=BUCKET, Key="left", UploadId=upload)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=BUCKET)


def test_errors_are_answered_as_often_as_asked(client: Any, proxy: FaultyProxy) -> None:
    client.put_object(Bucket=BUCKET, Key="key", Body=CONTENT)
    proxy.inject(Answer(status=403, code="AccessDenied"), times=2, when=is_get)
    for _ in range(2):
        with pytest.raises(ClientError, match="AccessDenied"):
            body(client, "key")
    assert body(client, "key") == CONTENT
    proxy.inject(Answer(status=503, code="SlowDown"))
    for _ in range(2):
        with pytest.raises(ClientError, match="SlowDown"):
            client.put_object(Bucket=BUCKET, Key="key", Body=bytes(8 * MIB))
        with pytest.raises(ClientError, match="503"):
            client.head_object(Bucket=BUCKET, Key="key")
    proxy.heal()
    assert body(client, "key") == CONTENT  # nothing of the refused uploads arrived
    assert proxy.count("GET") == {f"/{BUCKET}/key": 4}
    assert proxy.count("HEAD") == {f"/{BUCKET}/key": 2}


def test_a_share_is_the_same_for_the_same_seed(s3: S3Server) -> None:
    def struck(seed: int) -> list[bool]:
        with faulty_proxy(s3.endpoint_url, seed=seed) as proxy:
            proxy.inject(Answer(), share=0.5)
            asked = [Request("GET", f"/{number % 50}", {}) for number in range(200)]
            return [proxy._fault_for(request) is not None for request in asked]

    assert 70 < sum(struck(0)) < 130
    assert struck(0) == struck(0) != struck(1)


@pytest.mark.parametrize("after_bytes", [0, 1, 100_000])
def test_a_cut_body(client: Any, proxy: FaultyProxy, after_bytes: int) -> None:
    client.put_object(Bucket=BUCKET, Key="key", Body=CONTENT)
    proxy.inject(Cut(after_bytes=after_bytes), when=is_get, times=1)
    url = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": "key"})
    with pytest.raises(Exception, match="IncompleteRead") as raised, urlopen(url) as answer:
        answer.read()
    # Whose IncompleteRead it is depends on whether Swift has been imported.
    assert raised.value.partial == CONTENT[:after_bytes]  # type: ignore[attr-defined]
    assert body(client, "key") == CONTENT


def test_a_flipped_bit(client: Any, proxy: FaultyProxy) -> None:
    client.put_object(Bucket=BUCKET, Key="key", Body=CONTENT)
    proxy.inject(Flip(at_byte=70_001), when=is_get, times=1)
    got = body(client, "key")
    assert [i for i in range(len(CONTENT)) if got[i] != CONTENT[i]] == [70_001]
    assert body(client, "key") == CONTENT


def test_a_drip(client: Any, proxy: FaultyProxy) -> None:
    client.put_object(Bucket=BUCKET, Key="key", Body=CONTENT[:10_000])
    proxy.inject(Drip(bytes_per_s=20_000), when=is_get)
    started_s = time.monotonic()
    assert body(client, "key") == CONTENT[:10_000]
    assert time.monotonic() - started_s > 0.4


def test_a_black_hole(s3: S3Server, proxy: FaultyProxy) -> None:
    impatient = client_of(replace(s3, endpoint_url=proxy.endpoint_url), read_timeout=0.3)
    proxy.inject(Silence(), times=2)
    for call in (impatient.list_buckets, lambda: impatient.put_object(Bucket=BUCKET, Key="k")):
        with pytest.raises(Exception, match=r"[tT]imeout"):
            call()
    client_of(replace(s3, endpoint_url=proxy.endpoint_url)).list_buckets()


def test_down_refuses_breaks_what_is_open_and_keeps_the_port(
    client: Any, proxy: FaultyProxy
) -> None:
    client.put_object(Bucket=BUCKET, Key="key", Body=CONTENT)
    proxy.inject(Drip(bytes_per_s=20_000), when=is_get, times=1)
    half = client.get_object(Bucket=BUCKET, Key="key")["Body"]
    assert half.read(100) == CONTENT[:100]
    with proxy.down():
        with pytest.raises(Exception, match=r"IncompleteRead|Connection broken|reset"):
            half.read()
        for _ in range(3):
            with pytest.raises((EndpointConnectionError, ConnectionClosedError)):
                client.list_buckets()
        address = proxy.endpoint_url.removeprefix("http://").split(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address[0], int(address[1])))
    assert body(client, "key") == CONTENT
    away = proxy.down_for(0.3)
    with pytest.raises((EndpointConnectionError, ConnectionClosedError)):
        client.list_buckets()
    away.join()
    assert body(client, "key") == CONTENT


def test_many_clients_at_once(s3: S3Server, proxy: FaultyProxy) -> None:
    errors: list[Exception] = []

    def work(number: int) -> None:
        own = client_of(replace(s3, endpoint_url=proxy.endpoint_url))
        content = os.urandom(300_000 + number)
        try:
            for _ in range(3):
                own.put_object(Bucket=BUCKET, Key=f"many/{number}", Body=content)
                assert body(own, f"many/{number}") == content
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.usefixtures("s3")
def test_swift_stays_out_of_this_process() -> None:
    assert "eventlet" not in sys.modules
    assert http.server is sys.modules["http.server"]
