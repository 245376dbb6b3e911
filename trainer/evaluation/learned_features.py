"""A small classifier of the data set's own images: a feature extractor and a judge.

Between random filters, which see little of what a natural picture shows, and Inception, whose
weights have to come from somewhere: a few convolutions that learned to tell the classes apart, in
a minute or two, from nothing but the data at hand.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from pipelines.documents import canonical
from trainer import rng
from trainer.evaluation.figures import LabelAgreement
from trainer.evaluation.layout import Layout
from trainer.storage.errors import StoreError
from trainer.storage.kept import KeptFiles

logger = logging.getLogger(__name__)

RECIPE = 1
"""Number of the way to train: one more whenever it changes, so that kept weights are not reused."""

LabelledImages = Iterable[tuple[Tensor, Tensor]]
"""Batches of images [b, c, h, w] in [-1, 1] and labels [b]."""


_FEATURES = 128
_EPOCHS = 5
_BATCH = 128
_PEAK_RATE = 1e-2
_ACCURACY = "held_out_accuracy"
_FILE = "learned_conv.safetensors"


class NothingToLearn(ValueError):
    """There are no images."""


class LearnedConvFeatures:
    """The 128 values below the last layer of a trained classifier, means over positions.

    Attributes:
        held_out_accuracy: Share of held-out images it reads right: how well it knows the pictures.
        digest: SHA-256 of its weights. Distances of two extractors compare only if these are equal.
    """

    layout = Layout()

    def __init__(self, network: _Classifier, *, held_out_accuracy: float) -> None:
        self._network = network.eval()
        self.held_out_accuracy = held_out_accuracy
        weights = (tensor for _, tensor in sorted(network.state_dict().items()))
        self.digest = hashlib.sha256(
            b"".join(w.cpu().contiguous().numpy().tobytes() for w in weights)
        ).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the network as safetensors."""
        accuracy = torch.tensor(self.held_out_accuracy, dtype=torch.float64)
        return save({**self._network.cpu().state_dict(), _ACCURACY: accuracy})

    @classmethod
    def from_bytes(cls, data: bytes) -> LearnedConvFeatures:
        """Rebuild it from `to_bytes`."""
        tensors = load(data)
        accuracy = float(tensors.pop(_ACCURACY))
        network = _Classifier(
            channels=tensors["layers.0.0.weight"].shape[1], classes=len(tensors["head.bias"])
        )
        network.load_state_dict(tensors)
        return cls(network, held_out_accuracy=accuracy)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Extract 128 features per image."""
        with one_thread():
            return self._network.to(images.device).features(images.float())


class _Classifier(nn.Module):
    def __init__(self, *, channels: int, classes: int) -> None:
        super().__init__()
        widths = ((channels, 32, 1), (32, 64, 2), (64, _FEATURES, 2), (_FEATURES, _FEATURES, 1))
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                )
                for inputs, outputs, stride in widths
            )
        )
        self.head = nn.Linear(_FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        mixed: Tensor = self.layers(images)
        return mixed.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


@dataclass(frozen=True, kw_only=True)
class KeptFeatures:
    """Trained weights on this machine, believed only as they were written.

    Attributes:
        files: Where they are.
        made_of: What decides them, beside the recipe here: the images and how they are read.
    """

    files: KeptFiles
    made_of: Mapping[str, str]

    def read(self) -> LearnedConvFeatures | None:
        """Return what an earlier call has written; what is damaged is put aside and told."""
        folder = self.files.whole(made_of=self._made_of)
        if folder is None:
            self._put_aside()
            return None
        return LearnedConvFeatures.from_bytes((folder / _FILE).read_bytes())

    def write(self, learned: LearnedConvFeatures) -> None:
        """Keep weights, as far as the disk lets it."""
        try:
            self.files.keep({_FILE: learned.to_bytes()}, made_of=self._made_of)
        except StoreError as error:
            logger.warning("what was learned is not kept, and will be learned again: %s", error)

    def _put_aside(self) -> None:
        try:
            self.files.put_aside(made_of=self._made_of)
        except StoreError as error:
            logger.warning("what is damaged cannot be put aside: %s", error)

    @property
    def _made_of(self) -> str:
        return canonical({"recipe": RECIPE, **self.made_of}).decode()


def learned_features(
    *,
    train: LabelledImages,
    held_out: LabelledImages,
    kept: KeptFeatures | None = None,
) -> LearnedConvFeatures:
    """Train the classifier, or read its weights where an earlier call has left them.

    Training runs on one processor thread with a fixed seed, so machines with the same processor
    and torch get the same weights; others may differ in rounding, and so in `digest`.

    Args:
        train: Training images and labels; read only where the weights are not kept.
        held_out: Held-out images and labels, for the accuracy.
        kept: Where the weights are kept; None keeps them nowhere.
    """
    if kept is not None and (found := kept.read()) is not None:
        return found
    images, labels = join_batches(train)
    logger.info("teaching the network whose features measure, on %d images", len(images))
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive_seed(0, "learned features"))
        network = _Classifier(channels=images.shape[1], classes=int(labels.max()) + 1)
        _train(network, images, labels)
        accuracy = _accuracy(network.eval(), held_out)
    learned = LearnedConvFeatures(network, held_out_accuracy=accuracy)
    if kept is not None:
        kept.write(learned)
    return learned


def join_batches(batches: LabelledImages) -> tuple[Tensor, Tensor]:
    """Return all images and labels at once.

    Raises:
        NothingToLearn: There are none.
    """
    parts = list(batches)
    if not parts:
        raise NothingToLearn("there are no images of which any can be used: see the warnings above")
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _train(network: _Classifier, images: Tensor, labels: Tensor) -> None:
    updates = _EPOCHS * -(-len(images) // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_PEAK_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda update: (
            min(1.0, 5 * (update + 1) / updates) * (1 + math.cos(math.pi * update / updates)) / 2
        ),
    )
    for _ in range(_EPOCHS):
        for part in torch.split(torch.randperm(len(images)), _BATCH):
            loss = F.cross_entropy(network(_shift(images[part])), labels[part])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()


def _shift(images: Tensor) -> Tensor:
    """Move a batch by up to an eighth of its size, which a class survives."""
    reach = max(1, images.shape[-1] // 8)
    rows, columns = torch.randint(0, 2 * reach + 1, (2,)).tolist()
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    size = images.shape[-1]
    return padded[:, :, rows : rows + size, columns : columns + size]


@torch.no_grad()
def _accuracy(network: _Classifier, held_out: LabelledImages) -> float:
    right = torch.cat([network(images).argmax(1) == labels for images, labels in held_out])
    return float(right.float().mean())


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread of the processor: with another number results are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def label_agreement(
    *,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    samples: tuple[Tensor, Tensor],
) -> LabelAgreement:
    """Train a support-vector classifier on real pixels and let it read the samples.

    Args:
        train: Real training images [n, c, h, w] in [-1, 1] and labels [n].
        held_out: Real images and labels the generator has never seen.
        samples: Generated images and the labels that were requested.

    Returns:
        Agreement on samples and on held-out images.
    """
    from sklearn.svm import SVC

    classifier = SVC(C=10.0).fit(train[0].flatten(1).numpy(), train[1].numpy())
    score = {
        name: float(classifier.score(images.flatten(1).numpy(), labels.numpy()))
        for name, (images, labels) in {"samples": samples, "held_out": held_out}.items()
    }
    return LabelAgreement(samples=score["samples"], held_out=score["held_out"])
