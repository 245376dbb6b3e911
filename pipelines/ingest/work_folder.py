"""The folder that a dataset is built in: `.NAME.building` beside its place.

When it is finished it becomes the dataset, with all that lies in it. An interrupted ingest leaves
it behind, and anybody may have put something there until it goes on. So only regular files count,
and only under the names that an ingest gives. Whatever else has such a name is removed and written
again. Whatever has another name is somebody's, and refused.
"""

import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection
from pathlib import Path

from pipelines.console import visible
from pipelines.errors import OccupiedPrefixError
from pipelines.files import DRAFT, make_folders, write_atomic
from pipelines.index import INDEX_NAME
from pipelines.ingest.about import ABOUT_NAME
from pipelines.latent_record import RECORD_NAME

logger = logging.getLogger(__name__)

_PLAN = "plan.json"
_DOCUMENTS = (INDEX_NAME, ABOUT_NAME, RECORD_NAME)
_SHARD = re.compile(r"shard\.(\d{5,19})\.(mds|record)")
_PART = re.compile(r"part\.\d{5,19}")
_DRAFT = re.compile(re.escape(DRAFT) + "[0-9a-f]{32}")


def shard_file(work: Path, number: int) -> Path:
    """Say where a shard is written."""
    return work / f"shard.{number:05d}.mds"


def record_file(work: Path, number: int) -> Path:
    """Say where the record of a finished shard is."""
    return work / f"shard.{number:05d}.record"


def part_folder(work: Path, number: int) -> Path:
    """Say where a part is written until it is whole."""
    return work / f"part.{number:05d}"


def open_work_folder(work: Path) -> None:
    """Make the folder unless it is there.

    Raises:
        OccupiedPrefixError: Something else is in its place.
    """
    try:
        if problem := _no_folder(work):
            raise OccupiedPrefixError(
                f"{work}, where shards are written until all are finished, {problem}. Nothing was "
                "written there. Remove it, and run the same command again."
            )
    except FileNotFoundError:
        make_folders(work)


def take_over(work: Path, *, plan: str, parts: int) -> None:
    """Have the folder hold nothing but finished shards of a plan, their records and the plan.

    Args:
        work: The folder; it is made, or emptied if it is of another plan.
        plan: Digest of all that decides the shards.
        parts: How many there may be.

    Raises:
        OccupiedPrefixError: It is no folder, or holds what no ingest of this plan writes there.
    """
    open_work_folder(work)
    if not _is_of(work, plan):
        empty_work_folder(work)
        write_atomic(work / _PLAN, plan.encode())
        return

    def is_own(name: str) -> bool:
        shard = _SHARD.fullmatch(name)
        return int(shard[1]) < parts if shard else _is_written_by_ingests(name)

    _refuse_others(work, is_own)
    for name in os.listdir(work):
        if name != _PLAN and not _SHARD.fullmatch(name):
            _remove_remains(work / name)


def empty_work_folder(work: Path) -> None:
    """Make the folder, or remove all that an ingest has left in it.

    Raises:
        OccupiedPrefixError: It is no folder, or holds what no ingest writes there.
    """
    open_work_folder(work)
    _refuse_others(work, _is_written_by_ingests)
    for name in os.listdir(work):
        clear_place(work / name)


def check_finished(work: Path, names: Collection[str]) -> None:
    """Refuse to make a dataset of a folder into which somebody has put something meanwhile.

    Args:
        work: The folder.
        names: What the dataset consists of.

    Raises:
        OccupiedPrefixError: It holds more than that, the plan, and records.
    """

    def is_own(name: str) -> bool:
        shard = _SHARD.fullmatch(name)
        own = name in names or name == _PLAN or (shard is not None and shard[2] == "record")
        return own and no_file(work / name) is None

    _refuse_others(work, is_own)


def discard_records(work: Path) -> None:
    """Remove what only an unfinished ingest needs."""
    for path in (*work.glob("*.record"), work / _PLAN):
        path.unlink(missing_ok=True)


def no_file(path: Path) -> str | None:
    """Say why a path is no regular file, or None if it is one. Links are not followed.

    Raises:
        FileNotFoundError: There is nothing.
    """
    mode = path.lstat().st_mode
    return None if stat.S_ISREG(mode) else _kind(mode)


def clear_place(path: Path) -> None:
    """Remove what is there, if anything is; of a link itself, not what it leads to."""
    try:
        if _no_folder(path):
            path.unlink()
        else:
            shutil.rmtree(path)
    except FileNotFoundError:
        return


def _no_folder(path: Path) -> str | None:
    mode = path.lstat().st_mode
    return None if stat.S_ISDIR(mode) else _kind(mode)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "is a link", stat.S_IFDIR: "is a folder", stat.S_IFREG: "is a file"}
    return kinds.get(stat.S_IFMT(mode), "is no regular file")


def _is_of(work: Path, plan: str) -> bool:
    file = work / _PLAN
    try:
        if problem := no_file(file):
            logger.warning("writing all shards again, since %s %s", file, problem)
            return False
    except FileNotFoundError:
        return False
    return file.lstat().st_size == len(plan.encode()) and file.read_bytes() == plan.encode()


def _is_written_by_ingests(name: str) -> bool:
    known = name == _PLAN or name in _DOCUMENTS
    return known or any(each.fullmatch(name) for each in (_SHARD, _PART, _DRAFT))


def _refuse_others(work: Path, is_own: Callable[[str], bool]) -> None:
    if others := sorted(name for name in os.listdir(work) if not is_own(name)):
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise OccupiedPrefixError(
            f"{work}, where shards are written until all are finished, holds "
            f"{visible(others[0])!r}{more}, which this ingest has not written. It would become "
            "part of the dataset, so it is left alone. Move it elsewhere, or remove the folder, "
            "and run the same command again; finished shards are kept."
        )


def _remove_remains(path: Path) -> None:
    """Remove what a process was about to write when it ended, or what is in the place of it."""
    problem = _no_folder(path) if _PART.fullmatch(path.name) else no_file(path)
    if problem:
        logger.warning("removing %s, since it %s", path, problem)
    clear_place(path)
