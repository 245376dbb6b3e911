"""Variations of one layout: coarse scales are computed once, and the images are the same."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.axes import Bands, to_images
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler import Samples, sample
from models.flow.sampler_config import SamplerConfig, SamplerConfigError, nfe_per_segment
from models.transformer.config import TransformerConfigError
from models.transformer.cost import CostError, ModelShape, multiply_adds, varied_multiply_adds
from tests.unit.models.reference import tiny_config, tiny_model, tiny_states

CHANNELS, SIZE, CLASSES = 2, 16, 5
LAYOUTS, VARIATIONS = 2, 3
IMAGES = LAYOUTS * VARIATIONS
LABELS = torch.tensor([1, 4]).repeat_interleave(VARIATIONS)
GUIDED = SamplerConfig(solver="ab2", steps=6, guidance_scale=2.0, guidance_interval=(0.2, 0.9))


class LaidOut(Flow):
    """A flow whose images have the coarse noise of the first of their layout."""

    def noise_bands(self, noise: torch.Tensor, *, channels: int, image_size: int) -> Bands:
        *coarse, finest = super().noise_bands(noise, channels=channels, image_size=image_size)
        return (*(to_images(band[::VARIATIONS], len(finest)) for band in coarse), finest)


def draw(model: object, flow: Flow, **options: object) -> Samples:
    numbers = flow.noise_size(channels=CHANNELS, image_size=SIZE)
    noise = torch.randn(
        IMAGES, numbers, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    settings = {
        "config": GUIDED,
        "noise": noise,
        "labels": LABELS,
        "channels": CHANNELS,
        "image_size": SIZE,
        "null_label": CLASSES,
    }
    return sample(model, flow=flow, **(settings | options))


@pytest.mark.parametrize("noise", ["banded", "independent"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "own_scale"},
        {"qk_norm": True, "class_tokens": 2, "positions": "aligned", "modulation": "shared"},
    ],
)
@pytest.mark.parametrize("scales", [2, 3])
def test_variations_are_the_images_that_are_drawn_one_by_one_of_the_same_noise(
    scales: int, options: dict[str, object], noise: str
) -> None:
    config = FlowConfig(scales=scales, noise=noise)
    model = tiny_model(scales=scales, **options)
    shared = draw(model, Flow(config), share_coarse=VARIATIONS)
    alone = draw(model, LaidOut(config))
    torch.testing.assert_close(shared.images, alone.images, rtol=1e-9, atol=1e-9)
    small = draw(model, Flow(config), share_coarse=VARIATIONS, finest_batch=VARIATIONS)
    torch.testing.assert_close(small.images, alone.images, rtol=1e-9, atol=1e-9)
    # The first of each layout is the image that its own noise gives.
    own = draw(model, Flow(config))
    torch.testing.assert_close(
        shared.images[::VARIATIONS], own.images[::VARIATIONS], rtol=1e-9, atol=1e-9
    )
    assert (shared.images[1] - own.images[1]).abs().max() > 0.01
    assert (shared.images[0] - shared.images[1]).abs().max() > 0.01
    *coarse, finest = nfe_per_segment(GUIDED, config.stages)
    assert shared.nfe == pytest.approx([*(each / VARIATIONS for each in coarse), finest])


@pytest.mark.parametrize("scales", [2, 3])
@pytest.mark.parametrize("attention", ["causal", "own_scale"])
def test_a_call_computes_coarse_scales_once_by_the_formula(scales: int, attention: str) -> None:
    shape = ModelShape.of(
        tiny_config(attention=attention),
        scales=scales,
        channels=CHANNELS,
        image_size=SIZE,
        classes=CLASSES,
    )
    model = tiny_model(scales=scales, attention=attention)
    batches = [LAYOUTS] * (scales - 1) + [IMAGES]
    states = tiny_states(scales=scales, batches=batches)
    # The CPU's flash kernel is not in the counter's registry; the plain one is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(states, torch.full((LAYOUTS,), 0.9, dtype=torch.float64), LABELS[::VARIATIONS])
    each = varied_multiply_adds(shape, variations=VARIATIONS)
    assert counter.get_total_flops() == pytest.approx(2 * IMAGES * each)
    assert multiply_adds(shape) == varied_multiply_adds(shape, variations=1) > each


def test_scales_that_only_some_images_share_are_computed_for_those() -> None:
    model = tiny_model(scales=3)
    coarse, middle, fine = tiny_states(scales=3, batches=[LAYOUTS, IMAGES, IMAGES])
    time = torch.tensor([0.8, 0.9], dtype=torch.float64)
    labels = LABELS[::VARIATIONS]
    got = model((coarse, middle, fine), time, labels)
    whole = (to_images(coarse, IMAGES), middle, fine)
    want = model(whole, to_images(time, IMAGES), to_images(labels, IMAGES))
    want = (want[0][::VARIATIONS], *want[1:])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_guided_step_is_one_call_of_the_network(scale: float) -> None:
    model, calls = tiny_model(scales=2), []

    def counted(states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        calls.append([len(state) for state in states])
        return model(states, time, labels)

    config = SamplerConfig(solver="euler", steps=4, guidance_scale=scale)
    draw(counted, Flow(FlowConfig(scales=2)), config=config, share_coarse=VARIATIONS)
    pairs = 1 if scale == 1 else 2
    assert calls == [[pairs * LAYOUTS]] * 2 + [[pairs * LAYOUTS, pairs * IMAGES]] * 2


def test_what_cannot_be_shared_is_refused() -> None:
    flow = Flow(FlowConfig(scales=2))
    with pytest.raises(SamplerConfigError, match="6 images are no whole layouts of share_coarse=4"):
        draw(tiny_model(scales=2), flow, share_coarse=4)
    with pytest.raises(SamplerConfigError, match="share_coarse=0 must be at least 1"):
        draw(tiny_model(scales=2), flow, share_coarse=0)
    with pytest.raises(SamplerConfigError, match="share_coarse=2 needs two or more scales"):
        draw(tiny_model(scales=1), Flow(FlowConfig(scales=1)), share_coarse=2)
    with pytest.raises(SamplerConfigError, match="share_coarse=2 needs a solver of fixed steps"):
        draw(tiny_model(scales=2), flow, share_coarse=2, config=SamplerConfig(solver="dopri5"))
    with pytest.raises(TransformerConfigError, match="attention=full coarse scales see the finest"):
        draw(tiny_model(scales=2, attention="full"), flow, share_coarse=2)
    for options in ({"scales": 1}, {"scales": 2, "attention": "full"}):
        scales = options.pop("scales")
        shape = ModelShape.of(
            tiny_config(**options), scales=scales, channels=2, image_size=16, classes=5
        )
        with pytest.raises(CostError, match="share nothing"):
            varied_multiply_adds(shape, variations=2)
