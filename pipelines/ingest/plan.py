"""The plan of a dataset, which is known before anything is written, and how it is carried out.

Images, images to be encoded and arrays have one kind of plan: parts, each of which becomes a shard,
what fills them, and a digest of all that decides the result. One process of a host builds one
dataset at a time. A local dataset is renamed into place when it is whole; a remote one is uploaded
shard by shard.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from pipelines.console import visible
from pipelines.documents import INDEX_SHA256, seal
from pipelines.errors import BadDataError, EmptyDatasetError, IngestSettingError
from pipelines.files import sync, write_atomic
from pipelines.index import INDEX_NAME, Shard
from pipelines.ingest.about import ABOUT_NAME, About
from pipelines.ingest.listing import SourceImage
from pipelines.ingest.source_files import PassedOver
from pipelines.ingest.target import Upload, explain_full_disk, is_complete, lock
from pipelines.ingest.work_folder import check_finished, discard_records, open_work_folder
from pipelines.ingest.write import FinishedShard, Part, ShardFiller, index_of, write_shards
from pipelines.progress import Pace, Progress, figures_in
from pipelines.source import Source

S = TypeVar("S")
Documents = Mapping[str, Mapping[str, Any]]
"""What is to lie beside the index: the content of each file, as JSON."""

_REPORT_EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """How a dataset is written, whatever it holds.

    Attributes:
        shard_bytes: Size at which a shard is closed.
        workers: Processes.
        max_skipped_fraction: Fraction of the samples that may be left out for being damaged.
        work_dir: Folder for unfinished shards of a remote dataset.

    Raises:
        IngestSettingError: A number is out of its range.
    """

    shard_bytes: int = 1 << 26
    workers: int = 1
    max_skipped_fraction: float = 0.01
    work_dir: Path = Path("~/.cache/lapflow/ingest")

    def __post_init__(self) -> None:
        for name in ("shard_bytes", "workers"):
            if (value := getattr(self, name)) < 1:
                raise IngestSettingError(f"{name}={value} must be at least 1.")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise IngestSettingError(
                f"max_skipped_fraction={self.max_skipped_fraction} must lie in [0, 1]."
            )


def check_seed(seed: int) -> None:
    """Refuse a seed of an order that has none.

    Raises:
        IngestSettingError: It is negative.
    """
    if seed < 0:
        raise IngestSettingError(f"seed={seed} must be 0 or more.")


def cut(samples: Sequence[S], *, shard_bytes: int, size: Callable[[S], int]) -> tuple[Part[S], ...]:
    """Cut samples into parts of at most so many bytes, one sample at least.

    Args:
        samples: At least one.
        shard_bytes: Bytes of a part.
        size: Bytes of a sample.
    """
    parts: list[Part[S]] = []
    first = total = 0
    for place, sample in enumerate(samples):
        bytes_here = size(sample)
        if place > first and total + bytes_here > shard_bytes:
            parts.append(Part(number=len(parts), first=first, samples=samples[first:place]))
            first, total = place, 0
        total += bytes_here
    return (*parts, Part(number=len(parts), first=first, samples=samples[first:]))


def plan_digest(decisive: Any, parts: Iterable[Part[SourceImage]] = ()) -> str:
    """Digest of what decides a dataset: settings; names, versions and classes of the files.

    Where files lie does not count, so that a moved source is the same one; a copy is, if it keeps
    the times of the files. A file that was replaced is another one, also of equal size.
    """
    digest = hashlib.sha256(json.dumps(decisive).encode())
    for part in parts:
        for file in part.samples:
            one = [part.number, file.name, file.size, file.label, file.version]
            digest.update(json.dumps(one).encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be written where.

    Attributes:
        prefix: Local folder or URL of the split.
        parts: What becomes each shard.
        open_filler: Makes what fills the shards, for each process by its number; it is pickled.
        config: How to write.
        digest: Digest of all that decides the dataset.
        classes: Names of the classes.
        passed_over: What lies in the source and is not taken.
        opening: Lines for the user, before anything is written.
        fault: What is wrong with samples that are left out, in words.
        part_bytes: Bytes that each part is made of, where time goes by bytes.
        retry_skipped: Write those shards again that left samples out, which may have been repaired.
        judge_late: Judge and list what was left out when all is written, by name; else as soon as
            it is too much, in the order of the shards.
        documents: What else lies beside the index, given all shards in their order. It may refuse
            them by an error.

    Raises:
        OccupiedPrefixError: The prefix holds something else.
        DataError: It cannot be looked into.
    """

    prefix: str
    parts: Sequence[Part[Any]]
    open_filler: Callable[[int], ShardFiller[Any]]
    config: WriteConfig
    digest: str
    classes: tuple[str, ...]
    passed_over: PassedOver = ()
    opening: tuple[str, ...] = ()
    fault: str = "images cannot be decoded"
    part_bytes: Sequence[int] | None = None
    retry_skipped: bool = True
    judge_late: bool = False
    documents: Callable[[Sequence[FinishedShard]], Documents] = lambda _: {}

    def __post_init__(self) -> None:
        is_complete(self.prefix, plan=self.digest)

    def carry_out(self, report: Callable[[str], None]) -> None:
        """Write what is not written yet.

        Args:
            report: Takes lines for the user.

        Raises:
            OccupiedPrefixError: The prefix holds something else.
            UnwritableTargetError: A local folder cannot be made or written, or the disk is full.
            BadDataError: Too many samples are damaged; what is finished is kept.
            EmptyDatasetError: All are.
            BrokenIngestError: A process died.
            StoreUnreachableError: The store refuses, or does not answer.
            DataError: What the fillers raise.
        """
        source = Source(self.prefix)
        target = source.folder
        if target is not None:
            work = target.with_name(f".{target.name}.building")
        else:
            # Named after what is written and where to, for uploaded shards are not kept here.
            place = hashlib.sha256(f"{self.digest} {source.prefix}".encode()).hexdigest()[:16]
            work = self.config.work_dir.expanduser() / place
        with lock(work.with_suffix(".lock")), explain_full_disk(work):
            # Another process may have been faster while this one waited.
            if is_complete(self.prefix, plan=self.digest):
                report("complete, nothing to do")
                return
            if target is not None:
                self._write(work, report=report, upload=None, is_uploaded=lambda _: False)
                work.replace(target)
                sync(target.parent)
                discard_records(target)
                return
            open_work_folder(work)
            upload = Upload(work, source.prefix)

            def is_uploaded(shard: Shard) -> bool:
                return source.has(shard.name, size_bytes=shard.size_bytes)

            for name in self._write(work, report=report, upload=upload, is_uploaded=is_uploaded):
                upload(name)
            upload(INDEX_NAME)
            shutil.rmtree(work)

    def _write(
        self,
        work: Path,
        *,
        report: Callable[[str], None],
        upload: Upload | None,
        is_uploaded: Callable[[Shard], bool],
    ) -> Sequence[str]:
        """Write everything into the work folder; return the names of the documents."""
        finished = []
        for shard in self._shards(work, report, is_uploaded):
            if upload and shard.entry:
                _upload_once(upload, work, shard.entry["raw_data"]["basename"])
            finished.append(shard)
        finished.sort(key=lambda shard: shard.number)
        contents = {ABOUT_NAME: asdict(self._about(finished)), **self.documents(finished)}
        entries = [shard.entry for shard in finished if shard.entry]
        if not entries:
            raise EmptyDatasetError("None of the images can be decoded.")
        index = index_of(entries)
        beside = {INDEX_SHA256: hashlib.sha256(index).hexdigest()}
        for name, content in contents.items():
            text = json.dumps(seal({**content, **beside}), indent=1)
            write_atomic(work / name, text.encode())
        write_atomic(work / INDEX_NAME, index)
        shards = {entry["raw_data"]["basename"] for entry in entries}
        check_finished(work, {*shards, *contents, INDEX_NAME})
        return list(contents)

    def _shards(
        self, work: Path, report: Callable[[str], None], is_uploaded: Callable[[Shard], bool]
    ) -> Iterator[FinishedShard]:
        for line in self.opening:
            report(line)
        finished = write_shards(
            self.parts,
            work,
            plan=self.digest,
            open_filler=self.open_filler,
            workers=self.config.workers,
            retry_skipped=self.retry_skipped,
            is_uploaded=is_uploaded,
        )
        skipped: list[tuple[str, str]] = []
        for shard in self._report_progress(finished, report):
            skipped += shard.filled.skipped
            if not self.judge_late:
                self._refuse_too_many(skipped)
            yield shard

    def _about(self, finished: Sequence[FinishedShard]) -> About:
        skipped = [sample for shard in finished for sample in shard.filled.skipped]
        if self.judge_late:
            skipped.sort()
            self._refuse_too_many(skipped)
        counts: Counter[int] = Counter()
        for shard in finished:
            counts.update(dict(shard.filled.labels))
        return About(
            plan=self.digest,
            classes=self.classes,
            images_per_class=tuple(counts[label] for label in range(len(self.classes))) or None,
            skipped=tuple(skipped),
            passed_over=self.passed_over,
        )

    def _refuse_too_many(self, skipped: Sequence[tuple[str, str]]) -> None:
        refuse_too_many(
            skipped,
            samples=self.parts[-1].first + len(self.parts[-1].samples),
            max_skipped_fraction=self.config.max_skipped_fraction,
            fault=self.fault,
        )

    def _report_progress(
        self, finished: Iterable[FinishedShard], report: Callable[[str], None]
    ) -> Iterator[FinishedShard]:
        """Pass finished shards on; every few seconds and at the end, say how far the ingest is."""
        images = [len(part.samples) for part in self.parts]
        work, unit, unit_size = images, "images", 1
        if self.part_bytes is not None:
            work, unit, unit_size = list(self.part_bytes), "MiB", 2**20
        taken = skipped = 0

        def line(pace: Pace) -> str:
            left = f", about {pace.left_s:,.0f} s left" if pace.rate else ""
            return (
                f"{taken:,} images ({pace.fraction:.0%}), {skipped:,} skipped, "
                f"{pace.rate / unit_size:,.1f} {unit}/s{left}"
            )

        with Progress(
            self.prefix,
            sum(work),
            report=report,
            line=line,
            figures=figures_in("bytes" if self.part_bytes is not None else "images"),
            every_s=_REPORT_EVERY_S,
        ) as progress:
            for shard in finished:
                yield shard
                taken += images[shard.number]
                skipped += len(shard.filled.skipped)
                # What an earlier start has written says nothing about the speed of this one.
                progress.add(work[shard.number], fresh=not shard.kept)


