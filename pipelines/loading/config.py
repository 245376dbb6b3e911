"""How batches are made; `pipelines.loading.loader` makes them."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from pipelines.decode.contract import decode_threads
from pipelines.decode.make import DecoderName
from pipelines.domains import Checked


@dataclass(frozen=True, kw_only=True)
class LoaderConfig(Checked):
    """How batches are made.

    Attributes:
        decoder: "dali", or "pillow", the slow reference.
        prefetch_batches: Batches made ahead of the training loop.
        decode_threads: Threads that decode in each rank; None shares the machine's cores among its
            ranks, up to 8 for each. They change no bit.
        max_bad_fraction: Samples tolerated that cannot be decoded or whose shard is lost or
            damaged, as a fraction of those read by this rank since the loader started (or of 10 000
            while it has read fewer). Others take their place. 0 tolerates none.
        shuffle_block_samples: Samples are shuffled within blocks of this length of the randomly
            ordered shards; None is as many as eight shards hold. Larger mixes better, needs more
            shards at a time (see shards.open_files), and more of them before the first batch.
    """

    decoder: DecoderName = "dali"
    prefetch_batches: Annotated[int, Field(ge=1)] = 2
    decode_threads: Annotated[int, Field(ge=1)] | None = None
    max_bad_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.001
    shuffle_block_samples: Annotated[int, Field(ge=1)] | None = None

    def threads_for(self, ranks: int) -> int:
        """Choose the threads that decode in each of so many ranks of a machine."""
        return decode_threads(ranks) if self.decode_threads is None else self.decode_threads
