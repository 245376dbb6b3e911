import pytest
import torch

from models.transformer.embed import TimeEmbed, sincos_positions
from models.transformer.lapflow import (
    LapFlowTransformer,
    TransformerConfig,
    TransformerConfigError,
)
from tests.unit.models.reference import (
    reference_forward,
    reference_positions,
    tiny_model,
    tiny_states,
)

TIME = torch.tensor([0.1, 0.55, 0.93], dtype=torch.float64)
LABELS = torch.tensor([0, 5, 3])


def build(**changes: int) -> LapFlowTransformer:
    sizes = {"scales": 2, "channels": 2, "image_size": 16, "classes": 5} | changes
    return LapFlowTransformer(TransformerConfig(depth=2, width=24, heads=3), **sizes)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("scales", "active"), [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 4)])
def test_network_equals_the_dense_masked_reference(scales: int, active: int, qk_norm: bool) -> None:
    model = tiny_model(scales=scales, qk_norm=qk_norm)
    states = tiny_states(scales=scales, batches=[3] * active)
    expected = reference_forward(model, states, TIME, LABELS, heads=3)
    for got, want in zip(model(states, TIME, LABELS), expected, strict=True):
        assert want.abs().max() > 0.1
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_coarse_outputs_keep_every_bit_when_finer_tokens_change(dtype: torch.dtype) -> None:
    model = tiny_model(scales=3).to(dtype)
    states = tuple(s.to(dtype) for s in tiny_states(scales=3, batches=[3, 3, 3]))
    time = TIME.float()
    full = model(states, time, LABELS)
    for active in (1, 2):
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


def test_scales_may_hold_only_the_first_images() -> None:
    model = tiny_model(scales=3)
    states = tiny_states(scales=3, batches=[3, 2, 1])
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


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny_model(scales=3, qk_norm=True)
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
def test_positions_by_the_book(grid: int, width: int) -> None:
    got = sincos_positions(grid, width)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference_positions(grid, width), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 10}, "multiple of 4"),
        ({"scales": 4, "image_size": 8}, "multiple of 16"),
        ({"scales": 0}, "scales=0"),
        ({"channels": 0}, "channels=0"),
        ({"classes": 0}, "classes=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(TransformerConfigError, match=words):
        build(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 100, "heads": 3}, "heads=3"),
        ({"width": 6, "heads": 3}, "divisible by 4"),
        ({"depth": 0}, "depth=0"),
        ({"patch_size": -1}, "patch_size=-1"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(
    changes: dict[str, int], words: str
) -> None:
    with pytest.raises(TransformerConfigError, match=words):
        TransformerConfig(**({"depth": 2, "width": 24, "heads": 3} | changes))
