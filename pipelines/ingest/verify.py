"""Reading a whole dataset once, to say what is in it and what is wrong with it."""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.console import visible
from pipelines.decode.make import DecoderName
from pipelines.errors import IngestSettingError
from pipelines.formats import format_bytes, format_count, format_table
from pipelines.index import Shard, parse_index
from pipelines.ingest.about import About, read_about
from pipelines.ingest.inspection import BadSample, Inspection, inspect
from pipelines.ingest.processes import spawn
from pipelines.ingest.source_files import PassedOver, in_words
from pipelines.progress import Progress, figures_in
from pipelines.shards import ShardsConfig
from pipelines.source import Source

_REPORT_EVERY_S = 5.0
_EXAMPLES = 10  # groups of duplicates that are named
_SHOWN = 20  # of each kind of finding; the JSON has them all
_BAR = 40


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Groups of samples with the same content.

    Attributes:
        groups: Contents that occur more than once.
        surplus: Samples that could be left out without losing any content.
        relabelled: Groups whose samples have different labels.
        examples: Sample ids of some groups, those with different labels first.
    """

    groups: int
    surplus: int
    relabelled: int
    examples: tuple[tuple[int, ...], ...]


def find_duplicates(
    digests: NDArray[np.uint8],
    *,
    sample_ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    examples: int,
) -> Duplicates:
    """Group samples by the digest of their content.

    Args:
        digests: uint8 [n, 16].
        sample_ids: int64 [n], rising.
        labels: int64 [n].
        examples: Groups to give the sample ids of.
    """
    if not len(digests):
        return Duplicates(groups=0, surplus=0, relabelled=0, examples=())
    words = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort(words.T)  # stable: equal digests stay in the order of their ids
    words, sample_ids, labels = words[order], sample_ids[order], labels[order]
    differs = np.any(words[1:] != words[:-1], axis=1)
    starts = np.concatenate([[0], np.flatnonzero(differs) + 1])
    sizes = np.diff(starts, append=len(words))
    mixed = np.minimum.reduceat(labels, starts) != np.maximum.reduceat(labels, starts)
    repeated = np.flatnonzero(sizes > 1)
    shown = repeated[np.lexsort((sample_ids[starts[repeated]], ~mixed[repeated]))][:examples]
    return Duplicates(
        groups=len(repeated),
        surplus=int((sizes[repeated] - 1).sum()),
        relabelled=int(mixed[repeated].sum()),
        examples=tuple(
            tuple(sample_ids[starts[group] :][: sizes[group]].tolist()) for group in shown
        ),
    )


@dataclass(frozen=True, kw_only=True)
class BadShard:
    """A shard that does not give all its samples.

    Attributes:
        name: The file.
        lost: Samples that could not be read.
        samples: Samples it should hold.
        problem: Why, of the first of them.
    """

    name: str
    lost: int
    samples: int
    problem: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a dataset holds, and what is wrong with it.

    Attributes:
        prefix: Where it is.
        digest: SHA-256 of the index.
        holds: "images" or "latents".
        shards: Files in the index.
        size_bytes: Their sizes together.
        samples: Samples in the index.
        classes: Names by label; None where the dataset does not tell.
        samples_per_class: By label, of the samples that could be read.
        sizes: Samples of each (width, height), when upright.
        kinds: Samples of each file format and colour mode.
        bad_shards: Shards that are missing or damaged.
        bad_samples: Samples whose content cannot be used.
        stray_labels: Sample id and label where there is no such class.
        miscounts: How the counts differ from what the dataset says of itself, in sentences.
        duplicates: Samples with the same bytes, by 128-bit BLAKE2b.
        duplicates_forbidden: Whether those are a fault.
        left_out: Images that were listed at ingest and not taken, for they could not be decoded.
        passed_over: What else the ingest did not take, and how often.
    """

    prefix: str
    digest: str
    holds: str
    shards: int
    size_bytes: int
    samples: int
    classes: tuple[str, ...] | None
    samples_per_class: Mapping[int, int]
    sizes: Mapping[tuple[int, int], int]
    kinds: Mapping[str, int]
    bad_shards: Sequence[BadShard]
    bad_samples: Sequence[BadSample]
    stray_labels: Sequence[tuple[int, int]]
    miscounts: Sequence[str]
    duplicates: Duplicates
    duplicates_forbidden: bool
    left_out: int
    passed_over: PassedOver

    @property
    def faults(self) -> Sequence[str]:
        """What is wrong, a phrase for each kind of fault."""
        lost = sum(shard.lost for shard in self.bad_shards)
        found = {
            f"{len(self.bad_shards):,} of {self.shards:,} shards are missing or damaged, with "
            f"{lost:,} samples": self.bad_shards,
            f"{len(self.bad_samples):,} {self.holds} cannot be used": self.bad_samples,
            f"{len(self.stray_labels):,} labels are of no class": self.stray_labels,
            "the counts are not those that the dataset tells of itself": self.miscounts,
            f"{self.duplicates.surplus:,} samples repeat others": (
                self.duplicates_forbidden and self.duplicates.groups
            ),
        }
        return [phrase for phrase, reason in found.items() if reason]

    def text(self) -> str:
        """Put everything into words."""
        return "\n".join([*_contents(self), *_classes(self), *_duplicates(self), *_faults(self)])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {
            "sizes": [[*size, count] for size, count in self.sizes.items()],
            "faults": self.faults,
        }


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """How a dataset is verified.

    Attributes:
        workers: Processes.
        forbid_duplicates: Whether samples with the same bytes are a fault.
        decoder: Decodes the images: the one that is to train on them.
        shards: Patience with the store.

    Raises:
        IngestSettingError: A number is out of its range.
    """

    workers: int = 1
    forbid_duplicates: bool = False
    decoder: DecoderName = "dali"
    shards: ShardsConfig = field(default_factory=ShardsConfig)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise IngestSettingError(f"workers={self.workers} must be at least 1.")


