"""A file of reference statistics as what samples are measured against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor

from trainer.evaluation.feature_sets import FeatureSet, spread_evenly
from trainer.evaluation.features import FeatureExtractor, IndexedExtraction
from trainer.evaluation.frechet import FeatureStatistics
from trainer.evaluation.inception import INCEPTION_FEATURES
from trainer.evaluation.measures import Target
from trainer.evaluation.npz import StoredReference
from trainer.evaluation.pairs import ComparedImages
from trainer.host_group import HostGroup


def read_stored(
    stored: StoredReference,
    extractors: Mapping[str, FeatureExtractor],
    *,
    channels: int,
    compared: int,
    device: torch.device,
) -> bytes:
    """Read what an open file tells in the features of each extractor; on one rank.

    Statistics are taken as they are stored, for "inception"; what is missing is measured of the
    pictures, and so are the features that pairs are compared by. Where all statistics are stored,
    no other picture is measured.

    Args:
        stored: The file.
        extractors: The extractors by name.
        channels: Channels of the data set's pictures.
        compared: Most pictures whose features are kept.
        device: Where features are extracted.

    Returns:
        What `stored_targets` reads.

    Raises:
        BadReference: It is damaged, or it lacks what is asked for.
    """
    found = {"digest": torch.frombuffer(bytearray(stored.digest.encode()), dtype=torch.uint8)}
    for name, extractor in extractors.items():
        spatial = extractor.layout.spatial
        statistics = spatial_statistics = None
        if name == "inception":
            statistics = stored.statistics(features=INCEPTION_FEATURES)
            spatial_statistics = stored.statistics(features=spatial, spatial=True)
        count = stored.count()
        if count or statistics is None:
            kept = spread_evenly(count, compared)
            is_needed = statistics is None or bool(spatial and spatial_statistics is None)
            images = _measured(
                stored,
                extractor,
                channels=channels,
                kept=kept,
                only_kept=not is_needed,
                device=device,
            )
            found[f"{name}.compared"] = images.kept().contiguous()
            statistics = statistics or images.sums.statistics()
            if spatial:
                spatial_statistics = spatial_statistics or images.spatial.statistics()
        found |= _tensors(f"{name}.", statistics)
        if spatial_statistics is not None:
            found |= _tensors(f"{name}.spatial_", spatial_statistics)
        found[f"{name}.count"] = torch.tensor(count)
    return save(found)


def stored_digest(data: bytes) -> str:
    """Return the SHA-256 of the file that `read_stored` has read."""
    return load(data)["digest"].numpy().tobytes().decode()


def stored_target(data: bytes, features: str, *, ranks: HostGroup, device: torch.device) -> Target:
    """Return what samples are measured against, alike on all ranks; a collective call.

    Args:
        data: What `read_stored` has read.
        features: Name of the extractor.
        ranks: Those that measure, each of which compares with its part of the pictures.
        device: Where pairs are computed.
    """
    tensors = load(data)
    compared = tensors.get(f"{features}.compared")
    spatial = f"{features}.spatial_"
    return Target(
        images=int(tensors[f"{features}.count"]),
        statistics=_statistics(f"{features}.", tensors),
        spatial=_statistics(spatial, tensors) if f"{spatial}mean" in tensors else None,
        compared=None
        if compared is None
        else ComparedImages(compared[ranks.rank :: ranks.world_size], ranks=ranks, device=device),
    )


def _measured(
    stored: StoredReference,
    extractor: FeatureExtractor,
    *,
    channels: int,
    kept: Tensor,
    only_kept: bool,
    device: torch.device,
) -> FeatureSet:
    """Measure the pictures, all or those that are kept, whose features are in order."""
    wanted = kept if only_kept else torch.arange(stored.count())
    # Pictures that are left out are no gaps: a call of the network takes as many as it can.
    images = FeatureSet(classes=1, kept=torch.searchsorted(wanted, kept), layout=extractor.layout)
    extraction = IndexedExtraction(extractor, device=device, take=images.take)
    first = 0
    for batch in stored.pictures():
        stored.check_channels(batch, channels)
        indices = torch.arange(first, first + len(batch))
        chosen = torch.isin(indices, wanted)
        places = torch.searchsorted(wanted, indices[chosen])
        extraction.add(batch[chosen], torch.zeros(len(places)).long(), places)
        first += len(batch)
    extraction.flush()
    return images


def _tensors(prefix: str, statistics: FeatureStatistics) -> dict[str, Tensor]:
    return {
        f"{prefix}mean": torch.from_numpy(statistics.mean),
        f"{prefix}covariance": torch.from_numpy(statistics.covariance),
    }


def _statistics(prefix: str, tensors: Mapping[str, Tensor]) -> FeatureStatistics:
    return FeatureStatistics(
        mean=tensors[f"{prefix}mean"].numpy(), covariance=tensors[f"{prefix}covariance"].numpy()
    )
