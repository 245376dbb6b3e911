"""Samples in shards (the MDS format of streaming), read by their id.

An MDS shard is a count n, n + 1 offsets and n samples. A sample is the lengths of those of its
values that carry one, then the values in the order of the columns; all numbers are little-endian.
streaming's own reader opens and parses the file anew for each sample, which costs as much as
decoding on a GPU; here a file stays open. It is read and nowhere mapped, because a mapped file that
somebody cuts short kills the process.

streaming's dataset class is not used: it decides the order by itself, shares memory between ranks
that outlives them, and ends an epoch early without an error when a shard cannot be fetched. Which
sample comes when is the business of `pipelines.order`; here every failure raises.
"""

import functools
import hashlib
import io
import logging
import os
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Thread
from typing import Annotated

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field

from pipelines.cache import ShardCache, default_cache_dir
from pipelines.dataset import RawSample
from pipelines.errors import CacheUnusableError, CorruptShardError, MissingShardError
from pipelines.index import IMAGE_COLUMN, LABEL_COLUMN, Shard, parse_index
from pipelines.latent_format import MOMENTS_COLUMN
from pipelines.source import Source, SourceConfig


class MalformedSampleError(Exception):
    """A sample's bytes are not what the columns ask for."""


class ShardFile:
    """A shard whose size, hash and table of offsets have been checked.

    Args:
        path: The file; it is kept open, so it stays readable when its name is removed.
        shard: What the index says of it.
        payload: Column of the images or latents.

    Raises:
        FileNotFoundError: There is no file of that name any more.
        MalformedSampleError: The file was cut short.
    """

    def __init__(self, path: Path, shard: Shard, *, payload: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        table = os.pread(self._descriptor, 4 * (shard.samples + 1), 4)
        if len(table) != 4 * (shard.samples + 1):
            raise MalformedSampleError(f"the file has {4 + len(table)} bytes left")
        self._offsets = np.frombuffer(table, dtype="<u4").astype(np.int64)
        self._columns = [
            (column.name, column.size, not column.encoding.startswith("u"))
            for column in shard.columns
        ]
        self._payload = payload

    def read(self, place: int) -> tuple[bytes, int]:
        """Read the payload and the label of one sample.

        Args:
            place: Its place in the shard.

        Raises:
            MalformedSampleError: The lengths in it do not add up, or the file was cut short.
        """
        begin, end = self._offsets[place : place + 2].tolist()
        sample = os.pread(self._descriptor, end - begin, begin)
        payload, label = b"", 0
        head = 0
        value = 4 * sum(size is None for _, size, _ in self._columns)
        for name, fixed, signed in self._columns:
            size = int.from_bytes(sample[head : head + 4], "little") if fixed is None else fixed
            head += 4 * (fixed is None)
            if name == self._payload:
                payload = sample[value : value + size]
            elif name == LABEL_COLUMN:
                label = int.from_bytes(sample[value : value + size], "little", signed=signed)
            value += size
        if value != end - begin or len(sample) != value:
            raise MalformedSampleError(
                f"its values take {value} bytes and it has {len(sample)} of {end - begin}"
            )
        return payload, label


def file_problem(path: Path, shard: Shard) -> str | None:
    """Say how a file differs from what the index says of it, or None if it does not.

    Raises:
        FileNotFoundError: There is no such file.
    """
    size = path.stat().st_size
    if size != shard.size_bytes:
        return f"is {size} bytes long instead of {shard.size_bytes}"
    # A count, then one offset for each sample and one for the end.
    head_bytes = 4 * (shard.samples + 2)
    with path.open("rb") as file:
        if _digest(shard.hash_name, file) != shard.hash_value:
            return f"does not have the {shard.hash_name} hash in the index"
        file.seek(0)
        head = file.read(head_bytes)
    if len(head) < head_bytes:
        return f"has {len(head)} bytes left"
    table = np.frombuffer(head, dtype="<u4").astype(np.int64)
    offsets = np.concatenate([[head_bytes], table[1:], [shard.size_bytes]])
    if table[0] != shard.samples or np.any(np.diff(offsets) < 0):
        return "does not hold the table of samples that the format asks for"
    return None


def _digest(name: str, file: io.BufferedReader) -> str:
    """Hash a file by an algorithm that streaming knows, by its name."""
    algorithm = getattr(xxhash, name, None) or functools.partial(hashlib.new, name)
    return hashlib.file_digest(file, algorithm).hexdigest()


logger = logging.getLogger(__name__)

_TRIES = 4  # at a shard that other processes trim from the cache as soon as it is there
_DOWNLOADS = 2  # a shard that arrives corrupt is fetched once more


@dataclass(frozen=True, kw_only=True)
class ShardsConfig(SourceConfig):
    """How shards are fetched and kept.

    Attributes:
        cache_dir: Folder on this node for fetched shards, shared by all processes; None for one of
            the caller's choice, or a private one under the temporary folder. Datasets at a local
            path are read in place, without it.
        cache_limit_gib: Size of the folder above which the shards that were not asked for the
            longest are removed; None lets it grow to the size of the dataset. It should hold twice
            the shards of one shuffle block, or shards are fetched again and again. Shards that a
            process holds open keep their space until it closes them.
        download_threads: Shards that one process fetches at a time.
        open_files: Shards that one process holds open, at best all of a shuffle block.
    """

    cache_dir: str | None = field(default=None, metadata={"place": "path"})
    cache_limit_gib: Annotated[float, Field(gt=0)] | None = None
    download_threads: Annotated[int, Field(ge=1)] = 4
    open_files: Annotated[int, Field(ge=1)] = 32


class ShardedDataset:
    """A dataset in shards, with random access.

    A shard is fetched when one of its samples is first read, and checked against the size and hash
    in the index, once in each process.

    Args:
        prefix: Local folder or URL (s3://bucket/folder, file:///shared/folder) that holds
            index.json.
        config: Cache folder, patience and time limits.

    Raises:
        MissingDatasetError: There is no index.json.
        InvalidIndexError: It is damaged, hostile or of another kind.
        EmptyDatasetError: It lists no samples.
        StoreUnreachableError: The store refuses, or does not answer.
        CacheUnusableError: The cache folder cannot be written.
    """

    def __init__(self, prefix: str, *, config: ShardsConfig | None = None) -> None:
        config = config or ShardsConfig()
        self._threads = config.download_threads
        self._source = Source(prefix, config=config)
        index = self._source.read_index()
        self._shards = parse_index(index, prefix=self._source.prefix)
        self._ends = list(accumulate(shard.samples for shard in self._shards))
        self._cache: ShardCache | None = None
        self._folder = Path(self._source.prefix)
        if not self._source.is_local:
            root = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
            limit = config.cache_limit_gib
            self._cache = ShardCache(
                root,
                prefix=self._source.prefix,
                index=index,
                limit_bytes=None if limit is None else int(limit * 2**30),
            )
            self._folder = self._cache.folder
        self._open = lru_cache(config.open_files)(self._open_file)
        self._checked: set[int] = set()
        self._damaged: dict[int, MissingShardError | CorruptShardError] = {}
        self.latents = self._shards[0].latents
        """Format of the latents that the samples are; None if they are images."""
        self._payload = MOMENTS_COLUMN if self.latents else IMAGE_COLUMN
        self.digest = hashlib.sha256(index).hexdigest()
        """SHA-256 of index.json: which version of which dataset this is."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Samples in each shard."""
        return [shard.samples for shard in self._shards]

    def __len__(self) -> int:
        return self._ends[-1]

    def shard_of(self, sample_id: int) -> str:
        """Name the file a sample lies in."""
        return self._shards[self._locate(sample_id)].name

    def read(self, sample_id: int) -> RawSample:
        """Read one sample, fetching its shard if needed.

        Raises:
            MissingShardError: The store does not have the shard.
            CorruptShardError: The shard differs from what the index says.
            StoreUnreachableError: The store refuses, or does not answer.
            CacheUnusableError: The cache folder cannot be written.
        """
        number = self._locate(sample_id)
        shard = self._shards[number]
        place = sample_id - (self._ends[number] - shard.samples)
        try:
            data, label = self._open(number).read(place)
        except MalformedSampleError as error:
            # The file may have been cut short since it was checked; the next read looks again.
            self._checked.discard(number)
            self._open.cache_clear()
            raise CorruptShardError(
                f"Sample {sample_id} in shard {shard.name} of {self._source.prefix} is malformed: "
                f"{error}, although the shard was as the index says. Write the dataset again."
            ) from error
        return RawSample(data, label, sample_id)

    def prepare(self, sample_ids: NDArray[np.int64]) -> None:
        """Fetch and check the shards of these samples, several at a time.

        A shard that is missing or corrupt is logged here and raised when one of its samples is
        read.

        Raises:
            StoreUnreachableError: The store refuses, or does not answer.
            CacheUnusableError: The cache folder cannot be written.
        """
        numbers = set(np.searchsorted(self._ends, sample_ids, side="right").tolist())
        if self._cache is not None:
            # What the cache has dropped since is fetched here, and not by whoever reads it.
            present = {number for number in numbers & self._checked if self._path(number).exists()}
            self._checked -= numbers - present
            self._cache.mark_used(self._shards[number].name for number in present)
        todo = deque(sorted(numbers - self._checked - self._damaged.keys()))
        if not todo:
            return
        # The processes of a node start at different places, so as not to wait for each other.
        todo.rotate(os.getpid() % len(todo))
        errors: list[Exception] = []

        def work() -> None:
            while todo and not errors:
                try:
                    number = todo.popleft()
                except IndexError:  # another thread took the last one
                    return
                try:
                    self._check(number)
                except (MissingShardError, CorruptShardError) as error:
                    logger.warning("%s", error)
                except Exception as error:
                    errors.append(error)

        # Daemons, unlike the threads of an executor, do not hold up the end of the process.
        threads = [Thread(target=work, daemon=True) for _ in range(self._threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _check(self, number: int) -> None:
        if number in self._checked:
            return
        # Not tried anew for each of its samples.
        if error := self._damaged.get(number):
            raise error.with_traceback(None)
        try:
            self._provide(self._shards[number])
        except (MissingShardError, CorruptShardError) as error:
            self._damaged[number] = error
            raise
        self._checked.add(number)

    def _open_file(self, number: int) -> ShardFile:
        """Open a shard, fetching it if needed."""
        shard = self._shards[number]
        for _ in range(_TRIES):
            self._check(number)
            try:
                return ShardFile(self._path(number), shard, payload=self._payload)
            except FileNotFoundError:  # the cache was cleaned, or trimmed, behind our back
                self._checked.discard(number)
        raise CacheUnusableError(
            f"Shard {shard.name} of {self._source.prefix} vanishes from the cache {self._folder} "
            f"as soon as it is there ({_TRIES} times). Raise cache_limit_gib, or stop what removes "
            "files there."
        )

    def _path(self, number: int) -> Path:
        return self._folder / self._shards[number].name

    def _locate(self, sample_id: int) -> int:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"There is no sample {sample_id}; the dataset holds {len(self)}.")
        return bisect_right(self._ends, sample_id)

    def _provide(self, shard: Shard) -> None:
        """Make sure that the shard is here and is what the index says."""
        path = self._folder / shard.name
        if self._cache is None:
            if not path.is_file():
                raise self._missing(shard)
            if problem := file_problem(path, shard):
                raise self._corrupt(shard, problem)
            return
        if self._cached_problem(path, shard) is None:
            return
        with self._cache.fetching(shard.name) as folder:
            # Another process may have been faster, or the cached file is bad.
            problem = self._cached_problem(path, shard)
            if problem is None:
                return
            if path.is_file():
                logger.warning("cached shard %s %s; fetching it again", path, problem)
                path.unlink(missing_ok=True)
            self._fetch(shard, folder)

    def _cached_problem(self, path: Path, shard: Shard) -> str | None:
        """Say why a shard must be fetched; else note that it is in use."""
        assert self._cache is not None
        try:
            problem = file_problem(path, shard)
        except FileNotFoundError:  # not there, or trimmed while it was looked at
            return "is not there"
        if problem is None:
            self._cache.mark_used([shard.name])
        return problem

    def _fetch(self, shard: Shard, folder: Path) -> None:
        assert self._cache is not None
        problem: str | None = None
        for attempt in range(1, _DOWNLOADS + 1):
            fetched = folder / str(attempt)
            try:
                self._source.fetch(shard.name, fetched)
            except FileNotFoundError as error:
                raise self._missing(shard) from error
            problem = file_problem(fetched, shard)
            if problem is None:
                self._cache.keep(shard.name, fetched=fetched)
                return
            logger.warning("shard %s/%s %s", self._source.prefix, shard.name, problem)
            fetched.unlink()
        raise self._corrupt(shard, f"{problem}, also when fetched a second time")

    def _missing(self, shard: Shard) -> MissingShardError:
        return MissingShardError(
            f"Shard {shard.name} is listed in the index of {self._source.prefix} and is not there. "
            "Restore the file, or write the dataset again."
        )

    def _corrupt(self, shard: Shard, problem: str) -> CorruptShardError:
        return CorruptShardError(
            f"Shard {shard.name} of {self._source.prefix} {problem}. Restore the file from where "
            "the dataset was made, or write the dataset again."
        )
