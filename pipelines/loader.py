"""From a dataset and a place in the run to batches: read, decode, replace what is bad.

The loader has no state that a resumed run would miss (only the tally of bad images starts anew): a
batch depends on the dataset, the seed and the cursor alone, and comes with the cursor behind it.
All ranks walk through the same global batches, and rank r takes the r-th of W equal, contiguous
slices.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Self

import torch

from pipelines.batch import Batch, Cursor
from pipelines.dataset import RawSample, SampleDataset
from pipelines.decode import DecodeConfig, DecoderName, make_decoder
from pipelines.errors import (
    BadDataError,
    CorruptShardError,
    DataError,
    IndivisibleBatchError,
    LabelOutOfRangeError,
    MissingShardError,
    UndecodableImageError,
)
from pipelines.order import Order, SampleOrder
from pipelines.prefetch import Prefetched
from pipelines.sample_key import SampleKey

logger = logging.getLogger(__name__)

# A share of bad images means little for a handful of them: judge it over at least this many.
_JUDGED_IMAGES = 10_000
_REPLACEMENTS = 8


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are made.

    Attributes:
        decoder: "dali", or "pillow", the slow reference.
        prefetch_batches: Batches made ahead of the training loop.
        max_bad_share: Samples tolerated that cannot be decoded or whose shard is lost or damaged,
            as a share of those read by this rank since the loader started (or of 10 000 while it
            has read fewer). Others take their place. 0 tolerates none.
        shuffle_block_samples: Samples are shuffled within blocks of this length of the randomly
            ordered shards. Larger mixes better and needs more shards at a time.
    """

    decoder: DecoderName = "dali"
    prefetch_batches: int = 2
    max_bad_share: float = 0.001
    shuffle_block_samples: int = 16_384

    def __post_init__(self) -> None:
        if self.prefetch_batches < 1:
            raise DataError(f"prefetch_batches must be at least 1, got {self.prefetch_batches}.")
        if not 0 <= self.max_bad_share < 1:
            raise DataError(f"max_bad_share must be in [0, 1), got {self.max_bad_share}.")


class Loader:
    """Batches of Laplacian bands for one rank.

    Args:
        dataset: Where the images come from.
        config: How batches are made.
        decode: What images are made into.
        seed: Seed of the sample order and of the views, the same on all ranks.
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
        decode: DecodeConfig,
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
        self._threads: list[Prefetched[Any]] = []
        self._read_images = 0
        self._bad_images = 0
        self.data_wait_s = 0.0
        """Seconds that the consumer of batches has waited for them, in all."""

    def batches(self, start: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        """Read on from a cursor, for ever.

        Batches are made ahead in one thread, and shards are fetched ahead, by a block or two of
        the order, in another. Both end when the iterator is closed or `close` is called; a further
        call of `batches` closes the one before.

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
        made = Prefetched(self._make(start, fetched), depth=self._config.prefetch_batches)
        self._threads = [fetched, made]
        with closing(fetched), closing(made):
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

    def _make(self, start: Cursor, fetched: Iterator[int]) -> Iterator[tuple[Batch, Cursor]]:
        images = ready = start.images
        while True:
            while ready < images + self._batch_images:
                block_end = next(fetched, None)
                if block_end is None:
                    return
                ready = block_end
            batch = self._load(images + self._slice_start)
            images += self._batch_images
            yield batch, Cursor(images)

    def _load(self, start: int) -> Batch:
        turns = self._order.turns(start, self._slice_images)
        ids = turns.sample_ids.tolist()
        self._read_images += len(ids)
        chosen = dict(enumerate(ids))
        samples: dict[int, RawSample] = {}
        replaced: set[int] = set()
        for attempt in count():
            unusable = self._read(chosen, samples)
            if not unusable:
                keys = [
                    SampleKey(self._seed, epoch, chosen[place])
                    for place, epoch in enumerate(turns.epochs.tolist())
                ]
                try:
                    bands = self._decoder([samples[place].data for place in chosen], keys)
                    break
                except UndecodableImageError as error:
                    unusable = dict.fromkeys(error.indices, error.reason)
            for place, reason in unusable.items():
                self._count_bad(chosen[place], reason=reason, attempt=attempt)
                chosen[place] = self._order.stand_in(ids[place], attempt=attempt)
                samples.pop(place, None)
            replaced.update(unusable)
        ordered = [samples[place] for place in chosen]
        self._check_labels(ordered)
        return Batch(
            bands=bands,
            labels=torch.tensor([sample.label for sample in ordered]).to(self._device),
            sample_ids=torch.tensor([sample.sample_id for sample in ordered]),
            skipped=len(replaced),
        )

    def _read(self, chosen: Mapping[int, int], samples: dict[int, RawSample]) -> dict[int, str]:
        """Read what is not there yet; give the places whose shard is lost, and why."""
        lost: dict[int, str] = {}
        for place in chosen.keys() - samples.keys():
            try:
                samples[place] = self._dataset.read(chosen[place])
            except (MissingShardError, CorruptShardError) as error:
                lost[place] = str(error).split(". ")[0]
        return lost

    def _count_bad(self, sample_id: int, *, reason: str, attempt: int) -> None:
        shard = self._dataset.shard_of(sample_id)
        self._bad_images += 1
        logger.warning(
            "skipping sample %d in shard %s, which cannot be used (%s)", sample_id, shard, reason
        )
        allowed = self._config.max_bad_share * max(self._read_images, _JUDGED_IMAGES)
        if self._bad_images > allowed or attempt >= _REPLACEMENTS:
            raise BadDataError(
                f"{self._bad_images} of {self._read_images} samples read cannot be used, more than "
                f"max_bad_share={self._config.max_bad_share} allows. The last one is sample "
                f"{sample_id} in shard {shard} ({reason}); the log names the others. Check the "
                "dataset with python -m pipelines.ingest verify and write it again without them, "
                "or raise max_bad_share if you can do without that many."
            )

    def _check_labels(self, samples: Sequence[RawSample]) -> None:
        if self._classes is None:
            return
        for sample in samples:
            if not 0 <= sample.label < self._classes:
                raise LabelOutOfRangeError(
                    f"Sample {sample.sample_id} in shard {self._dataset.shard_of(sample.sample_id)}"
                    f" has the label {sample.label}, and the model has {self._classes} classes, 0 "
                    f"to {self._classes - 1}. Set the number of classes to that of the dataset."
                )
