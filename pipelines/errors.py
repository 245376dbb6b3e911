"""What can be wrong with a dataset, one exception for each cause.

Every message is one paragraph that names the value at fault and the way out, because it is usually
read at the end of a long log.
"""

from collections.abc import Sequence


class BadSampleError(Exception):
    """One sample cannot be used; caught where another one can take its place."""


class DataError(ValueError):
    """The dataset, or the way it is asked for, is at fault."""


class MissingDatasetError(DataError):
    """There is no dataset at the prefix: it holds no index.json."""


class EmptyDatasetError(DataError):
    """The dataset is well formed and holds no images."""


class InvalidIndexError(DataError):
    """index.json is damaged, hostile or of a kind that is not read here."""


class UnreadableSourceError(DataError):
    """The images to be ingested are missing, damaged, or lie in a way that is not understood."""


class OversizedDocumentError(DataError):
    """A file that describes the dataset is far too large to be one."""


class UnreadableDocumentError(DataError):
    """What lies in the place of a file that describes the dataset cannot be read."""


class MissingLatentRecordError(DataError):
    """Latents do not say what they were made with: there is no latents.json."""


class InvalidLatentRecordError(DataError):
    """latents.json is damaged, hostile or of a kind that is not read here."""


class MissingShardError(DataError):
    """A shard that index.json lists is not in the store."""


class CorruptShardError(DataError):
    """A shard does not hold what index.json says, also after a second download."""


class PassingFaultError(DataError):
    """Something around the dataset is at fault that may be well again later, if it ever was."""


class StoreUnreachableError(PassingFaultError):
    """The store refused, or did not answer for as long as one waits for it."""


class CacheUnusableError(PassingFaultError):
    """The node-local cache folder cannot be written."""


class OccupiedPrefixError(DataError):
    """Writing would replace another dataset."""


class UnwritableTargetError(DataError):
    """The place where a dataset is wanted cannot be written."""


class IngestSettingError(DataError):
    """A setting of an ingest is out of its range, or does not go with another one."""


class UndecodableImageError(DataError):
    """Some images of a batch cannot be decoded.

    Attributes:
        indices: Their places in the batch.
        reason: What is wrong with the first of them.
    """

    def __init__(self, indices: Sequence[int], reason: str) -> None:
        super().__init__(
            f"Images {list(indices)} of the batch cannot be decoded ({reason}). Rewrite them as "
            "whole JPEG or PNG files, or leave them out of the dataset."
        )
        self.indices = tuple(indices)
        self.reason = reason


class BrokenIngestError(DataError):
    """A process that was writing shards died."""


class BadLatentError(DataError):
    """The latent of an image holds numbers that cannot be stored."""


class BadDataError(DataError):
    """More images than allowed cannot be decoded."""


class LabelOutOfRangeError(DataError):
    """A label is not among the classes the model knows."""


class UnsplittableImageError(DataError):
    """The image size cannot be halved once for each scale but the first."""


class IndivisibleBatchError(DataError):
    """The global batch cannot be cut into equal slices, one for each rank."""
