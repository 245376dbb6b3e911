"""A second reader of class-conditional samples: a classifier that has only seen real images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LabelAgreement:
    """How often a classifier reads the requested class.

    Attributes:
        samples: Share of generated images read as the class they were asked to show.
        held_out: Share of held-out real images read right; the classifier's own limit.
    """

    samples: float
    held_out: float


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
