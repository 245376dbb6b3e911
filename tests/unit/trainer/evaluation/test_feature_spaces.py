"""Feature spaces of CLIP, DINOv2 and any module: as torch-fidelity shows them, of tensors alone."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trainer.config.job import FeatureConfig
from trainer.config.reading import ConfigError
from trainer.evaluation.extractors import build_extractor, check_features
from trainer.evaluation.vision import CLIP_PUBLISHED
from trainer.evaluation.weights import MissingWeights
from trainer.host_group import HostGroup
from trainer.storage.store import StoreConfig

ALONE = HostGroup(alone=True)
HERE = __name__


class Halves(nn.Module):
    """Sixteen numbers of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 16))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the images."""
        return self.layer(images)


class Wrong(Halves):
    """No features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Forget which image was which."""
        return super().forward(images).sum()


def built(config: FeatureConfig):
    return build_extractor(
        config.name,
        ranks=ALONE,
        channels=3,
        config=config,
        store=StoreConfig(),
        learn=lambda: pytest.fail("nothing is learned"),
    )


def images(channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, channels, 20, 20, generator=generator) * 2 - 1


def module(name: str, weights: Path | str | None = None) -> FeatureConfig:
    place = None if weights is None else str(weights)
    return FeatureConfig(name="module", module=f"{HERE}:{name}", module_weights=place)


@pytest.mark.parametrize("form", ["safetensors", "torch", "store"])
def test_any_module_gives_features_by_weights_that_are_tensors(tmp_path, form):
    network, file = Halves(), tmp_path / "weights"
    if form == "safetensors":
        save_file(network.state_dict(), file)
    else:
        torch.save(network.state_dict(), file)
    extract = built(module("Halves", f"file://{file}" if form == "store" else file))
    assert torch.equal(extract(images()), network(images()))
    own = built(module("Halves"))
    assert torch.equal(own(images()), built(module("Halves"))(images()))
    assert own.digest == built(module("Halves")).digest
    assert extract.digest != own.digest
    assert re.fullmatch("[0-9a-f]{64}", own.digest)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no.such.package:Class", "cannot be made"),
        (f"{HERE}:NoClass", "cannot be made"),
        (f"{HERE}", "cannot be made"),
        ("torch.nn:Linear", "cannot be made"),
        ("collections:OrderedDict", "makes a OrderedDict"),
    ],
)
def test_what_makes_no_module_is_refused_before_a_run(name, reason):
    with pytest.raises(ConfigError, match=rf"eval\.features\.module={name} .*{reason}|{reason}"):
        check_features(FeatureConfig(name="module", module=name))


def test_a_module_that_gives_no_features_says_so():
    with pytest.raises(ConfigError, match=r"gives \[\] for images of shape \[4, 3, 20, 20\]"):
        built(module("Wrong"))(images())


@pytest.mark.parametrize(("name", "given"), [("module", None), ("clip", "torch.nn:Identity")])
def test_a_module_is_named_where_it_is_used_and_nowhere_else(name, given):
    with pytest.raises(ConfigError, match="name=module needs module=package"):
        FeatureConfig(name=name, module=given)


def test_weights_of_another_module_are_refused(tmp_path):
    torch.save({"layer.2.weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(MissingWeights, match=r"Module weights cannot be loaded .*Halves"):
        check_features(module("Halves", tmp_path / "weights"))


def small_clip() -> dict[str, torch.Tensor]:
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    torch.manual_seed(2)
    network = CLIPVisual(16, 64, 2, 64, 32)
    # As the published weights are, in half precision.
    return {
        **{name: tensor.half().float() for name, tensor in network.state_dict().items()},
        "text_projection": torch.zeros(8, 16),
    }


def fidelity_clip(tensors: dict[str, torch.Tensor], shown: torch.Tensor) -> torch.Tensor:
    """What torch-fidelity's own extractor gives, without its way to load a file."""
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP, build_model

    theirs = FeatureExtractorCLIP.__new__(FeatureExtractorCLIP)
    nn.Module.__init__(theirs)
    theirs.features_list, theirs.feature_extractor_internal_dtype = ["clip"], torch.float32
    theirs.model = build_model(dict(tensors), torch.float32)
    theirs.resolution = theirs.model.visual.input_resolution
    return theirs((shown * 127.5 + 127.5).round().byte())[0]


