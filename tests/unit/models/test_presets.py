from pathlib import Path

import pytest
import yaml

from models.transformer.config import PRESETS, TransformerConfigError, preset
from models.transformer.cost import ModelShape, parameters

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "model"


def test_presets_are_the_sizes_of_dit_and_two_larger_ones() -> None:
    names = [name.partition("/")[0] for name in PRESETS[::2]]
    assert names == ["S", "B", "L", "XL", "XXL", "XXXL"]
    assert tuple(f"{name}/{patch}" for name in names for patch in (2, 4)) == PRESETS
    xl = preset("XL/2")
    assert (xl.depth, xl.width, xl.heads, xl.patch_size) == (28, 1152, 16, 2)
    small = preset("S/4")
    assert (small.depth, small.width, small.heads, small.patch_size) == (12, 384, 6, 4)
    assert all(preset(name).mlp_ratio == 4.0 and not preset(name).qk_norm for name in PRESETS)


def test_each_size_beyond_dit_has_twice_the_weights_of_the_one_before() -> None:
    counts = [
        parameters(
            ModelShape.of(preset(name), scales=3, channels=4, image_size=64, classes=1000)
        ).total
        for name in ("XL/2", "XXL/2", "XXXL/2")
    ]
    assert counts[1] / counts[0] == pytest.approx(2, rel=0.04)
    assert counts[2] / counts[1] == pytest.approx(2, rel=0.04)


@pytest.mark.parametrize("name", ["XXL/2", "XXL/4", "XXXL/2", "XXXL/4"])
def test_larger_presets_can_be_sharded_and_have_their_files(name: str) -> None:
    wanted = preset(name)
    assert wanted.width % (4 * wanted.heads) == 0
    assert wanted.width % 128 == 0
    values = yaml.safe_load((CONFIGS / f"{name.lower().replace('/', '_')}.yaml").read_text())
    assert values == {
        key: getattr(wanted, key) for key in ("depth", "width", "heads", "patch_size")
    }


@pytest.mark.parametrize("name", ["XXXXL/2", "B/8", "B", ""])
def test_unknown_presets_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(TransformerConfigError, match="XL/2"):
        preset(name)
