"""ADM's figures by Inception against torch-fidelity's and direct ones, at random weights."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from trainer.evaluation.feature_sets import FeatureSet
from trainer.evaluation.features import IndexedExtraction
from trainer.evaluation.figures import Measures
from trainer.evaluation.frechet import frechet_distance
from trainer.evaluation.inception import PUBLISHED, InceptionFeatures
from trainer.evaluation.measures import Target, measures
from trainer.evaluation.pairs import ComparedImages
from trainer.evaluation.weights import WeightsFile
from trainer.host_group import HostGroup
from trainer.storage.store import StoreConfig

pytestmark = pytest.mark.slow

ALONE = HostGroup(alone=True)
CPU = torch.device("cpu")
IMAGES = 32


def pictures(kind: str) -> torch.Tensor:
    """Dark smooth pictures; and bright ones under noise, with some like the others among them.

    So the distance is large beside the roots of eigenvalues that are 0 but for rounding, of which
    torch-fidelity adds up 2,000.
    """
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(2 * IMAGES, 3, 6, 6, generator=generator) * 2 - 1
    smooth, others = (0.4 * F.interpolate(coarse, size=32, mode="bicubic")).split(IMAGES)
    if kind == "real":
        return (smooth - 0.3).clamp(-1, 1)
    noise = torch.randn(IMAGES, 3, 32, 32, generator=generator)
    shift = (torch.arange(IMAGES) >= IMAGES // 4).float()[:, None, None, None]
    return (others - 0.3 + shift * (0.7 + 0.3 * noise)).clamp(-1, 1)


def random_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Network:
    """Inception at random weights that tells pictures apart: its normalisation has seen some."""
    torch.save({}, folder / "nothing.pth")
    with monkeypatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        # The constructor builds random weights before it loads a file.
        patch.setattr(Network, "load_state_dict", lambda self, _: None)
        path = str(folder / "nothing.pth")
        network = Network("random", ["2048"], feature_extractor_weights_path=path)
    for each in network.modules():
        if isinstance(each, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(
                each.weight, generator=torch.Generator().manual_seed(each.weight.numel())
            )
        if isinstance(each, torch.nn.BatchNorm2d):
            each.momentum = None
            each.train()
    seen = torch.cat((pictures("real")[:4], pictures("samples")[-4:]))
    with torch.no_grad():
        network((seen * 127.5 + 127.5).round().byte())
    return network.eval()


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    with pytest.MonkeyPatch.context() as monkeypatch:
        network = random_network(folder, monkeypatch)
    file = folder / "weights.pth"
    torch.save(network.state_dict(), file)
    weights = WeightsFile(network="inception", place=str(file), published=PUBLISHED)
    return InceptionFeatures(weights.read(StoreConfig()), weights=weights)


class Taken:
    """Takes what an extraction gives, as a set does and as it is."""

    def __init__(self, extractor: InceptionFeatures, images: torch.Tensor) -> None:
        self.set = FeatureSet(classes=1, kept=torch.arange(IMAGES), layout=extractor.layout)
        self.parts: list[torch.Tensor] = []
        extraction = IndexedExtraction(extractor, device=CPU, take=self._take)
        extraction.add(images, torch.zeros(IMAGES).long(), torch.arange(IMAGES))
        extraction.flush()
        self.values = torch.cat(self.parts)
        self.features, self.spatial, self.logits = extractor.layout.split(self.values)

    def _take(self, values: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor) -> None:
        self.set.take(values, labels, indices)
        self.parts.append(values)

    @property
    def compared(self) -> ComparedImages:
        return ComparedImages(self.set.kept(), ranks=ALONE, device=CPU)


@pytest.fixture(scope="module")
def real(extractor):
    return Taken(extractor, pictures("real"))


@pytest.fixture(scope="module")
def samples(extractor):
    return Taken(extractor, pictures("samples"))


@pytest.fixture(scope="module")
def found(real, samples) -> Measures:
    return measures(samples.set, samples.compared, Target.of(real.set, real.compared))


def test_frechet_distance_is_that_of_torch_fidelity(real, samples):
    ours = frechet_distance(samples.set.sums.statistics(), real.set.sums.statistics())
    statistics = [fid_features_to_statistics(each.features.double()) for each in (samples, real)]
    told = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(told, rel=1e-6)
    assert ours == pytest.approx(directly(samples.features, real.features), rel=1e-6)


def directly(one: torch.Tensor, two: torch.Tensor) -> float:
    """The distance from the images themselves: the root's trace is that of their products."""
    roots = [(a - a.mean(0)) / (len(a) - 1) ** 0.5 for a in (one.double(), two.double())]
    shift = (one.double().mean(0) - two.double().mean(0)).square().sum()
    traces = sum(root.square().sum() for root in roots)
    return float(shift + traces - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum())


def test_inception_score_is_that_of_torch_fidelity(samples, found):
    told = isc_features_to_metric(samples.logits, splits=1, shuffle=False)
    assert found.inception_score == pytest.approx(told["inception_score_mean"], rel=1e-6)
    assert found.inception_score > 1.005


def test_kernel_distance_precision_and_recall_are_those_of_torch_fidelity(real, samples, found):
    sets = samples.features.double(), real.features.double()
    kernel = kid_features_to_metric(*sets, kid_subsets=1, kid_subset_size=IMAGES, verbose=False)
    told = prc_features_to_metric(*sets, verbose=False)
    assert found.kernel_distance == pytest.approx(
        kernel["kernel_inception_distance_mean"], rel=1e-6
    )
    assert (found.precision, found.recall) == pytest.approx(
        (told["precision"], told["recall"]), rel=1e-6
    )
    assert 0 < found.precision < 1
    assert found.recall > 0
    assert (found.compared, found.compared_real) == (IMAGES, IMAGES)


def test_the_spatial_distance_is_that_of_the_branch_itself(extractor, real, samples, found):
    assert samples.spatial.shape == (IMAGES, 2023)
    network = extractor._network
    shown = (pictures("samples") * 127.5 + 127.5).round().float()
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as resize,
    )

    with torch.no_grad():
        x = (resize(shown[:2], size=(299, 299), align_corners=False) - 128) / 128
        before = list(network.named_children())
        names = [name for name, _ in before]
        for _, layer in before[: names.index("Mixed_6d")]:
            x = layer(x)
        branch = network.Mixed_6d.branch1x1
        x = torch.relu(branch.bn(branch.conv(x)))
    wanted = np.stack(
        [
            [image[channel, row, column] for row in range(17) for column in range(17)
             for channel in range(7)]
            for image in x.numpy()
        ]
    )  # fmt: skip
    np.testing.assert_allclose(samples.spatial[:2].numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert found.spatial_frechet == pytest.approx(directly(samples.spatial, real.spatial), rel=1e-6)


def test_a_file_of_other_weights_than_the_published_is_told(extractor, tmp_path, caplog):
    file = tmp_path / "weights.pth"
    torch.save(extractor._network.state_dict(), file)
    weights = WeightsFile(network="inception", place=str(file), published=PUBLISHED)
    with caplog.at_level(logging.WARNING):
        again = InceptionFeatures(weights.read(StoreConfig()), weights=weights)
    assert again.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"have the SHA-256 {again.digest}, not that of the weights that FID" in caplog.text
    grey = again(torch.rand(2, 1, 16, 16) * 2 - 1)
    assert grey.shape == (2, 2048 + 2023 + 1008)
    assert torch.isfinite(grey).all()
