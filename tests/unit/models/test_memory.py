"""What a model holds, against what autograd keeps and the shapes of its weights."""

from typing import Any

import pytest

from models.transformer.config import AttentionKind, Ties, TransformerConfig
from models.transformer.cost import (
    CostError,
    ModelShape,
    activation_elements,
    parameters,
    partitioned_parameters,
)
from models.transformer.lapflow import LapFlowTransformer
from tests.unit.models.kept import kept_bytes

IMAGES = 6


def sizes_of(scales: int) -> dict[str, int]:
    return {"scales": scales, "channels": 4, "image_size": 32, "classes": 10}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["causal", "full", "own_scale"])
@pytest.mark.parametrize("scales", [1, 2, 3])
def test_estimate_is_near_what_autograd_keeps(scales: int, attention: AttentionKind) -> None:
    config = TransformerConfig(depth=3, width=64, heads=2, attention=attention)
    model = LapFlowTransformer(config, **sizes_of(scales))
    shape = ModelShape.of(config, **sizes_of(scales))
    estimate = activation_elements(shape)
    # In equal shares of the stages, and all at the finest.
    stratified = [IMAGES * (k + 1) // scales for k in reversed(range(scales))]
    for images in (stratified, [IMAGES] * scales):
        expected = 4 * sum(map(int.__mul__, images, estimate))
        assert expected == pytest.approx(kept_bytes(model, images), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [(0,), (2, 1), (2, 1, 0)])
@pytest.mark.parametrize("attention", ["causal", "own_scale"])
def test_recomputed_scales_keep_what_is_estimated(
    checkpointed: tuple[int, ...], attention: AttentionKind
) -> None:
    config = TransformerConfig(depth=6, width=64, heads=2, attention=attention)
    model = LapFlowTransformer(config, **sizes_of(3))
    model.checkpoint_activations(checkpointed)
    shape = ModelShape.of(config, **sizes_of(3))
    kept = 4 * IMAGES * sum(activation_elements(shape, checkpointed=checkpointed))
    assert kept == pytest.approx(kept_bytes(model, [IMAGES] * 3), rel=0.04)
    assert kept < 4 * IMAGES * sum(activation_elements(shape))


def test_the_active_scales_are_the_first_of_all() -> None:
    shape = ModelShape.of(TransformerConfig(depth=3, width=64, heads=2), **sizes_of(3))
    assert activation_elements(shape, active=2) == activation_elements(shape)[:2]
    with pytest.raises(CostError, match="active=4"):
        activation_elements(shape, active=4)


@pytest.mark.parametrize(
    "option",
    [
        {},
        {"qk_norm": True},
        {"modulation": "shared", "qk_norm": True},
        {"ties": Ties(scales=(0, 2), parts=("mlp", "output"))},
    ],
)
def test_what_is_divided_are_the_large_layers_of_all_blocks_but_the_first(
    option: dict[str, Any],
) -> None:
    config = TransformerConfig(depth=3, width=20, heads=5, **option)
    model = LapFlowTransformer(config, **sizes_of(3))
    shape = ModelShape.of(config, **sizes_of(3))
    sharded = ("modulation.weight", "modulation.bias", ".qkv.weight", ".qkv.bias")
    sharded += tuple(f".mlp_{name}" for name in ("hidden.weight", "hidden.bias"))
    sharded += tuple(f".mlp_{name}" for name in ("output.weight", "output.bias"))
    named = dict(model.named_parameters())
    for position, k in enumerate((2, 1, 0)):
        own = {name: p.numel() for name, p in named.items() if f".scale{k}." in f".{name}."}
        divided = {
            name: count
            for name, count in own.items()
            if name.startswith(("blocks.1.", "blocks.2.")) and name.endswith(sharded)
        }
        counted = partitioned_parameters(shape)[position]
        assert sum(counted.values()) == sum(divided.values())
        assert counted["modulation"] == sum(
            count for name, count in divided.items() if "modulation" in name
        )
        assert sum(own.values()) == parameters(shape).per_scale[position]
