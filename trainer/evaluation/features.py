"""Feature extractors for the Fréchet distance, chosen by name.

Numbers from different extractors cannot be compared: only "inception" gives what the literature
calls FID. The other two need no download and serve small images and machines without a network:
"random_conv" at once, "learned_conv" after a minute or two on the data set's training images, and
it knows much better what natural pictures show.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import tempfile
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.documents import DocumentError, read_bounded
from trainer.config.job import FeatureConfig
from trainer.evaluation.learned_features import one_thread

logger = logging.getLogger(__name__)

FID_WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of pt_inception-2015-12-05-6726825d.pth, with which the literature's FID is computed."""

INCEPTION_FEATURES = 2048

_MAX_BYTES = 2**30  # ten times what the network needs


class MissingWeights(ValueError):
    """The weights are neither on disk nor downloadable, or are no weights of this network."""


class InceptionFeatures:
    """The 2048 pool features of the TensorFlow Inception network that defines FID.

    Args:
        data: The weights file.
        weights: Where it lies, or None where it was downloaded.

    Attributes:
        digest: SHA-256 of the weights file.

    Raises:
        MissingWeights: The file holds anything but the network's tensors, or the package is not
            installed.
    """

    def __init__(self, data: bytes, *, weights: str | None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MissingWeights(
                "eval.features.name=inception needs the package torch-fidelity: "
                "pip install '.[inception]' in the folder of this project"
            ) from error
        self.digest, tensors = hashlib.sha256(data).hexdigest(), _tensors(data, weights)
        # The package unpickles whatever file it is given, so it is given one that was written here.
        with tempfile.TemporaryDirectory(prefix="lapflow-inception-") as folder:
            own = str(Path(folder) / "inception.pth")
            torch.save(tensors, own)
            try:
                self._network = FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048"], feature_extractor_weights_path=own
                )
            except RuntimeError as error:  # names and shapes that are not the network's
                raise _unusable(weights, str(error).splitlines()[0]) from error
        if self.digest != FID_WEIGHTS_SHA256:
            logger.warning(
                "The Inception weights of eval.features.inception_weights=%s have the SHA-256 "
                "%s, not that of the weights that FID is computed with (%s): distances do not "
                "compare with the literature's.",
                *(weights, self.digest, FID_WEIGHTS_SHA256),
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Extract 2048 features per image; grey images are repeated to three channels."""
        rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        bytes_ = (rgb * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        features: Tensor = self._network.to(images.device)(bytes_)[0]
        return features


def read_inception(weights: str | None) -> bytes:
    """Read the weights file of "inception", bounded.

    Args:
        weights: Local file, or None to download it.

    Raises:
        MissingWeights: It is missing or too large, or cannot be downloaded.
    """
    try:
        file = _download() if weights is None else Path(weights).expanduser()
        data = read_bounded(file, max_bytes=_MAX_BYTES)
    except Exception as error:  # a download can end in any way
        raise _unusable(weights, _reason(error)) from error
    if weights is None and hashlib.sha256(data).hexdigest() != FID_WEIGHTS_SHA256:
        raise _unusable(weights, f"{file} is not the published file; delete it")
    return data


def _tensors(data: bytes, weights: str | None) -> dict[str, Tensor]:
    """Read a file of tensors, in which nothing can run code."""
    try:
        _check_unpacked(data)
        content: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a file from elsewhere can end its reader in any way
        raise _unusable(weights, _reason(error)) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise _unusable(weights, "it holds something else than named tensors")
    return dict(content)


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _check_unpacked(data: bytes) -> None:
    """Refuse parts that were packed, of which a few bytes can become all that memory holds.

    Raises:
        DocumentError: There is one, or parts overlap. Nothing that torch writes is so.
    """
    if not data.startswith(b"PK"):  # of before torch wrote archives
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = archive.infolist()
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    if packed or sum(part.file_size for part in parts) > len(data):
        raise DocumentError("its tensors are packed, as torch packs none")


def _download() -> Path:
    """Fetch the published file into torch's cache, once, and only if it is the published one."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), hash_prefix=FID_WEIGHTS_SHA256)
    return file


def _unusable(weights: str | None, reason: str) -> MissingWeights:
    return MissingWeights(
        f"Inception weights cannot be loaded ({reason}); put "
        "pt_inception-2015-12-05-6726825d.pth on disk and set eval.features.inception_weights to "
        f"it (now {weights}), or use eval.features.name=random_conv"
    )


class FeatureExtractor(Protocol):
    """Maps images in [-1, 1], shape [n, c, h, w], to features, shape [n, d].

    Attributes:
        digest: SHA-256 of its weights; empty where the code decides them.
    """

    digest: str

    def __call__(self, images: Tensor) -> Tensor:
        """Extract features."""
        ...


class RandomConvFeatures:
    """A fixed random convolutional network: 64 features, the same on every machine.

    Three layers of orthogonal filters with leaky rectifiers, one stride-2 step, and the mean and
    the deviation over positions of the last layer. Random features of this kind separate image
    distributions although nothing was learned (compare Naeem et al. 2020, section 4).

    Args:
        channels: Channels of the images.
    """

    digest = ""

    def __init__(self, channels: int) -> None:
        generator = torch.Generator().manual_seed(20260219)
        widths = (channels, 16, 32, 32)
        self._filters = []
        for inputs, outputs in pairwise(widths):
            weight = torch.empty(outputs, inputs, 3, 3)
            with one_thread():
                nn.init.orthogonal_(weight, gain=2.0**0.5, generator=generator)
            self._filters.append(weight)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Extract 64 features per image."""
        x = images.float()
        with one_thread():
            for layer, weight in enumerate(self._filters):
                x = F.leaky_relu(
                    F.conv2d(x, weight.to(x.device), padding=1, stride=2 if layer == 1 else 1), 0.2
                )
        return torch.cat((x.mean(dim=(2, 3)), x.std(dim=(2, 3))), dim=1)


_UNIT = 32
"""Images of one call of an extractor, always."""


class IndexedExtraction:
    """Runs an extractor so that the features of an image depend on the image and its index alone.

    Libraries round a batch's last bits by its size. So every call has 32 images: image i is in
    place i mod 32, whatever batches the images come in and whichever rank has its neighbours,
    whose places then hold grey.

    Args:
        extractor: Maps images to features.
        device: Where it works.
        take: Takes features [n, d], labels [n] and indices [n], in whatever order they come.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        device: torch.device,
        take: Callable[[Tensor, Tensor, Tensor], None],
    ) -> None:
        self._extractor = extractor
        self._device = device
        self._take = take
        self._unit = -1
        self._images: dict[int, Tensor] = {}
        self._labels: dict[int, int] = {}

    def add(self, images: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Take images [n, c, h, w] in [-1, 1], seen as 8-bit pictures, their classes and indices.

        Indices rise, and each comes once on one of the ranks.
        """
        seen = ((images * 127.5 + 127.5).round().clamp(0, 255) - 127.5) / 127.5
        for image, label, index in zip(seen, labels.tolist(), indices.tolist(), strict=True):
            unit, place = divmod(index, _UNIT)
            if unit != self._unit:
                self.flush()
                self._unit = unit
            self._images[place], self._labels[place] = image, label

    def flush(self) -> None:
        """Extract what is still waiting for its neighbours; the last call."""
        if not self._images:
            return
        places = torch.tensor(list(self._images))
        images = torch.stack(list(self._images.values()))
        call = torch.zeros(_UNIT, *images.shape[1:]).index_copy_(0, places, images.float())
        features = self._extractor(call.to(self._device))[places.to(self._device)]
        # Whatever an extractor makes of values that are not finite, it is no measurement.
        diverged = ~images.flatten(1).isfinite().all(1)
        features[diverged.to(self._device)] = math.nan
        labels = torch.tensor(list(self._labels.values()))
        self._take(features, labels, self._unit * _UNIT + places)
        self._images, self._labels = {}, {}


def check_features(config: FeatureConfig) -> None:
    """Find out before a run whether its extractor can be built after it.

    Raises:
        MissingWeights: If Inception's weights cannot be had.
    """
    if config.name == "inception":
        weights = config.inception_weights
        InceptionFeatures(read_inception(weights), weights=weights)
