"""Building a dataset where it is wanted: shards first, in a work folder, and the index last.

One process of a host builds one dataset at a time. A local dataset is renamed into place when it is
whole; a remote one is uploaded shard by shard.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from pipelines.documents import INDEX_SHA256, sealed
from pipelines.errors import BadDataError, EmptyDatasetError, OccupiedPrefixError
from pipelines.index import INDEX_NAME
from pipelines.ingest.about import read_about
from pipelines.ingest.shard_files import FinishedShard, discard_records
from pipelines.ingest.write import Upload, has_dataset, locked, refuse_occupied, told_when_full
from pipelines.source import Source, SourceConfig

Documents = Mapping[str, Mapping[str, Any]]


def is_complete(prefix: str, *, plan: str) -> bool:
    """Tell whether a dataset is finished already.

    Args:
        prefix: Local folder or URL of the split.
        plan: Digest of all that decides the dataset.

    Raises:
        OccupiedPrefixError: The prefix holds something else.
        UnwritableTargetError: A local folder cannot be looked into.
        StoreUnreachableError: The store refuses, or does not answer.
    """
    source = Source(prefix, config=SourceConfig())
    complete = has_dataset(prefix)
    about = read_about(prefix) if complete else None
    if complete and (about is None or about.plan != plan):
        raise OccupiedPrefixError(
            f"{prefix} holds another dataset, or one of the same images before some were replaced, "
            "so nothing was written. Choose another prefix, or remove the one that is there."
        )
    if source.folder is not None and not complete:
        refuse_occupied(source.folder)
    return complete


def build(
    prefix: str,
    *,
    plan: str,
    shards: Callable[[Path], Iterator[FinishedShard]],
    documents: Callable[[Sequence[FinishedShard]], Documents],
    work_dir: Path,
    note: Callable[[str], None],
) -> None:
    """Build a dataset, or go on with one that was interrupted.

    Args:
        prefix: Local folder or URL of the split.
        plan: Digest of all that decides the dataset.
        shards: Writes shards into a folder, in any order.
        documents: Given all shards in their order, says what else is to lie beside the index: the
            content of each file, as JSON. It may refuse them by an error.
        work_dir: Folder for unfinished shards of a remote dataset.
        note: Takes lines for the user.

    Raises:
        OccupiedPrefixError: The prefix holds something else.
        UnwritableTargetError: A local folder cannot be made or written, or the disk is full.
        EmptyDatasetError: There are no samples.
        StoreUnreachableError: The store refuses, or does not answer.
    """
    source = Source(prefix, config=SourceConfig())
    target = source.folder
    if target is not None:
        work = target.with_name(f".{target.name}.building")
    else:
        # Named after what is written and where to, for uploaded shards are not kept here.
        place = hashlib.sha256(f"{plan} {source.prefix}".encode()).hexdigest()[:16]
        work = work_dir.expanduser() / place
    with locked(work.with_suffix(".lock")), told_when_full(work):
        # Another process may have been faster while this one waited.
        if is_complete(prefix, plan=plan):
            note("complete, nothing to do")
            return
        if target is not None:
            _write(work, shards=shards, documents=documents, upload=None)
            work.replace(target)
            discard_records(target)
            return
        work.mkdir(parents=True, exist_ok=True)
        upload = Upload(work, source.prefix)
        for name in _write(work, shards=shards, documents=documents, upload=upload):
            upload(name)
        upload(INDEX_NAME)
        shutil.rmtree(work)


def _write(
    work: Path,
    *,
    shards: Callable[[Path], Iterator[FinishedShard]],
    documents: Callable[[Sequence[FinishedShard]], Documents],
    upload: Upload | None,
) -> Sequence[str]:
    """Write everything into the work folder; return the names of the documents."""
    finished = []
    for shard in shards(work):
        if upload and shard.entry:
            _upload_once(upload, work, shard.entry["raw_data"]["basename"])
        finished.append(shard)
    finished.sort(key=lambda shard: shard.number)
    contents = documents(finished)
    entries = [shard.entry for shard in finished if shard.entry]
    if not entries:
        raise EmptyDatasetError("None of the images can be decoded.")
    index = json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode()
    beside = {INDEX_SHA256: hashlib.sha256(index).hexdigest()}
    for name, content in contents.items():
        (work / name).write_text(json.dumps(sealed({**content, **beside}), indent=1))
    (work / INDEX_NAME).write_bytes(index)
    return list(contents)


def _upload_once(upload: Upload, work: Path, name: str) -> None:
    """Upload a shard, unless an earlier start of this ingest did; its bytes are then freed."""
    shard = work / name
    if shard.exists():
        upload(name)
        shard.unlink(missing_ok=True)


def refuse_too_many(
    skipped: Sequence[tuple[str, str]],
    *,
    images: int,
    max_skipped_share: float,
    fault: str = "images cannot be decoded",
) -> None:
    """Stop an ingest that leaves out too much.

    Args:
        skipped: Name and reason of each image that is left out.
        images: How many there are in all.
        max_skipped_share: Share of them that may be left out.
        fault: What is wrong with those, in words.

    Raises:
        BadDataError: There are more.
    """
    if len(skipped) > Decimal(str(max_skipped_share)) * images:  # 0.29 of 100 are 29, not 28.99…
        name, reason = skipped[0]
        raise BadDataError(
            f"{len(skipped)} of {images} {fault}, more than "
            f"max_skipped_share={max_skipped_share}; the first is {name} ({reason}). Remove or "
            "repair them, or raise --max-skipped-share."
        )
