"""Costs against the module itself, the executed operations, and the published table."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.transformer.config import PRESETS, Ties, TransformerConfig, preset
from models.transformer.cost import (
    CostError,
    ModelShape,
    average_multiply_adds,
    multiply_adds,
    parameters,
    training_multiply_adds,
)
from models.transformer.lapflow import LapFlowTransformer

# parameters in millions for K = 1, 2, 3; GMAC for K = 1; K = 2: coarse, both, average;
# K = 3: one, two, three active, average
TABLE = {
    "S": "33 65 97 | 6.05 | 1.41 7.61 4.51 | 0.35 1.77 8.01 3.36",
    "B": "130 259 388 | 23.0 | 5.56 28.9 17.2 | 1.41 6.98 30.4 12.9",
    "L": "458 913 1369 | 80.7 | 19.7 101.2 60.4 | 5.0 24.7 106.4 45.2",
    "XL": "675 1347 2019 | 118.6 | 29.0 148.7 88.9 | 7.4 36.5 156.4 66.5",
}


def latent_shape(size: str, scales: int) -> ModelShape:
    return ModelShape.of(
        preset(f"{size}/2"), scales=scales, channels=4, image_size=32, classes=1000
    )


LARGE_GRID = ModelShape.of(preset("S/2"), scales=4, channels=4, image_size=128, classes=1000)


@pytest.mark.parametrize("size", TABLE)
def test_published_table_to_its_printed_digits(size: str) -> None:
    shapes = [latent_shape(size, scales) for scales in (1, 2, 3)]
    columns = [[parameters(shape).total / 1e6 for shape in shapes]]
    for shape in shapes:
        counts = [multiply_adds(shape, active=active) for active in range(1, shape.scales + 1)]
        average = [average_multiply_adds(shape)] if shape.scales > 1 else []
        columns.append([count / 1e9 for count in counts + average])
    for printed, computed in zip(TABLE[size].split("|"), columns, strict=True):
        for digits, value in zip(printed.split(), computed, strict=True):
            decimals = len(digits.partition(".")[2])
            assert f"{value:.{decimals}f}" == digits


@pytest.mark.parametrize("name", PRESETS)
def test_formula_counts_the_parameters_of_every_preset(name: str) -> None:
    sizes = {"scales": 2, "channels": 4, "image_size": 32, "classes": 1000}
    with torch.device("meta"):
        model = LapFlowTransformer(preset(name), **sizes)
    counted = sum(p.numel() for p in model.parameters())
    assert parameters(ModelShape.of(preset(name), **sizes)).total == counted


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "qk_norm": {"qk_norm": True},
    "full": {"attention": "full"},
    "own_scale": {"attention": "own_scale"},
    "class_tokens": {"class_tokens": 5},
    "shared_modulation": {"modulation": "shared"},
    "all_tied": {"ties": Ties(scales=(0, 1))},
    "mlp_tied": {"ties": Ties(scales=(1, 0), parts=("mlp",))},
    "shared_and_tied": {
        "qk_norm": True,
        "class_tokens": 1,
        "modulation": "shared",
        "ties": Ties(scales=(0, 1), parts=("modulation", "attention", "embedding")),
    },
}


def options_of(scales: int) -> list[str]:
    """One scale has none to share its weights with."""
    return [name for name, option in OPTIONS.items() if scales > 1 or "ties" not in option]


@pytest.mark.parametrize(("scales", "option"), [(k, o) for k in range(1, 5) for o in options_of(k)])
def test_formula_counts_the_parameters_of_each_scale(scales: int, option: str) -> None:
    config = TransformerConfig(
        depth=3, width=20, heads=5, patch_size=1, mlp_ratio=2.5, **OPTIONS[option]
    )
    sizes = {"scales": scales, "channels": 3, "image_size": 8, "classes": 7}
    model = LapFlowTransformer(config, **sizes)
    counted = parameters(ModelShape.of(config, **sizes))
    named = dict(model.named_parameters())
    assert counted.total == sum(p.numel() for p in named.values())
    for position, k in enumerate(reversed(range(scales))):
        own = [p.numel() for name, p in named.items() if f".scale{k}." in name]
        assert counted.per_scale[position] == sum(own)
    assert counted.shared == sum(p.numel() for n, p in named.items() if "scale" not in n)


@pytest.mark.parametrize(
    ("scales", "active", "option"),
    [
        (scales, active, option)
        for scales, active in [(1, 1), (2, 1), (2, 2), (3, 3), (4, 3), (4, 4)]
        for option in options_of(scales)
    ],
)
def test_formula_counts_the_executed_multiply_adds(scales: int, active: int, option: str) -> None:
    config = TransformerConfig(depth=2, width=24, heads=3, mlp_ratio=3.0, **OPTIONS[option])
    sizes = {"scales": scales, "channels": 2, "image_size": 16, "classes": 3}
    model = LapFlowTransformer(config, **sizes)
    states = tuple(torch.randn(1, 2, 16 >> k, 16 >> k) for k in reversed(range(scales)))
    counter = FlopCounterMode(display=False)
    # The CPU's flash kernel is not in the counter's registry; the plain one is.
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(states[:active], torch.rand(1), torch.tensor([0]))
    shape = ModelShape.of(config, **sizes)
    assert counter.get_total_flops() == 2 * multiply_adds(shape, active=active)


def test_attention_and_token_ratios_of_equal_thirds() -> None:
    def pairs(shape: ModelShape, active: int) -> int:
        return sum(n * k for n, k in zip(shape.tokens, shape.keys(active), strict=False))

    single = pairs(latent_shape("XL", 1), 1)
    three = latent_shape("XL", 3)
    dense = sum(sum(three.tokens[:active]) ** 2 for active in (1, 2, 3)) / 3
    prefix = sum(pairs(three, active) for active in (1, 2, 3)) / 3
    assert f"{dense / single:.3f}" == "0.608"
    assert prefix == (3 * 16 * 16 + 2 * 64 * 80 + 256 * 336) / 3
    assert f"{prefix / single:.4f}" == "0.4935"
    assert pairs(three, 3) == 91_392
    assert Fraction(int(3 * prefix), 3 * single) == Fraction(379, 768)
    two = latent_shape("XL", 2)
    assert sum(sum(two.tokens[:active]) for active in (1, 2)) / 2 / 256 == 0.75
    assert sum(sum(three.tokens[:active]) for active in (1, 2, 3)) / 3 / 256 == 0.5625


def test_average_follows_the_critical_times() -> None:
    shape = latent_shape("S", 2)
    coarse, both = multiply_adds(shape, active=1), multiply_adds(shape)
    average = average_multiply_adds(shape, critical_times=(0.9,))
    assert average == pytest.approx(0.9 * coarse + 0.1 * both)


@pytest.mark.parametrize("scales", [2, 3, 4])
def test_training_spends_what_sampling_does_within_a_percent(scales: int) -> None:
    shape = latent_shape("XL", scales) if scales < 4 else LARGE_GRID
    assert training_multiply_adds(shape) == pytest.approx(average_multiply_adds(shape), rel=0.01)


def test_step_cost_ratios_to_the_single_scale_model() -> None:
    single = multiply_adds(latent_shape("B", 1))
    ratios = [training_multiply_adds(latent_shape("B", scales)) / single for scales in (2, 3)]
    assert [f"{ratio:.3f}" for ratio in ratios] == ["0.748", "0.562"]


@pytest.mark.usefixtures("without_type_checks")
def test_questions_without_an_answer_are_refused() -> None:
    shape = latent_shape("S", 2)
    with pytest.raises(CostError, match="active=3"):
        multiply_adds(shape, active=3)
    with pytest.raises(CostError, match="active=0"):
        multiply_adds(shape, active=0)
    with pytest.raises(CostError, match="give 1 times"):
        average_multiply_adds(shape, critical_times=(0.6, 0.3))