def verify(
    prefix: str,
    *,
    config: VerifyConfig | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Report:
    """Read every sample of a dataset.

    Args:
        prefix: Local folder or URL of one split.
        config: How.
        report: Takes lines on the progress for the user.

    Raises:
        MissingDatasetError: There is no index.json.
        InvalidIndexError: It is damaged, hostile or of another kind.
        EmptyDatasetError: It lists no samples.
        InvalidAboutError: ingest.json is of another kind.
        StoreUnreachableError: The store refuses, or does not answer.
        BrokenIngestError: A process died.
    """
    config = config or VerifyConfig()
    source = Source(prefix, config=config.shards)
    index = source.read_index()
    shards = parse_index(index, prefix=source.prefix)
    about = read_about(prefix, config=config.shards)
    found: list[Inspection | None] = [None] * len(shards)
    with Progress(
        prefix,
        sum(shard.size_bytes for shard in shards),
        report=report,
        line=lambda pace: f"{pace.fraction:.0%} read, about {pace.left_s:.0f} s left",
        figures=figures_in("bytes"),
        every_s=_REPORT_EVERY_S,
        last=False,
    ) as progress:
        for number, inspection in _inspections(source.prefix, shards, config):
            found[number] = inspection
            progress.add(shards[number].size_bytes)
    return _make_report(
        source.prefix,
        hashlib.sha256(index).hexdigest(),
        shards,
        [inspection for inspection in found if inspection],
        about=about,
        forbid_duplicates=config.forbid_duplicates,
    )


def _inspections(
    prefix: str, shards: Sequence[Shard], config: VerifyConfig
) -> Iterator[tuple[int, Inspection]]:
    """Inspect all shards; give the number of each with what was found, as they are done."""
    ends = accumulate(shard.samples for shard in shards)
    samples = [range(end - shard.samples, end) for shard, end in zip(shards, ends, strict=True)]
    workers = min(config.workers, len(shards))
    with tempfile.TemporaryDirectory(prefix="lapflow-verify-") as folder:
        look = partial(
            inspect, prefix, scratch=Path(folder), config=config.shards, decoder=config.decoder
        )
        if workers == 1:
            yield from enumerate(map(look, samples))
            return
        with spawn(workers) as pool:
            running = {pool.submit(look, ids): number for number, ids in enumerate(samples)}
            for future in as_completed(running):
                # Taken out, so that what it found is not held twice.
                yield running.pop(future), future.result()


def _make_report(
    prefix: str,
    digest: str,
    shards: Sequence[Shard],
    found: Sequence[Inspection],
    *,
    about: About | None,
    forbid_duplicates: bool,
) -> Report:
    samples = sum(shard.samples for shard in shards)
    labels = np.concatenate([shard.labels for shard in found])
    sample_ids = np.concatenate([shard.sample_ids for shard in found])
    counts = dict(zip(*(part.tolist() for part in np.unique_counts(labels)), strict=True))
    classes = about.classes if about else None
    stray = (labels < 0) | (labels >= len(classes) if classes else False)
    sizes: Counter[tuple[int, int]] = Counter()
    kinds: Counter[str] = Counter()
    for inspection in found:
        sizes.update(inspection.sizes)
        kinds.update(inspection.kinds)
    return Report(
        prefix=prefix,
        digest=digest,
        holds="latents" if shards[0].latents else "images",
        shards=len(shards),
        size_bytes=sum(shard.size_bytes for shard in shards),
        samples=samples,
        classes=classes,
        samples_per_class=counts,
        sizes=dict(sizes.most_common()),
        kinds=dict(kinds.most_common()),
        bad_shards=[
            BadShard(
                name=inspection.shard,
                lost=inspection.lost,
                samples=shard.samples,
                problem=inspection.problem,
            )
            for shard, inspection in zip(shards, found, strict=True)
            if inspection.lost
        ],
        bad_samples=[bad for inspection in found for bad in inspection.bad_samples],
        stray_labels=list(zip(sample_ids[stray].tolist(), labels[stray].tolist(), strict=True)),
        miscounts=_miscounts(about, counts, complete=len(labels) == samples),
        duplicates=find_duplicates(
            np.concatenate([shard.digests for shard in found]),
            sample_ids=sample_ids,
            labels=labels,
            examples=_EXAMPLES,
        ),
        duplicates_forbidden=forbid_duplicates,
        left_out=len(about.skipped) if about else 0,
        passed_over=about.passed_over if about else (),
    )


def _miscounts(about: About | None, counts: Mapping[int, int], *, complete: bool) -> list[str]:
    """Compare the classes with what the dataset says of itself.

    Args:
        about: What that is.
        counts: Samples that could be read, by label.
        complete: Whether those are all; else a class may have fewer.
    """
    if about is None or about.images_per_class is None:
        return []
    return [
        f"class {label} {name}: {counts.get(label, 0):,} instead of {told:,}"
        for label, (name, told) in enumerate(
            zip(about.classes, about.images_per_class, strict=True)
        )
        if counts.get(label, 0) > told or (complete and counts.get(label, 0) < told)
    ]


def _contents(report: Report) -> Iterator[str]:
    yield report.prefix
    yield (
        f"  {report.samples:,} {report.holds} in {format_count(report.shards, 'shard')} of "
        f"{format_bytes(report.size_bytes)} together"
    )
    yield f"  index sha256 {report.digest}"
    if report.kinds:
        yield "  " + ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.items())
    if report.sizes:
        (first, count), *others = report.sizes.items()
        widths, heights = zip(*report.sizes, strict=True)
        more = (
            f", {format_count(len(others), 'other size')}; width {min(widths):,} to "
            f"{max(widths):,}, height {min(heights):,} to {max(heights):,}"
        )
        yield f"  {count:,} of {first[0]} x {first[1]}{more if others else ''}"
    if report.left_out:
        yield f"  left out at ingest: {report.left_out:,} {report.holds} (named in ingest.json)"
    if report.passed_over:
        yield f"  passed over at ingest: {in_words(report.passed_over)}"


