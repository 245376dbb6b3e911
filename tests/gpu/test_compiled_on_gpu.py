"""Compiled blocks on a GPU compute what blocks do as they are, on one stream and on two."""

import jaxtyping
import pytest
import torch

from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from trainer.engine.compiled import check_compiler, compile_as_asked
from trainer.engine.protocol import EngineConfig
from trainer.engine.streams import CudaStreams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
IMAGES = (6, 4, 2)


def network(*, compiled: bool, own_stream: bool, dtype: torch.dtype) -> LapFlowTransformer:
    torch.manual_seed(0)
    model = LapFlowTransformer(
        TransformerConfig(depth=4, width=256, heads=4),
        scales=3,
        channels=4,
        image_size=32,
        classes=10,
    ).to(DEVICE, dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.checkpoint_activations((0,))
    if own_stream:
        model.queue(CudaStreams(DEVICE))
    compile_as_asked(model, EngineConfig(compile="blocks" if compiled else "off"))
    return model


def gradients(model: LapFlowTransformer, turn: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(turn)
    states = tuple(
        torch.randn(count, 4, 32 >> k, 32 >> k, device=DEVICE, generator=generator).to(dtype)
        for k, count in zip((2, 1, 0), IMAGES, strict=True)
    )
    time = torch.rand(IMAGES[0], device=DEVICE, generator=generator)
    model.zero_grad(set_to_none=True)
    outputs = model(states, time, torch.arange(IMAGES[0], device=DEVICE))
    torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
    return [*outputs, *(parameter.grad for parameter in model.parameters())]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the shape types of `models` unchecked: the compiler cannot trace the checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 5e-2, 2e-2)]
)
def test_outputs_and_gradients_are_those_of_blocks_as_they_are(own_stream, dtype, rtol, atol):
    check_compiler(DEVICE)
    plain = network(compiled=False, own_stream=False, dtype=dtype)
    compiled = network(compiled=True, own_stream=own_stream, dtype=dtype)
    # Often, so that memory that is freed on one stream is used again at once.
    for turn in range(8):
        wanted, got = (gradients(model, turn, dtype) for model in (plain, compiled))
        for one, other in zip(got, wanted, strict=True):
            largest = float(other.detach().abs().max())
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol * largest)
