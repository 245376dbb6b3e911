"""Feature spaces beside Inception's: CLIP, DINOv2, and any module that can be imported.

Distances in them follow people's judgement of pictures more closely than FID does (Stein et al.
2023; Kynkäänniemi et al. 2023). CLIP and DINOv2 see pictures as torch-fidelity shows them: resized
by TensorFlow's bilinear filter and normalised as they were trained. torch-fidelity takes DINOv2's
code from a repository at run time; here it is transformers', which is installed.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer import rng
from trainer.config.reading import ConfigError
from trainer.evaluation.inception import as_bytes
from trainer.evaluation.layout import Layout
from trainer.evaluation.weights import (
    MissingWeights,
    Published,
    WeightsFile,
    reason_of,
    sha256,
)

logger = logging.getLogger(__name__)

CLIP_PUBLISHED = Published(
    url=(
        "https://openaipublic.azureedge.net/clip/models/"
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt"
    ),
    sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
)
"""ViT-B/32, with which FID in CLIP's space is published."""

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_DINO_MEAN, _DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINO_SIZE = 224
_HEAD_WIDTH = 64  # of every DINOv2


class ClipFeatures:
    """The image embedding of CLIP, by torch-fidelity's network.

    The published file is a program of TorchScript, so it is loaded only if its SHA-256 is the
    published one; any other file has to hold tensors alone, under the same names.

    Args:
        data: The weights file.
        weights: Where it was found.

    Attributes:
        digest: SHA-256 of the weights file.

    Raises:
        MissingWeights: The file is neither, or torch-fidelity is not installed.
    """

    layout = Layout()

    def __init__(self, data: bytes, *, weights: WeightsFile) -> None:
        build_model = _needed("torch_fidelity.feature_extractor_clip", by="clip").build_model
        self.digest = sha256(data)
        if self.digest == CLIP_PUBLISHED.sha256:
            program: Any = torch.jit
            tensors = program.load(io.BytesIO(data), map_location="cpu").state_dict()
        else:
            tensors = weights.tensors(data)
        try:
            self._network = build_model(dict(tensors), torch.float32).visual
        except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
            raise weights.unusable(f"it is no CLIP: {reason_of(error)}") from error
        self._show = _Shown(
            "clip", size=int(self._network.input_resolution), mean=_CLIP_MEAN, std=_CLIP_STD
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Extract one embedding per image; grey is repeated to three channels."""
        embedded: Tensor = self._network.to(images.device)(self._show(images))
        return embedded.float()


class DinoFeatures:
    """The class token of DINOv2, by transformers' network, of the size that the tensors have.

    Args:
        data: The safetensors of one of the published folders, facebook/dinov2-large say.
        weights: Where it was found.

    Attributes:
        digest: SHA-256 of the weights file.

    Raises:
        MissingWeights: The file holds anything but the network's tensors, or a package is not
            installed.
    """

    layout = Layout()

    def __init__(self, data: bytes, *, weights: WeightsFile) -> None:
        transformers = _needed("transformers", by="dinov2")
        self._show = _Shown("dinov2", size=_DINO_SIZE, mean=_DINO_MEAN, std=_DINO_STD)
        self.digest, tensors = sha256(data), weights.tensors(data)
        tensors = {name.removeprefix("dinov2."): tensor for name, tensor in tensors.items()}
        try:
            places = tensors["embeddings.position_embeddings"]
            patches = tensors["embeddings.patch_embeddings.projection.weight"]
            width, patch = patches.shape[0], patches.shape[-1]
            if width % _HEAD_WIDTH or width == 0:
                raise ValueError(f"its width of {width} is no multiple of {_HEAD_WIDTH}")
            config = transformers.Dinov2Config(
                hidden_size=width,
                num_hidden_layers=len([name for name in tensors if name.endswith("norm1.weight")]),
                num_attention_heads=width // _HEAD_WIDTH,
                patch_size=patch,
                image_size=round((places.shape[1] - 1) ** 0.5) * patch,
                use_swiglu_ffn="encoder.layer.0.mlp.weights_in.weight" in tensors,
            )
            self._network = transformers.Dinov2Model(config).eval().requires_grad_(False)
            self._network.load_state_dict(tensors)
        except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
            raise weights.unusable(f"it is no DINOv2: {reason_of(error)}") from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Extract one class token per image; grey is repeated to three channels."""
        token: Tensor = self._network.to(images.device)(self._show(images)).last_hidden_state[:, 0]
        return token


class ModuleFeatures:
    """Whatever a module makes of images in [-1, 1], shape [n, c, h, w], as n rows of numbers.

    Resizing and normalising are the module's own.

    Args:
        name: `package.module:Class`, which takes no arguments and can be imported on all workers.
        data: A weights file, of tensors alone; None leaves the module as its constructor makes it,
            at a fixed seed.
        weights: Where it was found.

    Attributes:
        digest: SHA-256 of its name and its tensors.

    Raises:
        ConfigError: There is no such class, or it makes no module.
        MissingWeights: The file holds anything but the module's tensors.
    """

    layout = Layout()

    def __init__(self, name: str, *, data: bytes | None, weights: WeightsFile) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.derive_seed(0, "module features"))
            self._network = _made(name)
        if data is not None:
            try:
                self._network.load_state_dict(weights.tensors(data))
            except RuntimeError as error:
                raise weights.unusable(reason_of(error)) from error
        self._network.eval().requires_grad_(False)
        self._name = name
        self.digest = _digest(name, self._network.state_dict())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Extract one row of numbers per image.

        Raises:
            ConfigError: The module gives something else.
        """
        found = self._network.to(images.device)(images.float())
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(images):
            gives = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"eval.features.module={self._name} gives {gives} for images of shape "
                f"{list(images.shape)}, and features are [{len(images)}, d]"
            )
        return found.flatten(1).float()


def _made(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"eval.features.module={name} cannot be made ({reason_of(error)}); give "
            "package.module:Class, a torch.nn.Module that takes no arguments and that can be "
            "imported on every worker"
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"eval.features.module={name} makes a {type(made).__name__}, and features are of a "
            "torch.nn.Module"
        )
    return made


def _digest(name: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(name.encode())
    for key, tensor in sorted(tensors.items()):
        found.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _needed(module: str, *, by: str) -> Any:
    """Import a module of a package that not every installation has.

    Raises:
        MissingWeights: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise MissingWeights(
            f"eval.features.name={by} needs the package {package}: "
            "pip install '.[inception]' in the folder of this project"
        ) from error


class _Shown:
    """Resizes 8-bit pictures as torch-fidelity does, and normalises them.

    Raises:
        MissingWeights: torch-fidelity is not installed.
    """

    def __init__(
        self,
        features: str,
        *,
        size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        module = _needed("torch_fidelity.interpolate_compat_tensorflow", by=features)
        self._resize = module.interpolate_bilinear_2d_like_tensorflow1x
        self._size, self._mean, self._std = size, mean, std

    def __call__(self, images: Tensor) -> Tensor:
        """Show images in [-1, 1], [n, c, h, w]; grey is repeated to three channels."""
        pictures = self._resize(
            as_bytes(images).float(), size=(self._size, self._size), align_corners=False
        )
        center = torch.tensor(self._mean, device=images.device).reshape(1, 3, 1, 1) * 255
        spread = torch.tensor(self._std, device=images.device).reshape(1, 3, 1, 1) * 255
        normalised: Tensor = (pictures - center) / spread
        return normalised
