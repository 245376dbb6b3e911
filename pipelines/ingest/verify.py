"""Reading a whole dataset once, to say what is in it and what is wrong with it."""

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from pipelines.decode.make import DecoderName
from pipelines.errors import IngestSettingError
from pipelines.index import Shard, parse_index
from pipelines.ingest.about import About, read_about
from pipelines.ingest.inspection import Inspection, inspect
from pipelines.ingest.processes import spawn
from pipelines.ingest.report import BadShard, Report, find_duplicates
from pipelines.shards import ShardsConfig
from pipelines.source import Source

_REPORT_EVERY_S = 5.0
_EXAMPLES = 10  # groups of duplicates that are named


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
    done_bytes, total_bytes = 0, sum(shard.size_bytes for shard in shards)
    began = reported = time.monotonic()
    for number, inspection in _inspections(source.prefix, shards, config):
        found[number] = inspection
        done_bytes += shards[number].size_bytes
        now = time.monotonic()
        if now - reported >= _REPORT_EVERY_S and done_bytes < total_bytes:
            reported = now
            left_s = (total_bytes - done_bytes) * (now - began) / done_bytes
            report(f"{done_bytes / total_bytes:.0%} read, about {left_s:.0f} s left")
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