def _classes(report: Report) -> Iterator[str]:
    counts = Counter(report.samples_per_class)
    labels = range(len(report.classes)) if report.classes else sorted(counts)
    if not labels:
        return
    fewest, most = min(counts[label] for label in labels), max(counts[label] for label in labels)
    each = format_count(most, report.holds.removesuffix("s"))
    if fewest < most:
        each = f"{fewest:,} to {each}"
    yield f"{format_count(len(labels), 'class', 'classes')}, {each} each"
    ranked = sorted(labels, key=lambda label: (counts[label], label))
    if len(labels) <= _SHOWN:
        bars = {label: "#" * round(_BAR * counts[label] / max(most, 1)) for label in labels}
        yield format_table(
            [(f"  {_class(report, each)}", f"{counts[each]:,}", bars[each]) for each in labels],
            align="<>",
        )
    elif fewest < most:
        for word, chosen in (("fewest", ranked[:3]), ("most", ranked[:-4:-1])):
            told = (f"{_class(report, label)} {counts[label]:,}" for label in chosen)
            yield f"  {word}: {', '.join(told)}"


def _class(report: Report, label: int) -> str:
    return f"{label} {report.classes[label]}" if report.classes else f"{label}"


def _duplicates(report: Report) -> Iterator[str]:
    found = report.duplicates
    if not found.groups:
        yield f"no two {report.holds} with the same bytes"
        return
    yield (
        f"{found.surplus:,} {report.holds} repeat the bytes of others, in "
        f"{format_count(found.groups, 'group')}, {found.relabelled:,} of them with different labels"
    )
    for number, group in enumerate(found.examples):
        ids = ", ".join(map(str, group[:_SHOWN])) + (", ..." if len(group) > _SHOWN else "")
        yield f"  samples {ids}{' (different labels)' if number < found.relabelled else ''}"
    if found.groups > len(found.examples):
        yield f"  and {format_count(found.groups - len(found.examples), 'more group')}"


def _faults(report: Report) -> Iterator[str]:
    if report.bad_shards:
        yield "shards that are missing or damaged"
        yield from _first(
            f"{visible(shard.name)}: {shard.lost:,} of {shard.samples:,} samples lost: "
            f"{visible(_first_sentence(shard.problem))}"
            for shard in report.bad_shards
        )
    if report.bad_samples:
        yield f"{report.holds} that cannot be used"
        yield from _first(
            f"sample {bad.sample_id} in {visible(bad.shard)}: {visible(bad.problem)}"
            for bad in report.bad_samples
        )
    if report.stray_labels:
        yield "labels of no class"
        yield from _first(f"sample {place}: label {label}" for place, label in report.stray_labels)
    if report.miscounts:
        yield "counts that differ from what the dataset says of itself"
        yield from _first(report.miscounts)
    yield f"BAD: {'; '.join(report.faults)}" if report.faults else "FINE: all as it should be"


def _first(lines: Iterable[str]) -> Iterator[str]:
    every = list(lines)
    yield from (f"  {line}" for line in every[:_SHOWN])
    if len(every) > _SHOWN:
        yield f"  and {len(every) - _SHOWN:,} more"


def _first_sentence(text: str) -> str:
    return re.split(r"\. (?=[A-Z])", text, maxsplit=1)[0].rstrip(".")
