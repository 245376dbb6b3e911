"""What an interrupted ingest left of itself is believed only as it was written."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.documents import INDEX_SHA256, seal, unseal
from pipelines.errors import InvalidLatentRecordError
from pipelines.ingest.about import InvalidAboutError, read_about
from pipelines.ingest.write import Filled, Part, WriteSample, write_shards
from pipelines.latent_record import parse_latent_record, read_latent_record
from tests.unit.pipelines.stored import flip
from tests.unit.pipelines.test_latent_record import content

PLAN = "what is to be written"


class Filler:
    columns: Mapping[str, str] = {"image": "bytes", "label": "int"}

    def fill(self, part: Part[object], write: WriteSample) -> Filled:
        write({"image": b"any", "label": part.number})
        return Filled(skipped=(("a.png", "is torn"),), labels=((part.number, 1),))


def shards(work: Path, plan: str = PLAN) -> dict[int, tuple[bool, object]]:
    parts = [Part(number=number, first=number, samples=()) for number in range(2)]
    found = write_shards(parts, work, plan=plan, open_filler=lambda _: Filler(), workers=1)
    found = sorted(found, key=lambda shard: shard.number)
    return {shard.number: (shard.kept, (shard.entry, shard.filled)) for shard in found}


def test_a_changed_record_is_told_and_its_shard_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "work"
    first = shards(work)
    assert [kept for kept, _ in first.values()] == [False, False]
    record = work / "shard.00000.record"
    whole = record.read_bytes()
    labels = whole.index(b'"labels": [[0, 1]]') + len(b'"labels": [[0, ')
    hostile = [b"", b"\xff", b"[" * 100_000, b"{}", b"9" * 5000]
    for data in (whole[:labels] + b"7" + whole[labels + 1 :], whole[:-9], *hostile):
        record.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = shards(work)
        assert {number: found for number, (_, found) in again.items()} == {
            number: found for number, (_, found) in first.items()
        }
        assert {number: kept for number, (kept, _) in again.items()} == {0: False, 1: True}
        (line,) = (each.getMessage() for each in caplog.records)
        assert str(record) in line


def flipped(work: Path) -> None:
    flip(work / "shard.00000.mds")


def cut(work: Path) -> None:
    (work / "shard.00000.mds").write_bytes(b"")


def removed(work: Path) -> None:
    (work / "shard.00000.mds").unlink()


def replaced(work: Path) -> None:
    removed(work)
    (work / "shard.00000.mds" / "inside").mkdir(parents=True)


def swapped(work: Path) -> None:
    shutil.copy(work / "shard.00001.record", work / "shard.00000.record")


def linked(work: Path) -> None:
    """Elsewhere lies the very same shard, which somebody may change at any time."""
    moved = (work / "shard.00000.mds").rename(work.parent / "elsewhere")
    (work / "shard.00000.mds").symlink_to(moved)


def forge(work: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record, and make its checksum right again."""
    record = work / "shard.00000.record"
    body = unseal(json.loads(record.read_bytes()))
    change(body)
    record.write_text(json.dumps(seal(body)))


def forged(work: Path) -> None:
    forge(work, lambda body: body["entry"].update(samples=1 << 62))


def emptied(work: Path) -> None:
    forge(work, lambda body: body.update(entry={}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flipped, "hash"),
        (cut, "0 bytes long"),
        (removed, "is gone"),
        (replaced, "is a folder"),
        (swapped, "another one"),
        (linked, "is a link"),
        (forged, "a record that no ingest writes"),
        (emptied, "tells of no samples"),
    ],
)
def test_a_shard_that_is_not_as_recorded_is_written_again(
    change: Callable[[Path], None], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "work"
    first = shards(work)
    whole = (work / "shard.00000.mds").read_bytes()
    change(work)
    with caplog.at_level(logging.WARNING):
        again = shards(work)
    assert {number: kept for number, (kept, _) in again.items()} == {0: False, 1: True}
    assert [found for _, found in again.values()] == [found for _, found in first.values()]
    assert (work / "shard.00000.mds").read_bytes() == whole
    assert not (work / "shard.00000.mds").is_symlink()
    (line,) = (each.getMessage() for each in caplog.records)
    assert "shard.00000.mds" in line
    assert told in line


def folder(record: Path) -> None:
    (record / "inside").mkdir(parents=True)


def endless(record: Path) -> None:
    record.symlink_to("/dev/zero")


def copied(record: Path) -> None:
    """The very same record, which a link leads to."""
    record.symlink_to(record.parent.parent / "whole")


@pytest.mark.parametrize("make", [folder, endless, os.mkfifo, copied])
def test_what_is_no_file_in_a_records_place_is_told_and_replaced(
    make: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "work"
    first = shards(work)
    record = work / "shard.00000.record"
    whole = record.read_bytes()
    record.rename(work.parent / "whole")
    make(record)
    with caplog.at_level(logging.WARNING):
        again = shards(work)
    assert {number: kept for number, (kept, _) in again.items()} == {0: False, 1: True}
    assert [found for _, found in again.values()] == [found for _, found in first.values()]
    assert record.read_bytes() == whole
    assert not record.is_symlink()
    (line,) = (each.getMessage() for each in caplog.records)
    assert str(record) in line


def test_a_plan_that_is_no_text_is_another_plan(tmp_path: Path) -> None:
    first = shards(tmp_path)
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x80")
    assert shards(tmp_path) == first


def test_documents_beside_an_index_tell_that_they_were_changed(tmp_path: Path) -> None:
    about = {"plan": "x", "classes": ["cat", "dog"], "images_per_class": [1, 2], "skipped": []}
    (tmp_path / "ingest.json").write_text(json.dumps(about))
    before = read_about(str(tmp_path))  # as versions of before have written it
    text = json.dumps(seal(about), indent=1)
    (tmp_path / "ingest.json").write_text(text)
    assert read_about(str(tmp_path)) == before
    (tmp_path / "ingest.json").write_text(text.replace("cat", "cot"))
    with pytest.raises(InvalidAboutError, match="its checksum is wrong"):
        read_about(str(tmp_path))

    latents = json.dumps(seal(json.loads(content())))
    assert parse_latent_record(latents.encode(), prefix="here")
    changed = latents.replace('"std": 2.0', '"std": 4.0', 1)
    assert changed != latents
    with pytest.raises(InvalidLatentRecordError, match="its checksum is wrong"):
        parse_latent_record(changed.encode(), prefix="here")


def test_a_document_of_another_dataset_is_refused(tmp_path: Path) -> None:
    for name, label in (("one", 0), ("two", 1)):
        (tmp_path / name).mkdir()
        index = b'{"version": 2, "shards": [%d]}' % label
        (tmp_path / name / "index.json").write_bytes(index)
        of = {INDEX_SHA256: hashlib.sha256(index).hexdigest()}
        about = {"plan": "x", "classes": [name], "skipped": [], **of}
        (tmp_path / name / "ingest.json").write_text(json.dumps(seal(about)))
        record = {**json.loads(content()), **of}
        (tmp_path / name / "latents.json").write_text(json.dumps(seal(record)))
    about = read_about(str(tmp_path / "one"))
    assert about is not None
    assert about.classes == ("one",)
    assert read_latent_record(str(tmp_path / "one"))
    for file in ("ingest.json", "latents.json"):
        shutil.copy(tmp_path / "two" / file, tmp_path / "one" / file)
    with pytest.raises(InvalidAboutError, match="of another dataset than the index"):
        read_about(str(tmp_path / "one"))
    with pytest.raises(InvalidLatentRecordError, match="of other latents than the index"):
        read_latent_record(str(tmp_path / "one"))
