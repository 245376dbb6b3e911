"""The network that defines FID, with all that ADM's evaluation reads of it in one pass."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.evaluation.layout import Layout
from trainer.evaluation.weights import MissingWeights, Published, WeightsFile, sha256

logger = logging.getLogger(__name__)

INCEPTION_FEATURES = 2048
_SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = 17 * 17 * _SPATIAL_CHANNELS
_CLASSES = 1008

PUBLISHED = Published(
    url=(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth"
    ),
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
"""With which the literature's FID is computed; also named pt_inception-2015-12-05-6726825d.pth."""


class InceptionFeatures:
    """The TensorFlow Inception network of 2015 as torch-fidelity has it.

    It resizes pictures to 299 x 299 by TensorFlow's bilinear filter, which does not antialias. Its
    features are the 2048 of the last pooling. Its spatial ones are the first 7 channels of the
    first branch of `mixed_6` (Mixed_6d; Nash et al. 2021), row by row with the channels innermost,
    as the `mu_s` and `sigma_s` of ADM's files are. Its logits have no bias, as those of ADM.

    Args:
        data: The weights file.
        weights: Where it was found.

    Attributes:
        digest: SHA-256 of the weights file.

    Raises:
        MissingWeights: The file holds anything but the network's tensors, or the package is not
            installed.
    """

    layout = Layout(spatial=SPATIAL_FEATURES, logits=_CLASSES)

    def __init__(self, data: bytes, *, weights: WeightsFile) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MissingWeights(
                "eval.features.name=inception needs the package torch-fidelity: "
                "pip install '.[inception]' in the folder of this project"
            ) from error
        self.digest, tensors = sha256(data), weights.tensors(data)
        # The package unpickles whatever file it is given, so it is given one that was written here.
        with tempfile.TemporaryDirectory(prefix="lapflow-inception-") as folder:
            own = str(Path(folder) / "inception.pth")
            torch.save(tensors, own)
            try:
                self._network = FeatureExtractorInceptionV3(
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=own,
                )
            except RuntimeError as error:  # names and shapes that are not the network's
                raise weights.unusable(str(error).splitlines()[0]) from error
        self._branch = torch.empty(0)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._take_branch)
        if self.digest != PUBLISHED.sha256:
            logger.warning(
                "The Inception weights of eval.features.inception_weights=%s have the SHA-256 "
                "%s, not that of the weights that FID is computed with (%s): distances do not "
                "compare with the literature's.",
                *(weights.place, self.digest, PUBLISHED.sha256),
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Extract 2048, 2023 and 1008 values per image; grey is repeated to three channels."""
        features, logits = self._network.to(images.device)(as_bytes(images))
        spatial = self._branch[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return torch.cat((features, spatial, logits), dim=1)

    def _take_branch(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self._branch = output


def as_bytes(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as 8-bit pictures of three channels."""
    rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    return (rgb * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
