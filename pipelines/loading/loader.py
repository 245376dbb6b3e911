"""From a dataset and a place in the run to batches: read, decode, replace what is bad.

The loader has no state that a resumed run would miss (only the tally of bad images starts anew): a
batch depends on the dataset, the seed and the cursor alone, and comes with the cursor behind it.
All ranks walk through the same global batches, and rank r takes the r-th of W equal, contiguous
slices.
"""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from pipelines.augment import SampleKey
from pipelines.dataset import RawSample, SampleDataset
from pipelines.decode.contract import Bands, DecodeConfig, LatentDecodeConfig
from pipelines.decode.make import make_decoder
from pipelines.errors import (
    BadSampleError,
    CorruptShardError,
    DataError,
    IndivisibleBatchError,
    LabelOutOfRangeError,
    MissingShardError,
    UndecodableImageError,
)
from pipelines.loading.bad_samples import BadSamples
from pipelines.loading.config import LoaderConfig
from pipelines.order import Order, SampleOrder

Item = TypeVar("Item")

_POLL_S = 0.1
_JOIN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's slice of a global batch.

    Attributes:
        bands: Laplacian bands of the images, coarse to fine, each float32 [b, c, h, w]; their
            merged image lies in [-1, 1].
        labels: int64 [b], on the device of the bands.
        sample_ids: int64 [b], in host memory: which sample of the dataset each image is.
        skipped: How many undecodable images were replaced in this slice.
    """

    bands: Bands
    labels: Tensor
    sample_ids: Tensor
    skipped: int


@dataclass(frozen=True)
class Cursor:
    """A place in the run's stream of images: all that is needed to go on reading from there.

    Attributes:
        images: Images handed out so far, over all ranks.
    """

    images: int = 0

    def __post_init__(self) -> None:
        if self.images < 0:
            raise ValueError(f"A cursor counts images from 0, got {self.images}.")


@dataclass(frozen=True)
class _End:
    """The source is exhausted, or raised."""

    error: BaseException | None


class Prefetched(Iterator[Item], Generic[Item]):
    """The items of an iterable, made by a thread that stays up to `depth` of them ahead.

    An error in the source is raised where the item would have come, after those made before it.

    Args:
        source: What to run; it is only ever used by the thread.
        depth: Items that wait at most.
    """

    def __init__(self, source: Iterable[Item], *, depth: int) -> None:
        self._source = source
        self._queue: queue.Queue[Item | _End] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        while not self._stopping.is_set():
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if not isinstance(item, _End):
                return item
            self.close()
            if item.error is not None:
                raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; at most 10 s if it is amid a download."""
        self._stopping.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=_JOIN_S)

    def _fill(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._source:
                if not self._put(item):
                    return
        except BaseException as raised:
            error = raised
        self._put(_End(error))

    def _put(self, item: Item | _End) -> bool:
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False


@dataclass(frozen=True, slots=True)
class _Slot:
    """One place in a batch: whose turn it is, and the sample that fills it."""

    sample_id: int
    epoch: int
    attempt: int  # 0 for the sample itself, n for its n-th replacement
    chosen: int
    label: int
    prepared: Any


class Loader:
    """Batches of Laplacian bands for one rank.

    Args:
        dataset: Where the images come from.
        config: How batches are made.
        decode: What images, or latents, are made into.
        seed: Seed of the sample order and of the crops, the same on all ranks.
        order: Which sample comes when; None takes each once per epoch.
        batch_images: Size of the global batch.
        rank: This process's number among all.
        world_size: How many there are.
        device: Where bands and labels go, "cpu" or "cuda:N".
        classes: If given, labels are checked to lie in [0, classes).

    Raises:
        IndivisibleBatchError: world_size does not divide batch_images.
        EmptyDatasetError: There is nothing to read.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        *,
        config: LoaderConfig,
        decode: DecodeConfig | LatentDecodeConfig,
        seed: int,
        order: Order | None = None,
        batch_images: int,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
        classes: int | None = None,
    ) -> None:
        if batch_images < 1 or batch_images % world_size:
            raise IndivisibleBatchError(
                f"A global batch of {batch_images} images cannot be shared equally by {world_size} "
                f"ranks. Choose a multiple of {world_size}, for example "
                f"{-(-max(batch_images, 1) // world_size) * world_size}."
            )
        if not 0 <= rank < world_size:
            raise DataError(f"Ranks count from 0 to {world_size - 1}, got {rank}.")
        self._dataset = dataset
        self._config = config
        self._order = order or SampleOrder(
            dataset.shard_sizes, seed=seed, block_samples=config.shuffle_block_samples
        )
        self._decoder = make_decoder(config.decoder, decode, device=device)
        self._seed = seed
        self._batch_images = batch_images
        self._slice_images = batch_images // world_size
        self._slice_start = rank * self._slice_images
        self._device = device
        self._classes = classes
        self._bad = BadSamples(dataset, max_fraction=config.max_bad_fraction)
        self._threads: list[Prefetched[Any]] = []
        self.data_wait_s = 0.0
        """Seconds that the consumer of batches has waited for them, in all."""

    def batches(self, start: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        """Read on from a cursor, for ever.

        Shards are fetched ahead, by a block or two of the order, in one thread; samples are read
        and prepared in a second one; and batches are decoded in a third. All end when the iterator
        is closed or `close` is called; a further call of `batches` closes the one before.

        Args:
            start: Where to start. Any count of images will do.

        Yields:
            This rank's slice of each global batch, and the cursor behind that batch.

        Raises:
            BadDataError: More samples than allowed cannot be used.
            DataError: Another problem with the dataset, see `pipelines.errors`.
        """
        self.close()
        fetched = Prefetched(self._fetch(start), depth=1)
        prepared = Prefetched(self._prepare(start, fetched), depth=1)
        made = Prefetched(self._decode(start, prepared), depth=self._config.prefetch_batches)
        self._threads = [fetched, prepared, made]
        # Left from right to left: who fetches is stopped first, or others would wait for it.
        with closing(made), closing(prepared), closing(fetched):
            while True:
                asked_s = time.perf_counter()
                item = next(made, None)
                self.data_wait_s += time.perf_counter() - asked_s
                if item is None:
                    return
                yield item

    def close(self) -> None:
        """End the threads, if there are any."""
        for thread in self._threads:
            thread.close()
        self._threads = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _fetch(self, start: Cursor) -> Iterator[int]:
        """Prepare one block of the order after the other, giving the position where each ends."""
        for end, ids in self._order.blocks(start.images):
            self._dataset.prepare(ids)
            yield end

    def _prepare(self, start: Cursor, fetched: Iterator[int]) -> Iterator[list[_Slot]]:
        """Read this rank's slice of each global batch, and do what the host does of decoding."""
        images = ready = start.images
        while True:
            while ready < images + self._batch_images:
                block_end = next(fetched, None)
                if block_end is None:
                    return
                ready = block_end
            turns = self._order.turns(images + self._slice_start, self._slice_images)
            self._bad.count_read(self._slice_images)
            yield [
                self._take(sample_id, epoch=epoch, attempt=0)
                for sample_id, epoch in zip(
                    turns.sample_ids.tolist(), turns.epochs.tolist(), strict=True
                )
            ]
            images += self._batch_images

    def _take(self, sample_id: int, *, epoch: int, attempt: int) -> _Slot:
        """Read and prepare a sample, or the first usable one of its replacements.

        Args:
            sample_id: Whose turn it is.
            epoch: How often it was seen before.
            attempt: How many were found to be unusable, itself included.
        """
        while True:
            chosen = sample_id
            if attempt:
                chosen = self._order.replacement(sample_id, attempt=attempt - 1)
            try:
                sample = self._dataset.read(chosen)
                self._check_label(sample)
                key = SampleKey(self._seed, epoch, chosen)
                prepared = self._decoder.prepare(sample.data, key)
                return _Slot(sample_id, epoch, attempt, chosen, sample.label, prepared)
            except (MissingShardError, CorruptShardError, BadSampleError) as error:
                reason = str(error).split(". ")[0]
                self._bad.tolerate(chosen, reason=reason, attempt=attempt)
                attempt += 1

    def _decode(
        self, start: Cursor, prepared: Iterator[list[_Slot]]
    ) -> Iterator[tuple[Batch, Cursor]]:
        images = start.images
        for turns in prepared:
            images += self._batch_images
            yield self._batch(turns), Cursor(images)

    def _batch(self, turns: list[_Slot]) -> Batch:
        while True:
            try:
                bands = self._decoder.decode([turn.prepared for turn in turns])
                break
            except UndecodableImageError as error:
                for place in error.indices:
                    bad = turns[place]
                    self._bad.tolerate(bad.chosen, reason=error.reason, attempt=bad.attempt)
                    turns[place] = self._take(
                        bad.sample_id, epoch=bad.epoch, attempt=bad.attempt + 1
                    )
        return Batch(
            bands=bands,
            labels=self._on_device(torch.tensor([turn.label for turn in turns])),
            sample_ids=torch.tensor([turn.chosen for turn in turns]),
            skipped=sum(turn.attempt > 0 for turn in turns),
        )

    def _on_device(self, labels: Tensor) -> Tensor:
        if self._device == "cpu":
            return labels
        # From pageable memory the copy would wait for all that the training loop has queued.
        return labels.pin_memory().to(self._device, non_blocking=True)

    def _check_label(self, sample: RawSample) -> None:
        if self._classes is None or 0 <= sample.label < self._classes:
            return
        raise LabelOutOfRangeError(
            f"Sample {sample.sample_id} in shard {self._dataset.shard_of(sample.sample_id)} has "
            f"the label {sample.label}, and the model has {self._classes} classes, 0 to "
            f"{self._classes - 1}. Set the number of classes to that of the dataset."
        )
