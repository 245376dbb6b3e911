"""A set of samples at a place: planned, drawn in parts by many workers, and made whole.

What decides the images is the plan, whose document lies at the place from the first moment on. A
part is there once its record is, which is written after its files; so a set that was interrupted
goes on with the parts that are missing, and who draws them makes no difference.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pipelines.documents import DocumentError, parse_json, seal, validate_as
from trainer.config.reading import ConfigError
from trainer.evaluation.config import FormatName, Precision
from trainer.evaluation.sample_formats import FORMATS, PARTS, DrawnPart, KeptPart, SampleFormat
from trainer.storage.errors import MissingObject
from trainer.storage.kept import read_or_set_aside, read_sealed
from trainer.storage.store import Store, in_threads

logger = logging.getLogger(__name__)

_PLAN = "plan.json"
_WHOLE = "samples.json"

_MOST_PARTS = 256
_PART_BYTES = 2**28


def part_size(samples: int, *, batch: int, sample_bytes: int) -> int:
    """Choose how many samples a part has, whole batches of them.

    Many workers need many parts, and few parts are few files; one has to fit into memory twice.

    Args:
        samples: How many there are in all.
        batch: Samples in a network call.
        sample_bytes: Bytes of the pixels of one.
    """
    batches = -(-samples // batch)
    fitting = _PART_BYTES // (batch * sample_bytes)
    return batch * max(1, min(-(-batches // _MOST_PARTS), fitting))


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """Everything that decides the files of a set but the kind of processor.

    Attributes:
        run: Name of the run.
        images: Images that the weights were trained on.
        attempt: The checkpoint's own random name.
        weights: Which weights of it.
        sampler: Solver, steps and guidance.
        seed: Seed of the noise; sample i has the i-th noise of it.
        batch: Samples in one network call.
        classes: Sample i has the class at place i, going round; where samples share a layout,
            layout i has it.
        samples: How many there are.
        part_samples: Samples of a part; the last one may have fewer.
        format: How they are kept.
        precision: What the model computes in; older versions drew in fp32.
        share_coarse: So many samples, one after the other, are variations of one layout and have
            one class.
    """

    run: str
    images: int
    attempt: str
    weights: str
    sampler: dict[str, Any]
    seed: int
    batch: int
    classes: tuple[int, ...]
    samples: int
    part_samples: int
    format: FormatName
    precision: Precision = "fp32"
    share_coarse: int = 1

    @property
    def digest(self) -> str:
        """SHA-256 of the plan."""
        values = asdict(self)
        # Parts of before there was a choice are the same samples.
        for name, value in (("precision", "fp32"), ("share_coarse", 1)):
            if values[name] == value:
                del values[name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.samples // self.part_samples)

    def indices(self, part: int) -> range:
        """Return the indices of the samples of a part."""
        first = part * self.part_samples
        return range(first, min(first + self.part_samples, self.samples))

    def labels(self, indices: range) -> Tensor:
        """Return the classes of samples, shape [n]."""
        layouts = torch.arange(indices.start, indices.stop) // self.share_coarse
        return torch.tensor(self.classes)[layouts % len(self.classes)]


@dataclass(frozen=True, kw_only=True)
class WholeSet:
    """What is told of a set once it is whole.

    Attributes:
        plan: The plan, as plain values.
        segment_evaluations: Network evaluations per sample in each segment, from noise to data; a
            guided pair counts as two.
    """

    plan: dict[str, Any]
    segment_evaluations: tuple[float, ...]


class SampleSet:
    """Samples at a place; several processes may have it open.

    Args:
        store: The place, which is for this set alone.
        plan: What is to be there.
    """

    def __init__(self, store: Store, plan: SamplePlan) -> None:
        self._store = store
        self._plan = plan
        self._format: SampleFormat = FORMATS[plan.format]

    def claim(self) -> None:
        """Write the plan, unless it is there already.

        Raises:
            ConfigError: The place holds another set, or something else.
            StoreError: It cannot be written.
        """
        try:
            held = validate_as(SamplePlan, read_sealed(self._store, _PLAN))
        except MissingObject:
            if other := next(iter(self._store.list("")), None):
                raise ConfigError(
                    f"the output holds other files, such as {self._store.uri(other)}; choose a "
                    "new place for the samples"
                ) from None
            if self._store.create(_PLAN, _sealed(self._plan)):
                return
            held = validate_as(SamplePlan, read_sealed(self._store, _PLAN))
        except DocumentError as error:
            raise ConfigError(
                f"{self._store.uri(_PLAN)} cannot be believed: {error}; remove the samples there, "
                "or choose another output"
            ) from error
        if held != self._plan:
            raise ConfigError(
                f"the output holds other samples, {self._store.uri(_PLAN)} says: "
                f"{_differences(held, self._plan)}; give the same settings to go on with them, or "
                "another output"
            )

    def whole(self) -> WholeSet | None:
        """Return what is told of the set if all of it is there."""
        whole = read_or_set_aside(self._store, _WHOLE, WholeSet)
        if whole is None or whole.plan != _plain(self._plan):
            return None
        self._tidy()  # an earlier start may have been killed before it did
        return whole

    def kept(self) -> list[KeptPart]:
        """Return the records of the parts that are there, with all their files, in their order."""
        sizes = self._store.list("")
        found = []
        for number in range(self._plan.parts):
            key = _record_key(number)
            part = read_or_set_aside(self._store, key, KeptPart) if key in sizes else None
            if part is not None and self._is_there(part, number, sizes):
                found.append(part)
        return found

    def _is_there(self, part: KeptPart, number: int, sizes: Mapping[str, int]) -> bool:
        if (part.plan, part.number) != (self._plan.digest, number):
            return False
        lost = [key for key, size in part.files.items() if sizes.get(key) != size]
        if lost:
            uri = self._store.uri(lost[0])
            logger.warning("drawing a part again, since %s is gone or was cut", uri)
        return not lost

    def put(self, part: DrawnPart, *, nfe: Sequence[float]) -> None:
        """Keep a part.

        Args:
            part: The samples.
            nfe: Network evaluations in each segment, summed over them.

        Raises:
            StoreError: It cannot be written; nothing of it counts.
        """
        packed = self._format.pack(part)
        in_threads(self._store.put, packed.files.items())
        record = KeptPart(
            plan=self._plan.digest,
            number=part.number,
            samples=len(part.pixels),
            nfe=tuple(nfe),
            files={key: len(data) for key, data in packed.files.items()},
            entry=packed.entry,
        )
        self._store.put(_record_key(part.number), _sealed(record))

    def finish(self, parts: Sequence[KeptPart]) -> WholeSet:
        """Make the set whole, of the records of all parts, and remove what is needed no more.

        Raises:
            StoreError: It cannot be written; all parts stay.
        """
        labels = self._plan.labels(range(self._plan.samples)).numpy()
        self._format.finish(self._store, parts, labels)
        sums = [sum(each) for each in zip(*(part.nfe for part in parts), strict=True)]
        whole = WholeSet(
            plan=_plain(self._plan),
            segment_evaluations=tuple(each / self._plan.samples for each in sums),
        )
        self._store.put(_WHOLE, _sealed(whole))
        self._tidy()
        return whole

    def _tidy(self) -> None:
        """Remove parts of a whole set, and what writers left that were killed."""
        if left := self._store.list(PARTS):
            self._store.delete_all(left)
            self._store.abort_unfinished("", lambda _key: True)


def _record_key(number: int) -> str:
    return f"{PARTS}{number:05d}.json"


def _sealed(document: SamplePlan | KeptPart | WholeSet) -> bytes:
    return json.dumps(seal(asdict(document)), indent=1).encode()


def _plain(plan: SamplePlan) -> dict[str, Any]:
    """Return the plan as JSON gives it back."""
    values: dict[str, Any] = parse_json(json.dumps(asdict(plan)).encode())
    return values


def _differences(held: SamplePlan, wanted: SamplePlan) -> str:
    """Say in which settings two plans differ."""
    pairs = {
        each.name: (getattr(held, each.name), getattr(wanted, each.name)) for each in fields(held)
    }
    for name, value in pairs.pop("sampler")[0].items():
        pairs[f"sampler.{name}"] = (value, wanted.sampler.get(name))
    told = [
        f"{name} is {_short(a)} there and {_short(b)} here"
        for name, (a, b) in pairs.items()
        if a != b
    ]
    return ", ".join(told)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
