"""Evaluation figures against closed forms, and what they must not depend on."""

import dataclasses
import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.codec import IdentityCodec
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler_config import SamplerConfig, SamplerConfigError
from models.pyramid import up
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from tests.unit.trainer.measurements import real_figures
from trainer.config.job import EvalConfig, FeatureConfig
from trainer.config.shapes import ImageShape
from trainer.evaluation import taken as taken_module
from trainer.evaluation.extractors import check_features
from trainer.evaluation.features import RandomConvFeatures
from trainer.evaluation.figures import Distance, Measures, Nearness
from trainer.evaluation.frechet import FeatureStatistics, FrechetError, frechet_distance
from trainer.evaluation.grid import grid_png, pixels_of
from trainer.evaluation.learned_features import label_agreement, learned_features
from trainer.evaluation.reports import EvaluationReport, Origin
from trainer.evaluation.samples import ImageSampler, SampleBlock
from trainer.evaluation.sums import FeatureSums
from trainer.evaluation.taken import TakenSamples
from trainer.evaluation.weights import MissingWeights
from trainer.metrics.tracker import by_protocol
from trainer.storage.errors import StoreError


def statistics(mean, covariance):
    return FeatureStatistics(mean=np.asarray(mean, float), covariance=np.asarray(covariance, float))


def summarised(features) -> FeatureStatistics:
    sums = FeatureSums()
    sums.add(torch.as_tensor(features))
    return sums.statistics()


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    first = statistics([1, 2, 3], np.diag([1.0, 4.0, 9.0]))
    second = statistics([1, 0, 3], np.diag([4.0, 4.0, 1.0]))
    # |m1 - m2|^2 + sum (sigma1 - sigma2)^2
    assert frechet_distance(first, second) == pytest.approx(4 + 1 + 0 + 4, rel=1e-12)


def test_a_distance_that_is_not_finite_is_none():
    first, second = statistics([0, 0], np.eye(2)), statistics([np.nan, 0], np.eye(2))
    with pytest.raises(FrechetError, match="not finite"):
        frechet_distance(first, second)


def test_frechet_distance_is_a_symmetric_zero_on_itself_even_when_rank_deficient():
    rng = np.random.default_rng(0)
    first = summarised(rng.normal(size=(10, 64)))
    second = summarised(rng.normal(size=(12, 64)) + 1)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, second) == pytest.approx(
        frechet_distance(second, first), rel=1e-7
    )


def test_frechet_distance_of_few_images_is_that_of_the_images_themselves():
    """The trace of the root is the nuclear norm of the images' products."""
    rng = np.random.default_rng(2)
    images = [rng.normal(size=(n, 300)) + n / 100 for n in (40, 60)]
    roots = [(each - each.mean(0)) / np.sqrt(len(each) - 1) for each in images]
    shift = images[0].mean(0) - images[1].mean(0)
    traces = sum((root**2).sum() for root in roots)
    nuclear = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    found = frechet_distance(*(summarised(each) for each in images))
    assert found == pytest.approx(shift @ shift + traces - 2 * nuclear, rel=1e-9)
    same = statistics([1.0, 2.0], np.zeros((2, 2)))
    assert frechet_distance(same, statistics([1.0, 5.0], np.eye(2))) == pytest.approx(9 + 2)
    assert frechet_distance(same, same) == 0.0


def test_frechet_distance_agrees_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    a, b = (summarised(rng.normal(size=(500, 8)) @ rng.normal(size=(8, 8))) for _ in "ab")
    root = np.trace(sqrtm(a.covariance @ b.covariance).real)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_random_features_are_fixed_and_tell_distributions_apart():
    extract = RandomConvFeatures(1)
    smooth = torch.linspace(-1, 1, 8).expand(64, 1, 8, 8) + 0.01 * torch.randn(64, 1, 8, 8)
    noise = torch.randn(64, 1, 8, 8)
    assert extract(smooth).shape == (64, 64)
    assert torch.equal(extract(smooth), RandomConvFeatures(1)(smooth))
    near = summarised(extract(smooth[:32]))
    same = summarised(extract(smooth[32:]))
    far = summarised(extract(noise))
    assert frechet_distance(near, far) > 100 * frechet_distance(near, same)