def carry_out(plans: Sequence[Plan], *, report: Callable[[str], None]) -> None:
    """Carry out plans one after the other, once all of them have been made; see `Plan`.

    Args:
        plans: All plans, so that each place has been looked at before the first takes hours.
        report: Takes lines for the user, each with the place that it tells of.
    """
    for plan in plans:
        prefix = visible(plan.prefix)
        plan.carry_out(lambda text: report(f"{prefix}: {text}"))  # noqa: B023


def _upload_once(upload: Upload, work: Path, name: str) -> None:
    """Upload a shard, unless an earlier start of this ingest did; its bytes are then freed."""
    shard = work / name
    if shard.exists():
        upload(name)
        shard.unlink(missing_ok=True)


def refuse_too_many(
    skipped: Sequence[tuple[str, str]],
    *,
    samples: int,
    max_skipped_fraction: float,
    fault: str = "images cannot be decoded",
) -> None:
    """Stop an ingest that leaves out too much.

    Args:
        skipped: Name and reason of each sample that is left out.
        samples: How many there are in all.
        max_skipped_fraction: Fraction of them that may be left out.
        fault: What is wrong with those, in words.

    Raises:
        BadDataError: There are more.
    """
    # As they are written: 0.29 of 100 are 29, not 28.99…
    if len(skipped) > Decimal(str(max_skipped_fraction)) * samples:
        name, reason = skipped[0]
        raise BadDataError(
            f"{len(skipped)} of {samples} {fault}, more than "
            f"max_skipped_fraction={max_skipped_fraction}; the first is {name} ({reason}). Remove "
            "or repair them, or raise --max-skipped-fraction."
        )
