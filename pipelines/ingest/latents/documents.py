"""What lies beside the index of latents: who made them of what, told once all are written."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipelines.errors import EmptyDatasetError
from pipelines.ingest.about import ABOUT_NAME, About
from pipelines.ingest.entry import PassedOver
from pipelines.ingest.latents.band_sums import merged
from pipelines.ingest.latents.encoder import Encoder
from pipelines.ingest.shard_files import FinishedShard
from pipelines.latent_format import LatentFormat
from pipelines.latent_record import RECORD_NAME, LatentRecord


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of latents before they are written.

    Attributes:
        plan: Digest of all that decides them.
        source: Where the images, or arrays, are.
        source_sha256: Digest of the images' index; None where the images are not known.
        count: How many there are.
        classes: Names of their classes.
        encoder: The autoencoder.
        precision: What it computed in; None where that is not known.
        format: How latents are stored.
        passed_over: What lies beside the arrays and is not taken.
    """

    plan: str
    source: str
    source_sha256: str | None
    count: int
    classes: tuple[str, ...]
    encoder: Encoder
    precision: Literal["fp32", "bf16"] | None
    format: LatentFormat
    passed_over: PassedOver = ()

    def documents(self, finished: Sequence[FinishedShard]) -> Mapping[str, Mapping[str, Any]]:
        """Give the content of ingest.json and latents.json.

        Args:
            finished: All shards, in their order; each has noted "skipped", the places of what it
                left out, "labels", how many there are of each, and "sums" of its bands.

        Raises:
            EmptyDatasetError: Everything was left out.
        """
        noted = [shard.filled.noted for shard in finished]
        skipped = tuple(place for part in noted for place in part["skipped"])
        if len(skipped) == self.count:
            raise EmptyDatasetError(f"None of the images at {self.source} can be decoded.")
        counts: Counter[int] = Counter()
        for part in noted:
            counts.update(dict(part["labels"]))
        about = About(
            plan=self.plan,
            classes=self.classes,
            images_per_class=tuple(counts[label] for label in range(len(self.classes))) or None,
            skipped=tuple(image for shard in finished for image in shard.filled.skipped),
            passed_over=self.passed_over,
        )
        encoder = self.encoder
        record = LatentRecord(
            autoencoder=encoder.place,
            autoencoder_sha256=encoder.sha256,
            encode_precision=self.precision,
            factor=encoder.factor,
            channels=encoder.channels,
            scale=encoder.scale,
            shift=encoder.shift,
            image_size=encoder.factor * self.format.size,
            views=self.format.views,
            dtype=self.format.dtype,
            source=self.source,
            source_sha256=self.source_sha256,
            samples=self.count - len(skipped),
            skipped=skipped,
            bands=merged(part["sums"] for part in noted),
        )
        return {ABOUT_NAME: asdict(about), RECORD_NAME: record.as_json()}