def test_inception_without_its_file_says_what_to_do(tmp_path):
    missing = str(tmp_path / "inception.pth")
    with pytest.raises(MissingWeights, match=r"inception_weights .*random_conv"):
        check_features(FeatureConfig(name="inception", inception_weights=missing))


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_weights_file_runs_no_code(tmp_path, zipped):
    weights, sung = tmp_path / "inception.pth", tmp_path / "sung"
    content = {"Conv2d_1a_3x3.conv.weight": Canary(sung)}
    torch.save(content, weights, _use_new_zipfile_serialization=zipped)
    with pytest.raises(MissingWeights, match=r"cannot be loaded .*inception_weights"):
        check_features(FeatureConfig(name="inception", inception_weights=str(weights)))
    assert not sung.exists()
    torch.load(weights, weights_only=False)
    assert sung.exists()  # the canary is one


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": "text"}, {1: torch.zeros(1)}, {"Conv2d_1a_3x3": torch.zeros(3)}]
)
def test_weights_of_something_else_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "inception.pth")
    with pytest.raises(MissingWeights, match=r"cannot be loaded .*inception_weights"):
        check_features(
            FeatureConfig(name="inception", inception_weights=str(tmp_path / "inception.pth"))
        )


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def packed(path: Path) -> None:
    """Many zeros in a thousandth of their size."""
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(2**24)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 2**17


@pytest.mark.parametrize(
    ("make", "reason"),
    [(pipe, "regular"), (endless, "regular"), (sparse, "more than"), (packed, "packed")],
)
def test_a_weights_file_without_end_is_refused_unread(tmp_path, make, reason):
    make(tmp_path / "inception.pth")
    with pytest.raises(MissingWeights, match=rf"cannot be loaded .*{reason}.*inception_weights"):
        check_features(
            FeatureConfig(name="inception", inception_weights=str(tmp_path / "inception.pth"))
        )


