"""The samples that could not be used, and when there are too many of them."""

import logging
from decimal import Decimal
from threading import Lock

from pipelines.dataset import SampleDataset
from pipelines.errors import BadDataError

logger = logging.getLogger(__name__)

# A share of bad samples means little for a handful of them: judge it over at least this many.
_JUDGED_SAMPLES = 10_000
_REPLACEMENTS = 8


class BadSamples:
    """Counts the unusable samples among those read by one rank, from several threads.

    Args:
        dataset: Names the shards.
        max_fraction: Fraction of the samples that is tolerated.
    """

    def __init__(self, dataset: SampleDataset, *, max_fraction: float) -> None:
        self._dataset = dataset
        self._max_fraction = max_fraction
        self._lock = Lock()
        self._read = 0
        self._bad = 0

    def count_read(self, samples: int) -> None:
        """Note that so many samples are being read."""
        with self._lock:
            self._read += samples

    def tolerate(self, sample_id: int, *, reason: str, attempt: int) -> None:
        """Note and log that a sample cannot be used.

        Args:
            sample_id: The sample.
            reason: What is wrong with it.
            attempt: How many samples before it were unusable in the same place of the order.

        Raises:
            BadDataError: There are more than are tolerated.
        """
        shard = self._dataset.shard_of(sample_id)
        with self._lock:
            self._bad += 1
            bad, read = self._bad, self._read
        logger.warning(
            "skipping sample %d in shard %s, which cannot be used (%s)", sample_id, shard, reason
        )
        # As a decimal, the way it was written: 0.0006 of 10 000 are 6, and in floats a little less.
        allowed = Decimal(str(self._max_fraction)) * max(read, _JUDGED_SAMPLES)
        if bad > allowed or attempt >= _REPLACEMENTS:
            raise BadDataError(
                f"{bad} of {read} samples read cannot be used, more than "
                f"max_bad_fraction={self._max_fraction} allows. The last one is sample {sample_id} "
                f"in shard {shard} ({reason}); the log names the others. Check the dataset with "
                "python -m pipelines.ingest verify and write it again without them, or raise "
                "max_bad_fraction if you can do without that many."
            )
