"""The URI of a run or of one of its checkpoints, taken apart."""

from __future__ import annotations

import re
from typing import NamedTuple

from pipelines.addresses import may_carry_credentials
from trainer.storage.errors import InvalidStoreUri

_CHECKPOINT = re.compile(r"(?P<runs>.+)/(?P<run>[^/]+)/checkpoints/(?P<images>[0-9]+)")
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/*)")
_STORES = {"s3", "file"}
_FOREIGN = {"gs", "gcs", "azure", "abfs", "oci", "hf", "hdfs", "sftp", "ftp", "http", "https"}
_RUN = re.compile(r"(?P<runs>.+)/(?P<run>[^/]+)")


class CheckpointUri(NamedTuple):
    """A run, or one checkpoint of it."""

    runs: str
    """Place of all runs, which `open_store` opens."""
    run: str
    """Name of the run, its folder there."""
    images: int | None
    """Images that the checkpoint was taken after; None if the URI is that of the run."""

    @property
    def run_uri(self) -> str:
        """URI of the run."""
        return f"{self.runs}/{self.run}"


def parse_checkpoint_uri(uri: str) -> CheckpointUri:
    """Take the URI of a run or of a checkpoint apart; nothing is looked up.

    Args:
        uri: A run, `…/runs/NAME`, also with `/checkpoints` after it, or a checkpoint,
            `…/runs/NAME/checkpoints/000000128000`; in S3 or in a folder. A slash at the end is
            fine, and so is any number of digits.

    Raises:
        InvalidStoreUri: It is neither, or may carry credentials; those the message does not quote.
    """
    check_no_credentials(uri)
    check_scheme(uri)
    place = uri.rstrip("/").removesuffix("/checkpoints")
    if match := _CHECKPOINT.fullmatch(place):
        return CheckpointUri(match["runs"], match["run"], int(match["images"]))
    match = _RUN.fullmatch(place)
    # The run of "s3://bucket" is missing, and "…/checkpoints/newest" is no run of that name.
    if match is None or match["runs"].endswith((":/", "/checkpoints")):
        raise InvalidStoreUri(
            f"{uri} is neither a run (…/runs/NAME) nor a checkpoint "
            "(…/runs/NAME/checkpoints/000000128000)"
        )
    return CheckpointUri(match["runs"], match["run"], None)


def check_scheme(uri: str) -> None:
    """Refuse what looks like a URI and would be taken for a folder of that name.

    Raises:
        InvalidStoreUri: A slash is missing, or letters of its scheme are capitals.
    """
    match = _SCHEME.match(uri)
    if match is None or match["scheme"].lower() not in _STORES | _FOREIGN:
        return
    scheme = match["scheme"].lower()
    slashes = "///" if scheme == "file" else "//"
    if match["scheme"] != scheme or match["slashes"] != slashes:
        raise InvalidStoreUri(
            f"a place that begins with {match[0]} is not written as a URI is: begin it with "
            f"{scheme}:{slashes}, or with ./ if it is a folder of that name"
        )
    if scheme in _FOREIGN:
        raise InvalidStoreUri(
            f"Checkpoints cannot be kept at {scheme}://…: give 's3://bucket/prefix' or the path "
            "of a local folder."
        )


def check_no_credentials(uri: str) -> None:
    """Refuse a URI that may carry credentials, which would reach logs.

    Raises:
        InvalidStoreUri: It may; nothing of it is quoted.
    """
    # No address of a checkpoint has a port.
    if may_carry_credentials(uri) or ":" in uri.partition("://")[2].partition("/")[0]:
        raise InvalidStoreUri(
            "After s3:// comes the name of a bucket and no credentials, as in 's3://bucket/runs/"
            "NAME', nor a '?' that may begin some: give those by AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, the AWS profile in store.profile, or the machine's role."
        )
