"""URIs of runs and checkpoints are taken apart, and secrets in them go no further."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.storage.checkpoint_uri import CheckpointUri, parse_checkpoint_uri
from trainer.storage.errors import InvalidStoreUri
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

NAMES = st.from_regex(r"[a-z0-9_][a-z0-9_.=-]{0,8}", fullmatch=True)
PLACES = st.builds(
    lambda root, folders: "/".join([root, *folders]),
    st.sampled_from(["s3://bucket", "file:///data", "/data", "data", "s3://b-1.c/checkpoints"]),
    st.lists(NAMES | st.just("checkpoints"), max_size=2).map(lambda folders: [*folders, "runs"]),
)


@pytest.mark.slow
@given(
    runs=PLACES,
    run=NAMES.filter(lambda name: name != "checkpoints"),
    images=st.none() | st.integers(0, 10**12 - 1),
    digits=st.integers(1, 15),
    slashes=st.sampled_from(["", "/", "//"]),
)
def test_what_was_put_together_comes_apart(
    runs: str, run: str, images: int | None, digits: int, slashes: str
) -> None:
    address = CheckpointUri(runs, run, images)
    assert address.run_uri == f"{runs}/{run}"
    if images is None:
        assert parse_checkpoint_uri(address.run_uri + slashes) == address
        assert parse_checkpoint_uri(f"{address.run_uri}/checkpoints{slashes}") == address
    else:
        checkpoint = f"{address.run_uri}/checkpoints/{images:0{digits}d}{slashes}"
        assert parse_checkpoint_uri(checkpoint) == address


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "/",
        "night-1",
        "/night-1",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/checkpoints",
        "runs/a/checkpoints/newest",
        "runs/a/checkpoints/12x",
        "/checkpoints/12",
    ],
)
def test_what_is_neither_is_refused(uri: str) -> None:
    with pytest.raises(InvalidStoreUri, match="is neither a run"):
        parse_checkpoint_uri(uri)


@pytest.mark.parametrize(
    ("begin", "right"),
    [
        ("s3:/bucket", "s3://"),
        ("s3:bucket", "s3://"),
        ("S3://bucket", "s3://"),
        ("s3:///bucket", "s3://"),
        ("file:/data", "file:///"),
        ("file://data", "file:///"),
    ],
)
def test_a_mistyped_uri_is_no_folder(begin: str, right: str) -> None:
    for uri in (f"{begin}/runs/a", f"{begin}/runs/a/checkpoints/12"):
        for use in (parse_checkpoint_uri, lambda uri: open_store(uri, StoreConfig()), store_at):
            with pytest.raises(InvalidStoreUri, match=f"begin it with {right}"):
                use(uri)
    for scheme in ("gs", "http", "hdfs"):
        with pytest.raises(InvalidStoreUri, match=f"cannot be kept at {scheme}://"):
            parse_checkpoint_uri(f"{scheme}://bucket/runs/a")
    assert parse_checkpoint_uri("run:1/runs/a") == CheckpointUri("run:1/runs", "a", None)


def store_at(uri: str) -> StoreConfig:
    return StoreConfig(uri=uri)


@pytest.mark.parametrize("path", ["", "/", "/p", "/runs/a", "/runs/a/checkpoints/000000000100"])
@pytest.mark.parametrize(
    "authority",
    ["AKIDXX:SEKRET@bucket", "AKIDXX@bucket", "AKIDXX:SEK/RET@bucket", "AKIDXX:SEKRET"],
)
@pytest.mark.parametrize("scheme", ["s3", "S3", "gs", "https"])
def test_credentials_are_refused_and_not_quoted(scheme: str, authority: str, path: str) -> None:
    with pytest.raises(InvalidStoreUri, match="no credentials") as caught:
        parse_checkpoint_uri(f"{scheme}://{authority}{path}")
    for secret in ("AKID", "SEK", "/RET"):
        assert secret not in str(caught.value)


def test_a_key_may_have_an_at_sign() -> None:
    assert parse_checkpoint_uri("s3://bucket/runs/a@b") == CheckpointUri(
        "s3://bucket/runs", "a@b", None
    )