@pytest.mark.slow
def test_clip_sees_pictures_as_torch_fidelity_shows_them(tmp_path, monkeypatch):
    tensors, file = small_clip(), tmp_path / "clip"
    save_file(tensors, file)
    extract = built(FeatureConfig(name="clip", clip_weights=str(file)))
    torch.testing.assert_close(extract(images()), fidelity_clip(tensors, images()))
    grey = extract(images(1))
    torch.testing.assert_close(grey, fidelity_clip(tensors, images(1).expand(-1, 3, -1, -1)))
    save_file({"visual.proj": torch.zeros(1)}, file)
    with pytest.raises(MissingWeights, match="it is no CLIP"):
        check_features(FeatureConfig(name="clip", clip_weights=str(file)))


def test_a_program_of_torchscript_is_loaded_only_if_it_is_the_published_one(tmp_path, monkeypatch):
    program, file = io.BytesIO(), tmp_path / "clip.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), program)
    file.write_bytes(program.getvalue())
    run: list[object] = []
    monkeypatch.setattr(torch.jit, "load", lambda *given, **kept: run.append(given))
    with pytest.raises(MissingWeights, match="Clip weights cannot be loaded"):
        check_features(FeatureConfig(name="clip", clip_weights=str(file)))
    assert run == []
    assert len(CLIP_PUBLISHED.sha256) == 64
    assert CLIP_PUBLISHED.sha256 in CLIP_PUBLISHED.url


@pytest.mark.slow
@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_is_the_class_token_of_transformers_network(tmp_path, swiglu):
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as resize,
    )
    from torchvision.transforms.functional import normalize
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(4)
    config = Dinov2Config(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=14,
        image_size=70,
        use_swiglu_ffn=swiglu,
    )
    network, file = Dinov2Model(config).eval(), tmp_path / "model.safetensors"
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_file(network.state_dict(), file)
    extract = built(FeatureConfig(name="dinov2", dinov2_weights=str(file)))
    pixels = (images() * 127.5 + 127.5).round()
    shown = normalize(
        resize(pixels, size=(224, 224), align_corners=False),
        [255 * each for each in (0.485, 0.456, 0.406)],
        [255 * each for each in (0.229, 0.224, 0.225)],
    )
    with torch.no_grad():
        wanted = network(shown).last_hidden_state[:, 0]
    torch.testing.assert_close(extract(images()), wanted)
    assert extract(images()).shape == (4, 128)
    save_file({"embeddings.position_embeddings": torch.zeros(1, 5, 128)}, file)
    with pytest.raises(MissingWeights, match="it is no DINOv2"):
        check_features(FeatureConfig(name="dinov2", dinov2_weights=str(file)))
    with pytest.raises(MissingWeights, match=r"no file is named.*eval\.features\.dinov2_weights"):
        check_features(FeatureConfig(name="dinov2"))


@pytest.mark.parametrize("width", [0, 32, 96])
def test_a_width_of_no_dinov2_is_refused(tmp_path, width):
    file = tmp_path / "model.safetensors"
    tensors = {
        "embeddings.position_embeddings": torch.zeros(1, 5, width),
        "embeddings.patch_embeddings.projection.weight": torch.zeros(width, 3, 14, 14),
    }
    save_file(tensors, file)
    with pytest.raises(MissingWeights, match=f"it is no DINOv2: .*width of {width} "):
        check_features(FeatureConfig(name="dinov2", dinov2_weights=str(file)))


@pytest.mark.parametrize("package", ["torch_fidelity", "transformers"])
def test_a_package_that_is_missing_is_told_before_a_run(tmp_path, monkeypatch, package):
    for name in [each for each in sys.modules if each.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    config = FeatureConfig(name="dinov2", dinov2_weights=str(tmp_path / "weights"))
    named = package.replace("_", "-")
    with pytest.raises(MissingWeights, match=f"name=dinov2 needs the package {named}: pip install"):
        check_features(config)
