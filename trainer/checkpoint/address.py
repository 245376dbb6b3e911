"""The URI of a run or of one of its checkpoints, taken apart."""

from __future__ import annotations

import re
from typing import NamedTuple

from trainer.checkpoint.errors import InvalidStoreUri

_CHECKPOINT = re.compile(r"(?P<runs>.+)/(?P<run>[^/]+)/checkpoints/(?P<images>[0-9]+)")
_RUN = re.compile(r"(?P<runs>.+)/(?P<run>[^/]+)")


class Address(NamedTuple):
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


def parse_address(uri: str) -> Address:
    """Take the URI of a run or of a checkpoint apart; nothing is looked up.

    Args:
        uri: A run, `…/runs/NAME`, also with `/checkpoints` after it, or a checkpoint,
            `…/runs/NAME/checkpoints/000000128000`; in S3 or in a folder. A slash at the end is
            fine, and so is any number of digits.

    Raises:
        InvalidStoreUri: It is neither, or may carry credentials; those the message does not quote.
    """
    check_no_credentials(uri)
    place = uri.rstrip("/").removesuffix("/checkpoints")
    if match := _CHECKPOINT.fullmatch(place):
        return Address(match["runs"], match["run"], int(match["images"]))
    match = _RUN.fullmatch(place)
    # The run of "s3://bucket" is missing, and "…/checkpoints/newest" is no run of that name.
    if match is None or match["runs"].endswith((":/", "/checkpoints")):
        raise InvalidStoreUri(
            f"{uri} is neither a run (…/runs/NAME) nor a checkpoint "
            "(…/runs/NAME/checkpoints/000000128000)"
        )
    return Address(match["runs"], match["run"], None)


def check_no_credentials(uri: str) -> None:
    """Refuse a URI that may carry a user or a password, which would reach logs.

    Raises:
        InvalidStoreUri: There is an "@" or a ":" before its path, of which nothing is quoted.
    """
    _, _, rest = uri.partition("://")
    # A secret may hold a slash, so that its "@" comes after one; the ":" does not.
    if {"@", ":"} & {*rest.partition("/")[0]}:
        raise InvalidStoreUri(
            "After s3:// comes the name of a bucket and no credentials, as in 's3://bucket/runs/"
            "NAME': give those by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the AWS profile in "
            "store.profile, or the machine's role."
        )