def test_features_do_not_depend_on_the_number_of_threads():
    images = torch.rand(125, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    train = two_classes(64, 0)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            learned = learned_features(train=[train], held_out=[train])
            found.append((RandomConvFeatures(1)(images), learned(images)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_a_grid_shows_every_image_in_its_place_with_a_gap_around_it():
    images = torch.stack([torch.full((3, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    picture = np.asarray(Image.open(io.BytesIO(grid_png(images, columns=2))))
    # 8 pixels become 48, and 4 lie between images and around them.
    assert picture.shape == (108, 108, 3)
    places = {(4, 4): 0, (51, 51): 0, (4, 56): 128, (56, 4): 255, (56, 56): 96, (52, 4): 96}
    assert {place: int(picture[place][0]) for place in places} == places


def test_samples_do_not_depend_on_the_batch_they_are_drawn_in():
    torch.manual_seed(0)
    model = LapFlowTransformer(
        TransformerConfig(depth=1, width=16, heads=2), scales=2, channels=1, image_size=8, classes=4
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image_sampler = ImageSampler(
        flow=Flow(FlowConfig()),
        sampler=SamplerConfig(steps=4, guidance_scale=2.0),
        shape=ImageShape(channels=1, size=8, classes=4),
        codec=IdentityCodec(),
        seed=1,
        batch=6,
        device=torch.device("cpu"),
    )
    labels = torch.arange(6) % 4
    whole = image_sampler.all(model, labels)
    assert whole.nfe == (8.0, 8.0)
    for batch in (1, 4):
        other = dataclasses.replace(image_sampler, batch=batch).all(model, labels)
        torch.testing.assert_close(other.images, whole.images, rtol=1e-5, atol=1e-5)
        assert other.nfe == whole.nfe
    other = dataclasses.replace(image_sampler, seed=2).all(model, labels)
    assert not torch.allclose(other.images, whole.images, atol=0.1)
    with pytest.raises(SamplerConfigError, match="at least 1"):
        dataclasses.replace(image_sampler, batch=0)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 12))
def test_blocks_are_equal_and_hold_every_sample_once(images, batch):
    image_sampler = ImageSampler(
        flow=Flow(FlowConfig()),
        sampler=SamplerConfig(solver="euler", steps=2),
        shape=ImageShape(channels=1, size=2, classes=3),
        codec=IdentityCodec(),
        seed=1,
        batch=batch,
        device=torch.device("cpu"),
    )
    calls = []

    def still(states, time, labels):
        calls.append(len(labels))
        return tuple(torch.zeros_like(state) for state in states)

    labels = torch.arange(images) % 3
    blocks = list(image_sampler.blocks(still, labels))
    assert [block.first for block in blocks] == [
        sum(len(before.labels) for before in blocks[:number]) for number in range(len(blocks))
    ]
    assert torch.equal(torch.cat([block.labels for block in blocks]), labels)
    assert all(len(block.images) == len(block.labels) for block in blocks)
    # No call has more than a batch, and as few as possible are thrown away.
    assert len(set(calls)) == 1
    assert calls[0] <= batch
    assert len(blocks) == -(-images // batch)
    assert calls[0] * len(blocks) - images < len(blocks)


def two_classes(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = (labels[:, None, None, None] * 1.0 - 0.5) + 0.1 * torch.randn(
        count, 1, 8, 8, generator=generator
    )
    return images, labels


def test_the_classifier_reads_what_was_asked_for_and_not_what_was_not():
    train, held_out, good = (two_classes(60, seed) for seed in range(3))
    wrong = (good[0], 1 - good[1])
    assert label_agreement(train=train, held_out=held_out, samples=good).samples == 1.0
    agreement = label_agreement(train=train, held_out=held_out, samples=wrong)
    assert (agreement.samples, agreement.held_out) == (0.0, 1.0)


def test_a_report_puts_each_figure_beside_its_references():
    agreement = label_agreement(
        **{
            name: two_classes(60, seed)
            for seed, name in enumerate(("train", "held_out", "samples"))
        }
    )
    report = EvaluationReport.of(
        EvalConfig(samples=20),
        images=7,
        origin=Origin(run="a", attempt="b", held_out_index="c", extractor=""),
        reached=Distance(
            features="random_conv",
            frechet=0.3,
            diversity=1.5,
            nearest=Nearness(mean=0.5, close_share=0.25),
            more=Measures(kernel_distance=-0.125, recall=0.0, compared=20, compared_real=200),
            real=real_figures(0.1),
            held_out_accuracy=0.75,
        ),
        frechet_untrained=2.0,
        nfe=(1.0, 2.5),
        labels=agreement,
        real_images=200,
        unusable_real_images=1,
    )
    assert report.metrics() == {
        "eval/frechet_random_conv": 0.3,
        "eval/random_conv_diversity": 1.5,
        "eval/random_conv_nearest_train": 0.5,
        "eval/random_conv_close_to_train": 0.25,
        "eval/random_conv_kernel_distance": -0.125,
        "eval/random_conv_recall": 0.0,
        "eval/network_evaluations": 3.5,
        "eval/label_agreement": 1.0,
        "reference/frechet_random_conv": 0.1,
        "reference/frechet_random_conv_untrained": 2.0,
        "reference/random_conv_diversity": 2.0,
        "reference/random_conv_nearest_train": 1.5,
        "reference/unusable_real_images": 1.0,
        "reference/classifier_held_out_accuracy": 1.0,
    }
    assert EvaluationReport.from_json(report.to_json()) == report
    assert [each.held_out_accuracy for each in report.distances] == [0.75]
    # Told as points, they say by which protocol, as only those of one stand in a curve.
    protocol = report.measurement.protocol("random_conv")
    points = report.points()
    assert points.keys() == by_protocol(report.metrics(), protocol).keys()
    assert points[f"eval@{protocol}/frechet_random_conv"] == 0.3


def test_samples_are_kept_as_pictures_as_far_as_there_is_room():
    taken = TakenSamples(picture_bytes=64, max_bytes=5 * 64, whole=True)
    images, labels = two_classes(8, 0)
    for first, last in ((0, 3), (3, 6), (6, 8)):
        taken.add(
            SampleBlock(
                first=first,
                images=images[first:last],
                labels=labels[first:last],
                nfe=(float(last - first), 1.0),
            )
        )
    file = np.load(io.BytesIO(b"".join(taken.npz())))
    wanted = (images * 127.5 + 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    assert np.array_equal(file["arr_0"], wanted[:5].numpy())
    assert file["arr_1"].tolist() == labels[:5].tolist()
    assert torch.equal(torch.cat([part for part, _ in taken.whole]), images)


def test_pictures_take_no_more_memory_for_more_samples():
    images, labels = torch.zeros(100, 3, 32, 32), torch.zeros(100, dtype=torch.int64)

    def peak(blocks):
        taken = TakenSamples(picture_bytes=3 * 32 * 32)
        tracemalloc.start()
        for first in range(0, 100 * blocks, 100):
            taken.add(SampleBlock(first=first, images=images, labels=labels, nfe=(1.0,)))
        for _piece in taken.npz():
            pass
        _, largest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return largest

    pictures_bytes = 100 * 200 * 3 * 32 * 32
    assert peak(200) < peak(20) + pictures_bytes / 10  # pieces are of 4 MiB


def test_a_full_disk_leaves_the_first_samples(monkeypatch, caplog):
    class Full(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data)[: max(0, 7 * 64 - self.tell())])

    monkeypatch.setattr(taken_module.tempfile, "TemporaryFile", lambda **_: Full())
    taken = TakenSamples(picture_bytes=64)
    images, labels = two_classes(9, 0)
    for first in (0, 3, 6):
        part = slice(first, first + 3)
        taken.add(SampleBlock(first=first, images=images[part], labels=labels[part], nfe=(1.0,)))
    file = np.load(io.BytesIO(b"".join(taken.npz())))
    assert np.array_equal(file["arr_0"], pixels_of(images[:6]))
    assert file["arr_1"].tolist() == labels[:6].tolist()
    assert "the first 6 samples alone" in caplog.text
    assert taken.wants(range(6, 9))  # as other ranks take it


def test_pictures_that_a_disk_has_lost_are_told_and_not_packed_short(monkeypatch):
    lost = io.BytesIO()
    monkeypatch.setattr(taken_module.tempfile, "TemporaryFile", lambda **_: lost)
    taken = TakenSamples(picture_bytes=64)
    images, labels = two_classes(9, 0)
    taken.add(SampleBlock(first=0, images=images, labels=labels, nfe=(1.0,)))
    lost.truncate(100)
    with pytest.raises(StoreError, match=r"samples kept in .* cannot be read: 476 bytes"):
        list(taken.npz())


def test_only_blocks_of_which_something_is_kept_are_wanted():
    taken = TakenSamples(picture_bytes=64, max_bytes=5 * 64, shown=[20])
    wanted = [first for first in range(0, 30, 3) if taken.wants(range(first, first + 3))]
    assert wanted == [0, 3, 18]
    assert TakenSamples(picture_bytes=64, max_bytes=0, whole=True).wants(range(90, 91))


def test_samples_are_decoded_a_batch_at_a_time():
    class Doubling(IdentityCodec):
        factor = 2
        decoded: list[int] = []  # noqa: RUF012

        def image_channels(self, latent_channels: int) -> int:
            return 3 * latent_channels

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            self.decoded.append(len(latents))
            return up(latents).repeat(1, 3, 1, 1)

    torch.manual_seed(0)
    model = LapFlowTransformer(
        TransformerConfig(depth=1, width=16, heads=2), scales=2, channels=1, image_size=8, classes=4
    )
    image_sampler = ImageSampler(
        flow=Flow(FlowConfig()),
        sampler=SamplerConfig(steps=2),
        shape=ImageShape(channels=1, size=8, classes=4),
        codec=IdentityCodec(),
        seed=1,
        batch=3,
        device=torch.device("cpu"),
    )
    labels = torch.arange(7) % 4
    latents = image_sampler.all(model, labels).images
    codec = Doubling()
    images = dataclasses.replace(image_sampler, codec=codec).all(model, labels).images
    assert torch.equal(images, up(latents).repeat(1, 3, 1, 1))
    assert sum(codec.decoded) == 7
    assert max(codec.decoded) == 3
