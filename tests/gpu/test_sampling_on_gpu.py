"""Samples on a GPU: precisions, recorded graphs and shared coarse scales give the same pictures."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.axes import Bands
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler import sample
from models.flow.sampler_config import SamplerConfig
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from tests.support.saved import save_random_model
from trainer.evaluation.config import ModelSource
from trainer.evaluation.graphs import CudaRecorder, GraphedNetwork
from trainer.evaluation.loading import load_model
from trainer.evaluation.precision import products_in
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
CLASSES, IMAGES = 10, 8
FLOW = Flow(FlowConfig(scales=3))
GUIDED = SamplerConfig(solver="heun", steps=9, guidance_scale=2.0, guidance_interval=(0.0, 0.9))


@pytest.fixture(scope="module")
def network() -> LapFlowTransformer:
    torch.manual_seed(0)
    with CUDA:
        model = LapFlowTransformer(
            TransformerConfig(depth=4, width=128, heads=2),
            scales=3,
            channels=4,
            image_size=32,
            classes=CLASSES,
        ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def draw(model: Callable[..., Bands], *, seed: int = 1, share_coarse: int = 1) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    numbers = FLOW.noise_size(channels=4, image_size=32)
    return sample(
        model,
        flow=FLOW,
        config=GUIDED,
        noise=torch.randn(IMAGES, numbers, generator=generator, device=CUDA),
        labels=torch.arange(IMAGES, device=CUDA) // share_coarse,
        channels=4,
        image_size=32,
        null_label=CLASSES,
        share_coarse=share_coarse,
    ).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_draw_what_is_drawn_without(network: LapFlowTransformer, dtype: torch.dtype) -> None:
    model = LapFlowTransformer(
        TransformerConfig(depth=4, width=128, heads=2),
        scales=3,
        channels=4,
        image_size=32,
        classes=CLASSES,
    ).cuda()
    model.load_state_dict(network.state_dict())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    graphed = GraphedNetwork(model.eval(), CudaRecorder())
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    with products_in("fp32", CUDA):
        for seed in (1, 2):
            got, want = draw(graphed, seed=seed), draw(model, seed=seed)
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        # Guided in three segments, and without guidance in the last.
        assert graphed.graphs == 4
        got, want = draw(graphed, share_coarse=4), draw(model, share_coarse=4)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert graphed.graphs > 4


def test_variations_of_a_layout_are_those_drawn_by_themselves(
    network: LapFlowTransformer,
) -> None:
    with products_in("fp32", CUDA):
        shared = draw(network, share_coarse=IMAGES)
        generator = torch.Generator(CUDA).manual_seed(1)
        numbers = FLOW.noise_size(channels=4, image_size=32)
        noise = torch.randn(IMAGES, numbers, generator=generator, device=CUDA)
        # The first is the sample of its own noise.
        alone = sample(
            network,
            flow=FLOW,
            config=GUIDED,
            noise=noise[:1],
            labels=torch.zeros(1, device=CUDA, dtype=torch.long),
            channels=4,
            image_size=32,
            null_label=CLASSES,
        ).images
    torch.testing.assert_close(shared[:1], alone, rtol=1e-3, atol=1e-3)
    assert (shared[1:] - shared[:1]).abs().amax((1, 2, 3)).min() > 0.01


def test_precisions_are_kept_to_and_put_back(tmp_path) -> None:
    store = open_store(f"{tmp_path}/runs", StoreConfig())
    save_random_model(store, run="small")
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    numbers = torch.randn(512, 512, device=CUDA)
    exact = numbers.double() @ numbers.double()
    errors = {}
    for precision in ("fp32", "tf32"):
        with products_in(precision, CUDA):
            errors[precision] = (numbers @ numbers - exact).abs().max().item()
        assert (matmul.allow_tf32, convolution.allow_tf32) == before
    if torch.cuda.get_device_capability() >= (8, 0):
        assert errors["tf32"] > 20 * errors["fp32"]
    images = {}
    for precision in ("fp32", "tf32", "bf16", "auto"):
        trained = load_model(ModelSource(checkpoint=f"{tmp_path}/runs/small"), precision=precision)
        sampler = trained.image_sampler(SamplerConfig(steps=8), seed=1, batch=4)
        images[precision] = sampler.all(trained.model, torch.tensor([0, 1, 0, 1])).images
    for precision, apart in (("tf32", 0.05), ("bf16", 0.2)):
        assert (images[precision] - images["fp32"]).abs().max() < apart
    chosen = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    torch.testing.assert_close(images["auto"], images[chosen])


def test_a_model_is_loaded_with_graphs(tmp_path) -> None:
    store = open_store(f"{tmp_path}/runs", StoreConfig())
    save_random_model(store, run="small")
    labels, images = torch.tensor([0, 1, 0, 1]), {}
    for graphs in (False, True):
        source = ModelSource(checkpoint=f"{tmp_path}/runs/small", graphs=graphs)
        trained = load_model(source, precision="fp32")
        assert isinstance(trained.model, GraphedNetwork) == graphs
        sampler = trained.image_sampler(SamplerConfig(steps=8), seed=1, batch=2)
        images[graphs] = sampler.all(trained.model, labels).images
    torch.testing.assert_close(images[True], images[False], rtol=1e-4, atol=1e-4)
