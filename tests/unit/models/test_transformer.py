import copy
from typing import Any

import pytest
import torch

from models.transformer.config import Ties, TransformerConfig, TransformerConfigError
from models.transformer.lapflow import LapFlowTransformer, TimeEmbed, sincos_positions
from tests.unit.models.reference import (
    reference_forward,
    reference_positions,
    tiny_config,
    tiny_model,
    tiny_states,
)

TIME = torch.tensor([0.1, 0.55, 0.93], dtype=torch.float64)
LABELS = torch.tensor([0, 5, 3])


def build(*, ties: Ties | None = None, **changes: int) -> LapFlowTransformer:
    sizes = {"scales": 2, "channels": 2, "image_size": 16, "classes": 5} | changes
    config = TransformerConfig(depth=2, width=24, heads=3, ties=ties or Ties())
    return LapFlowTransformer(config, **sizes)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "qk_norm": {"qk_norm": True},
    "full": {"attention": "full"},
    "own_scale": {"attention": "own_scale"},
    "aligned": {"positions": "aligned"},
    "class_tokens": {"class_tokens": 3},
    "shared_modulation": {"modulation": "shared"},
    "all_tied": {"ties": Ties(scales=(0, 1))},
    "mlp_tied": {"ties": Ties(scales=(0, 1), parts=("mlp",))},
    "attention_tied": {"qk_norm": True, "ties": Ties(scales=(1, 0), parts=("attention",))},
    "modulation_tied": {"modulation": "shared", "ties": Ties(scales=(0, 1), parts=("modulation",))},
    "everything": {
        "qk_norm": True,
        "attention": "full",
        "positions": "aligned",
        "class_tokens": 2,
        "modulation": "shared",
        "ties": Ties(scales=(0, 1), parts=("embedding", "modulation", "output")),
    },
}


UNTIED = [name for name, option in OPTIONS.items() if "ties" not in option]


@pytest.mark.parametrize(
    ("scales", "active", "option"),
    [(1, 1, o) for o in UNTIED]
    + [(k, a, o) for k, a in [(2, 1), (2, 2), (3, 2), (3, 3), (4, 4)] for o in OPTIONS],
)
def test_network_equals_the_dense_masked_reference(scales: int, active: int, option: str) -> None:
    options = OPTIONS[option]
    model = tiny_model(scales=scales, **options)
    states = tiny_states(scales=scales, batches=[3] * active)
    expected = reference_forward(model, states, TIME, LABELS, config=tiny_config(**options))
    for got, want in zip(model(states, TIME, LABELS), expected, strict=True):
        assert want.abs().max() > 0.1
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scales", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_coarse_outputs_keep_every_bit_when_finer_tokens_change(
    dtype: torch.dtype, scales: int
) -> None:
    model = tiny_model(scales=scales).to(dtype)
    states = tuple(s.to(dtype) for s in tiny_states(scales=scales, batches=[3] * scales))
    time = TIME.float()
    full = model(states, time, LABELS)
    for active in range(1, scales):
        dropped = model(states[:active], time, LABELS)
        altered = model(
            (*states[:active], *(1e3 * torch.ones_like(s) for s in states[active:])), time, LABELS
        )
        for position in range(active):
            assert torch.equal(dropped[position], full[position])
            assert torch.equal(altered[position], full[position])
        assert not torch.equal(altered[active], full[active])


def test_fine_outputs_do_depend_on_coarser_tokens() -> None:
    model = tiny_model(scales=2)
    coarse, fine = tiny_states(scales=2, batches=[3, 3])
    _, plain = model((coarse, fine), TIME, LABELS)
    _, changed = model((coarse + 1, fine), TIME, LABELS)
    assert (plain - changed).abs().max() > 1e-3


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("batches", [[3, 2, 1], [3, 3, 1], [3, 3, 3], [3, 1, 1]])
def test_scales_may_hold_only_the_first_images(option: str, batches: list[int]) -> None:
    model = tiny_model(scales=3, **OPTIONS[option])
    states = tiny_states(scales=3, batches=batches)
    outputs = model(states, TIME, LABELS)
    assert [tuple(out.shape) for out in outputs] == [tuple(s.shape) for s in states]
    for image in range(3):
        alone = model(
            tuple(s[image : image + 1] for s in states if s.shape[0] > image),
            TIME[image : image + 1],
            LABELS[image : image + 1],
        )
        for got, want in zip(outputs, alone, strict=False):
            torch.testing.assert_close(got[image : image + 1], want, rtol=1e-12, atol=1e-12)


