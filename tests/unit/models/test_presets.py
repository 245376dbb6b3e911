import pytest

from models.transformer.config import TransformerConfigError
from models.transformer.presets import PRESETS, preset


def test_presets_are_the_sizes_of_dit() -> None:
    assert PRESETS == ("S/2", "S/4", "B/2", "B/4", "L/2", "L/4", "XL/2", "XL/4")
    xl = preset("XL/2")
    assert (xl.depth, xl.width, xl.heads, xl.patch_size) == (28, 1152, 16, 2)
    small = preset("S/4")
    assert (small.depth, small.width, small.heads, small.patch_size) == (12, 384, 6, 4)
    assert all(preset(name).mlp_ratio == 4.0 and not preset(name).qk_norm for name in PRESETS)


@pytest.mark.parametrize("name", ["XXL/2", "B/8", "B", ""])
def test_unknown_presets_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(TransformerConfigError, match="XL/2"):
        preset(name)
