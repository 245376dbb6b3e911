"""Writing shards by several processes, so that an interrupted ingest goes on where it stopped.

The samples are cut into parts before anything is written, and each part becomes one shard. A shard
is finished when its record (name, size, hash, samples) lies beside it in the work folder; what is
recorded is not written again, unless the record has changed since. The index is made of all records
and comes last.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from pipelines.documents import DocumentError, read_json, sealed, typed, unsealed
from pipelines.ingest.processes import spawned

logger = logging.getLogger(__name__)

_HASH = "sha256"
_PLAN = "plan.json"

WriteSample = Callable[[dict[str, Any]], None]


class NumberedPart(Protocol):
    """What becomes one shard."""

    @property
    def number(self) -> int:
        """Place among the shards."""
        ...


P = TypeVar("P", bound=NumberedPart)
P_contra = TypeVar("P_contra", bound=NumberedPart, contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What there is to say of a shard's content.

    Attributes:
        skipped: Name and reason of each sample that was left out.
        noted: What else its filler wants to know once all shards are finished, as JSON.
    """

    skipped: tuple[tuple[str, str], ...] = ()
    noted: Mapping[str, Any] = field(default_factory=dict)


class ShardFiller(Protocol[P_contra]):
    """Makes the samples of shards."""

    @property
    def columns(self) -> Mapping[str, str]:
        """MDS encoding of each field of a sample."""
        ...

    def fill(self, part: P_contra, write: WriteSample) -> Filled:
        """Write the samples of one part, in the order of their ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """Record of one shard.

    Attributes:
        number: Place among the shards.
        entry: Its entry in the index; empty for a shard without samples.
        filled: What its filler said of it.
        kept: Whether an earlier start wrote it.
    """

    number: int
    entry: dict[str, Any]
    filled: Filled
    kept: bool = False


def write_shards(
    parts: Sequence[P],
    work: Path,
    *,
    plan: str,
    open_filler: Callable[[int], ShardFiller[P]],
    workers: int,
    retry_skipped: bool = False,
) -> Iterator[FinishedShard]:
    """Write every part that is not recorded yet; give each shard as soon as it is finished.

    Args:
        parts: What to write.
        work: Folder of the shards and their records; one of another plan is emptied first.
        plan: Digest of all that decides the shards.
        open_filler: Makes the filler of a process, given the process's number; it is pickled.
        workers: Processes.
        retry_skipped: Write those shards again that left samples out, which may have been repaired.

    Raises:
        BrokenIngestError: A process died.
    """
    file = work / _PLAN
    if not file.is_file() or file.read_bytes() != plan.encode():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        file.write_text(plan)
    missing = []
    for part in parts:
        record = _record(work, part.number)
        kept = _read(record)
        if kept and not (retry_skipped and kept.filled.skipped):
            yield kept
        else:
            missing.append(part)
    workers = min(workers, len(missing))
    if workers > 1:
        with spawned(workers, begin=partial(_own_filler, open_filler)) as pool:
            running = [pool.submit(_write_here, part, work) for part in missing]
            for future in as_completed(running):
                yield future.result()
    elif missing:
        filler = open_filler(0)
        for part in missing:
            yield _write(part, work, filler=filler)


class _Own:
    """What a process that writes shards has of its own."""

    filler: ClassVar[Callable[[], ShardFiller[Any]]]


def _own_filler(open_filler: Callable[[int], ShardFiller[Any]], number: int) -> None:
    # Opened by the first part, where a failure is raised and not only logged.
    _Own.filler = cache(partial(open_filler, number))


def _write_here(part: NumberedPart, work: Path) -> FinishedShard:
    return _write(part, work, filler=_Own.filler())


def _write(part: P, work: Path, *, filler: ShardFiller[P]) -> FinishedShard:
    """Write one part as one shard, and record it."""
    from streaming.base.format.mds import MDSWriter

    scratch = work / f"part.{part.number:05d}"
    shutil.rmtree(scratch, ignore_errors=True)
    writer: Any = MDSWriter(
        out=str(scratch), columns=dict(filler.columns), hashes=[_HASH], size_limit=None
    )
    filled = filler.fill(part, writer.write)
    writer.finish()
    entries = read_json(scratch / "index.json")["shards"]
    entry = entries[0] if entries else {}
    if entry:
        name = f"shard.{part.number:05d}.mds"
        (scratch / entry["raw_data"]["basename"]).replace(work / name)
        entry["raw_data"]["basename"] = name
    finished = FinishedShard(number=part.number, entry=entry, filled=filled)
    record = _record(work, part.number)
    # Renamed into place: a record that exists is whole.
    draft = record.with_suffix(".draft")
    draft.write_text(json.dumps(sealed(asdict(finished))))
    draft.replace(record)
    shutil.rmtree(scratch)
    return finished


def discard_records(work: Path) -> None:
    """Remove what only an unfinished ingest needs."""
    for path in (*work.glob("*.record"), *work.glob("*.draft"), work / _PLAN):
        path.unlink(missing_ok=True)
    for path in work.glob("part.*"):
        shutil.rmtree(path)


def _record(work: Path, number: int) -> Path:
    return work / f"shard.{number:05d}.record"


def _read(record: Path) -> FinishedShard | None:
    """Read a record; None if there is none that can be believed."""
    try:
        return replace(typed(FinishedShard, unsealed(read_json(record))), kept=True)
    except FileNotFoundError:
        return None
    except DocumentError as error:
        logger.warning("writing a shard again, since %s cannot be used: %s", record, error)
        return None