def test_a_seed_fixes_every_weight() -> None:
    torch.manual_seed(7)
    first = build().state_dict()
    torch.manual_seed(7)
    second = build().state_dict()
    third = build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_initial_weights_follow_dit() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(depth=1, width=128, heads=4)
    model = LapFlowTransformer(config, scales=2, channels=4, image_size=16, classes=100)
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if name.endswith("bias") or "modulation" in name or name.startswith("final"):
            assert values.abs().max() == 0, name
        elif "time_embed" in name or "label_embed" in name:
            assert values.std() == pytest.approx(0.02, rel=0.05), name
        else:
            bound = (6 / sum(values.shape)) ** 0.5
            assert 0.97 * bound < values.abs().max() <= bound, name
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_a_fresh_network_predicts_zero() -> None:
    states = tuple(s.float() for s in tiny_states(scales=2, batches=[3, 3]))
    for out in build()(states, TIME.float(), LABELS):
        assert out.abs().max() == 0


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_gets_a_gradient(option: str) -> None:
    model = tiny_model(scales=3, **OPTIONS[option])
    states = tiny_states(scales=3, batches=[3, 2, 1])
    sum(out.square().mean() for out in model(states, TIME, LABELS)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-8, name


def test_names_say_whose_parameters_they_are() -> None:
    model = build(scales=2)
    names = list(model.state_dict())
    assert "blocks.1.experts.scale0.qkv.weight" in names
    assert "patch_embed.scale1.projection.bias" in names
    assert "final.scale0.modulation.weight" in names
    shared = {name.split(".")[0] for name in names if "scale" not in name}
    assert shared == {"time_embed", "label_embed"}
    owned = {k: [n for n in names if f".scale{k}." in n] for k in (0, 1)}
    assert [n.replace("scale0", "scale1") for n in owned[0]] == owned[1]
    assert not any("positions" in name for name in names)


def test_tied_weights_have_one_name_and_survive_saving_copying_and_moving() -> None:
    model = tiny_model(scales=3, ties=Ties(scales=(2, 0), parts=("attention", "output")))
    names = [name for name, _ in model.named_parameters()]
    assert sorted(names) == sorted(model.state_dict())
    assert "blocks.0.experts.scale2.qkv.weight" in names
    assert "blocks.0.experts.scale1.qkv.weight" in names
    assert "blocks.0.experts.scale0.qkv.weight" not in names
    assert "blocks.0.experts.scale0.mlp_hidden.weight" in names
    assert not any(name.startswith("final.scale0") for name in names)

    states = tiny_states(scales=3, batches=[3, 3, 3])
    want = model(states, TIME, LABELS)
    loaded = tiny_model(scales=3, ties=Ties(scales=(2, 0), parts=("attention", "output")))
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_state_dict(model.state_dict())
    copied = copy.deepcopy(loaded)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    for got, expected in zip(copied(states, TIME, LABELS), want, strict=True):
        assert torch.equal(got, expected)
    copied.float()
    copied(tuple(s.float() for s in states), TIME.float(), LABELS)


def test_tying_leaves_the_initial_values_of_other_weights() -> None:
    torch.manual_seed(3)
    free = build().state_dict()
    torch.manual_seed(3)
    tied = LapFlowTransformer(
        TransformerConfig(depth=2, width=24, heads=3, ties=Ties(scales=(0, 1))),
        scales=2,
        channels=2,
        image_size=16,
        classes=5,
    ).state_dict()
    assert set(tied) == {name for name in free if "scale0" not in name}
    assert all(torch.equal(tied[name], free[name]) for name in tied)


def test_the_finest_scale_is_scale_zero() -> None:
    model = build(scales=2)
    positions = dict(model.named_buffers())
    assert positions["patch_embed.scale0.positions"].shape == (64, 24)
    assert positions["patch_embed.scale1.positions"].shape == (16, 24)


@pytest.mark.parametrize("mode", ["whole module", "parameters", "autocast"])
def test_bfloat16_stays_near_float32(mode: str) -> None:
    model = tiny_model(scales=2).float()
    states = tuple(s.float() for s in tiny_states(scales=2, batches=[3, 2]))
    exact = model(states, TIME.float(), LABELS)
    if mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(states, TIME.float(), LABELS)
    else:
        if mode == "whole module":
            model.bfloat16()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        rounded = model(states, TIME.float(), LABELS)
    for got, want in zip(rounded, exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.1 * want.norm()


def test_time_keeps_its_precision_in_a_bfloat16_network() -> None:
    torch.manual_seed(0)
    embed = TimeEmbed(32)
    time = torch.tensor([0.5, 0.501, 0.999])
    exact = embed(time)
    rounded = embed.bfloat16()(time).float()
    assert (exact[0] - exact[1]).norm() > 0.1 * exact[0].norm()
    assert (rounded - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(("grid", "width"), [(1, 4), (3, 8), (4, 24)])
@pytest.mark.parametrize("spacing", [1, 2, 4])
def test_positions_by_the_book(grid: int, width: int, spacing: int) -> None:
    got = sincos_positions(grid, width, spacing=spacing)
    want = reference_positions(grid, width, spacing)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 10}, "multiple of 4"),
        ({"scales": 4, "image_size": 8}, "multiple of 16"),
        ({"scales": 0}, "scales=0"),
        ({"channels": 0}, "channels=0"),
        ({"classes": 0}, "classes=0"),
        ({"ties": Ties(scales=(0, 2))}, "names scale 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TransformerConfigError, match=words):
        build(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 100, "heads": 3}, "heads=3"),
        ({"width": 6, "heads": 3}, "divisible by 4"),
        ({"depth": 0}, "depth=0"),
        ({"patch_size": -1}, "patch_size=-1"),
        ({"class_tokens": -1}, "class_tokens=-1"),
        ({"attention": "none"}, "attention='none'"),
        ({"positions": "learned"}, "positions='learned'"),
        ({"modulation": "none"}, "modulation='none'"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_configs_that_contradict_themselves_are_refused(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(TransformerConfigError, match=words):
        TransformerConfig(**({"depth": 2, "width": 24, "heads": 3} | changes))


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"scales": (1,)}, "two or more"),
        ({"scales": (1, 1)}, "different scales"),
        ({"scales": (0, -1)}, "different scales"),
        ({"scales": (0, 1), "parts": ()}, "embedding, attention, mlp"),
        ({"scales": (0, 1), "parts": ("mlp", "mlp")}, "different ones"),
        ({"scales": (0, 1), "parts": ("head",)}, "'head'"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_ties_that_say_nothing_are_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(TransformerConfigError, match=words):
        Ties(**choices)
