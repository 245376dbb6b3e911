"""What a verification found, in words and as JSON."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.console import visible
from pipelines.formats import format_bytes, format_count, format_table
from pipelines.ingest.inspection import BadSample
from pipelines.ingest.source_files import PassedOver, in_words

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

    def as_json(self) -> str:
        """Write everything down for machines."""
        values = asdict(self) | {
            "sizes": [[*size, count] for size, count in self.sizes.items()],
            "faults": self.faults,
        }
        return json.dumps(values, indent=1)


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
