"""Where a dataset's files come from: a local folder, or a prefix of an object store.

A URL is handed to libraries that take it apart each in its own way, and what they take for a query
or a fragment they drop. So what they might read differently is refused here.

The transfer itself is streaming's, for any store it knows by URL. Retries are ours, because a
training run wants a log line for each and an error that names the cause at the end.
"""

import errno
import logging
import os
import re
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit

from packaging.specifiers import SpecifierSet
from pydantic import Field
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_result,
    stop_after_delay,
    wait_exponential,
    wait_random,
)

from pipelines.addresses import (
    find_endpoint_fault,
    may_carry_credentials,
    quote_address,
)
from pipelines.cache import scratch_folder, warn_when_slow
from pipelines.documents import MAX_DOCUMENT_BYTES, DocumentError, read_bounded
from pipelines.domains import Checked
from pipelines.errors import (
    CacheUnusableError,
    DataError,
    MissingDatasetError,
    OversizedDocumentError,
    StoreUnreachableError,
    UnreadableDocumentError,
)
from pipelines.index import INDEX_NAME
from pipelines.proxies import proxy_hint

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(/*)")
_SCHEMES = {"s3", "gs", "gcs", "oci", "azure", "hf", "sftp", "file", "http", "https"}
_DROPPED = re.compile(r"[#?\x00-\x1f\x7f]")


class LocationError(DataError):
    """A place that is neither a folder nor a URL that every library reads alike."""


def is_url(text: str) -> bool:
    """Tell whether a place is a URL, or a folder of this node.

    Raises:
        LocationError: It is a mistyped URL, one that libraries read differently, or one that
            carries credentials; those the message does not quote.
    """
    match = _SCHEME.match(text)
    scheme, slashes = match.groups() if match else ("", "")
    shown = f"The place {quote_address(text)}"
    if not slashes and scheme.lower() not in _SCHEMES:
        if may_carry_credentials(text):
            raise LocationError(
                f"{shown} looks like a URL with credentials in it. Begin it with ./ if it is a "
                "folder of that name."
            )
        return False
    assert match is not None
    rest = text[match.end() :]
    if slashes != ("///" if scheme == "file" else "//") or text[: match.end(1)] != scheme.lower():
        right = f"{scheme.lower()}:{'///' if scheme.lower() == 'file' else '//'}"
        raise LocationError(
            f"{shown} is not written as a URL is. Begin it with {right}, or with ./ if it is a "
            "folder of that name."
        )
    parts = rest.rstrip("/").split("/")
    if _DROPPED.search(rest) or rest != rest.strip() or {"", ".", ".."} & {*parts}:
        raise LocationError(
            f"{shown} cannot be used, because libraries read it differently. Leave out #, ?, "
            "control characters, spaces at the ends, empty parts, . and .."
        )
    if scheme != "file" and ("@" in parts[0] or (scheme == "s3" and ":" in parts[0])):
        raise LocationError(
            "A dataset's URL must not carry a user name or password. Use the AWS credential "
            "chain (environment, profile or instance role)."
        )
    return True


def check_endpoint() -> None:
    """Refuse what S3_ENDPOINT_URL names, unless it is a plain web address.

    Raises:
        LocationError: It is none, or may carry credentials, which streaming would log.
    """
    url = os.environ.get("S3_ENDPOINT_URL")
    if url and (fault := find_endpoint_fault(url)):
        raise LocationError(f"{fault} It is what S3_ENDPOINT_URL names.")


logger = logging.getLogger(__name__)

TESTED_STREAMING = ">=0.13.0,<0.14"
_MAX_WAIT_S = 16.0
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_MISSING_CODES = {"404", "NoSuchKey", "NoSuchBucket"}
_REFUSED_STATUS = {401, 403}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Checked):
    """How patient a source is.

    Attributes:
        download_patience_s: How long each file is asked for again and again, with pauses of 1, 2,
            4, 8, 16, 16, … seconds, before the store counts as unreachable. A try that has begun
            is not broken off.
        download_timeout_s: Silence of the store after which a request ends. A try at an S3 store
            consists of up to three requests.
        anonymous: Ask an S3 store without credentials, as public buckets want it.
    """

    download_patience_s: Annotated[float, Field(ge=0)] = 120.0
    download_timeout_s: Annotated[float, Field(gt=0)] = 20.0
    anonymous: bool = False


class Source:
    """The files under one prefix.

    An S3 endpoint other than AWS is taken from the environment variable S3_ENDPOINT_URL, and
    credentials from the usual AWS chain.

    Args:
        prefix: A path of this node, or a URL such as s3://bucket/folder. file:///path is a folder
            on a shared file system: written like a folder, and read like a store.
        config: Attempts and time limits.

    Raises:
        DataError: There is no reader for that kind of URL, it carries credentials, or libraries
            would read it differently.
    """

    def __init__(self, prefix: str, *, config: SourceConfig | None = None) -> None:
        self.is_local = not is_url(prefix)
        if self.is_local:
            prefix = os.path.expanduser(prefix)  # not every shell reads a ~ behind a =
        self.prefix = prefix.rstrip("/") or prefix
        self._config = config or SourceConfig()
        if self.prefix.startswith("s3://"):
            check_endpoint()
        self._root = self.prefix.removeprefix("file://")
        is_folder = self.is_local or self.prefix.startswith("file://")
        self.folder = Path(self._root) if is_folder else None
        # One for each thread: a downloader drops its connection when a transfer fails.
        self._downloaders = threading.local()
        if not self.is_local:
            self._downloaders.own = self._connect()

    def fetch(self, name: str, path: Path, *, max_bytes: int | None = None) -> None:
        """Copy one file to a local path, with retries.

        Args:
            name: The file's checked name under the prefix.
            path: Where to put it; nothing may lie there.
            max_bytes: How long it may be, if there is a limit.

        Raises:
            DocumentError: It is longer, of which nothing was copied.
            FileNotFoundError: The store answers that there is no such file.
            StoreUnreachableError: It refuses, or does not answer.
            CacheUnusableError: The local path cannot be written.
        """
        self._downloaders.own = getattr(self._downloaders, "own", None) or self._connect()
        url = f"{self._root}/{name}"
        transfers = Retrying(
            retry=retry_if_result(lambda failure: failure is not None),
            stop=stop_after_delay(self._config.download_patience_s),
            wait=wait_exponential(max=_MAX_WAIT_S) + wait_random(0, 0.5),
            sleep=time.sleep,
            before_sleep=self._tell_and_clean_up,
            retry_error_callback=_give_up,
        )
        transfers(self._transfer, url, path, max_bytes=max_bytes)

    def _transfer(self, url: str, path: Path, *, max_bytes: int | None) -> Exception | None:
        """Copy a file; return a failure that another attempt may mend, and raise others."""
        downloader = self._downloaders.own
        try:
            if not urlsplit(url).scheme and Path(url).exists() and not Path(url).is_file():
                raise FileNotFoundError(url)  # but something else, which may have no end
            with warn_when_slow(f"fetching {url}"):
                if max_bytes is not None:
                    self._check_size(downloader, url, max_bytes)
                downloader.download(url, str(path), self._config.download_timeout_s)
        except DocumentError:
            raise
        except Exception as error:
            path.unlink(missing_ok=True)
            self._raise_if_final(error, url=url, path=path)
            return error
        return None

    def _tell_and_clean_up(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        logger.warning(
            "fetching %s failed (attempt %d, after %.0f of %.0f s), trying again in %.0f s: %s",
            *(state.args[0], state.attempt_number, state.seconds_since_start),
            *(self._config.download_patience_s, state.upcoming_sleep),
            describe_failure(state.outcome.result()),
        )
        self._downloaders.own.clean_up()

    def read(self, name: str) -> bytes:
        """Fetch the content of one small file.

        Raises:
            FileNotFoundError: There is none.
            OversizedDocumentError: It is far larger than what it should be.
            UnreadableDocumentError: It may not be read, or is no file.
            StoreUnreachableError: The store refuses, or does not answer.
        """
        try:
            if self.is_local:
                return read_bounded(Path(self.prefix) / name)
            with scratch_folder() as folder:
                path = folder / name
                self.fetch(name, path, max_bytes=MAX_DOCUMENT_BYTES)
                return read_bounded(path)
        except DocumentError as error:
            raise OversizedDocumentError(
                f"{self.prefix}/{name} is not read: {error}. Restore the file, or write the "
                "dataset again."
            ) from None
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise UnreadableDocumentError(
                f"{self.prefix}/{name} cannot be read ({error.strerror}). Restore the file, or let "
                "this user read it."
            ) from error

    def has(self, name: str, *, size_bytes: int) -> bool:
        """Tell whether there is a file of a size; a store that tells no sizes is believed to.

        Raises:
            StoreUnreachableError: The store refuses.
        """
        url = f"{self._root}/{name}"
        downloader = getattr(self._downloaders, "own", None) or self._connect()
        try:
            size = self._size(downloader, url)
            return size is None or size == size_bytes
        except Exception as error:
            with suppress(FileNotFoundError):
                self._raise_if_final(error, url=url, path=Path(name))
            return False

    def read_index(self) -> bytes:
        """Fetch the content of index.json.

        Raises:
            MissingDatasetError: There is none.
            StoreUnreachableError: The store refuses, or does not answer.
        """
        try:
            return self.read(INDEX_NAME)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingDatasetError(
                f"There is no dataset at {self.prefix}: it has no {INDEX_NAME}. Check the prefix "
                "(splits are folders of their own, as in …/train), or write the dataset first, for "
                "example with python -m pipelines.ingest image-folder; an ingest that was "
                f"interrupted leaves no {INDEX_NAME} and can simply be run again."
            ) from error

    def _connect(self) -> Any:
        prepare_streaming()
        from streaming.base.storage import CloudDownloader

        try:
            downloader: Any = CloudDownloader.get(self._root)
        except (ValueError, ImportError) as error:
            raise DataError(
                f"Datasets cannot be read from {self.prefix!r} ({error}). Give a local folder or "
                "an s3:// URL."
            ) from error
        if self._config.anonymous and self.prefix.startswith("s3://"):
            # streaming asks so only after a refusal, and not after every kind of one.
            downloader._create_s3_client = partial(downloader._create_s3_client, unsigned=True)
        return downloader

    def _check_size(self, downloader: Any, url: str, max_bytes: int) -> None:
        """Look at a file's size before its transfer takes time and space."""
        try:
            size = self._size(downloader, url)
        except Exception:
            return  # which the transfer meets too, and knows what to do about
        if size is not None and size > max_bytes:
            raise DocumentError(f"it has {size} bytes, more than {max_bytes}")

    def _size(self, downloader: Any, url: str) -> int | None:
        """Ask for a file's size; None where nobody can tell it."""
        place = urlsplit(url)
        if not place.scheme:
            return Path(url).stat().st_size
        if place.scheme != "s3":
            return None
        if downloader._s3_client is None:  # streaming makes it with the first transfer
            downloader._create_s3_client(timeout=self._config.download_timeout_s)
        key = place.path.lstrip("/")
        answer = downloader._s3_client.head_object(Bucket=place.netloc, Key=key)
        return int(answer["ContentLength"])

    @staticmethod
    def _raise_if_final(error: Exception, *, url: str, path: Path) -> None:
        """Raise for the failures that another attempt cannot mend."""
        code, status = _answer(error)
        if isinstance(error, FileNotFoundError) or code in _MISSING_CODES:
            raise FileNotFoundError(url) from error
        if status in _REFUSED_STATUS or type(error).__name__ in _NO_CREDENTIALS:
            raise StoreUnreachableError(
                f"The store refused to give {url} ({describe_failure(error)}). Check that the "
                "credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the "
                "instance role) are right and may read the bucket; a public one is read without "
                "any by shards.anonymous=true (--anonymous)."
                f"{proxy_hint(None)}"
            ) from error
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise CacheUnusableError(
                f"{url} cannot be copied to {path.parent} ({error}). Free some space, or set "
                "cache_dir to a folder on a local disk that this user may write."
            ) from error


def _give_up(state: RetryCallState) -> NoReturn:
    """Raise when all attempts at a transfer have failed, with the last failure as the cause."""
    assert state.outcome is not None
    error = state.outcome.result()
    raise StoreUnreachableError(
        f"{state.args[0]} could not be fetched in {state.seconds_since_start:.0f} s (attempts: "
        f"{state.attempt_number}); the last one gave {describe_failure(error)}. Check that the "
        "store is up and, if it is not AWS, that S3_ENDPOINT_URL names it."
        f"{proxy_hint(None)}"
    ) from error


def prepare_streaming() -> None:
    """Have the next import of streaming leave out what nothing here uses of it.

    Its readers of well-known corpora and its own loader import transformers, scikit-learn and
    torchvision, which takes seconds in every process.

    Raises:
        DataError: The private parts of the version that is installed are not known.
    """
    package, found = "mosaicml-streaming", version("mosaicml-streaming")
    if not SpecifierSet(TESTED_STREAMING).contains(found, prereleases=True):
        raise DataError(
            f"{package} {found} is installed. Private parts of it are used here, which were tested "
            f"with {package} {TESTED_STREAMING} alone: pip install '{package}{TESTED_STREAMING}'"
        )
    loader = ModuleType("streaming.base.dataloader")
    loader.StreamingDataLoader = None  # type: ignore[attr-defined]
    corpora = (ModuleType(f"streaming.{name}") for name in ("multimodal", "text", "vision"))
    for unused in (loader, *corpora):
        sys.modules.setdefault(unused.__name__, unused)


def _answer(error: Exception) -> tuple[str | None, int | None]:
    """Give the code and the HTTP status of a store's answer (in botocore's shape), if any."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None, None
    code = response.get("Error", {}).get("Code")
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None if code is None else str(code), status


def describe_failure(error: Exception) -> str:
    """Say in one line how a transfer failed."""
    code, _ = _answer(error)
    return f"{type(error).__name__}{f' {code}' if code else ''}: {error}"
