"""Coarse scales on a CUDA stream of their own compute what they do on the caller's."""

import pytest
import torch

from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from trainer.engine.build import CudaStreams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def network(*, own_stream: bool, checkpointed: tuple[int, ...]) -> LapFlowTransformer:
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = LapFlowTransformer(
        TransformerConfig(depth=6, width=256, heads=4),
        scales=3,
        channels=4,
        image_size=32,
        classes=10,
    ).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.checkpoint_activations(checkpointed)
    if own_stream:
        model.queue(CudaStreams(device))
    return model


@pytest.mark.parametrize("checkpointed", [(), (0, 2)])
def test_outputs_and_gradients_are_the_same_on_two_streams(checkpointed):
    one, two = (network(own_stream=own, checkpointed=checkpointed) for own in (False, True))
    # Often, and with other sizes in between, so that freed memory is used again at once.
    for turn in range(20):
        images = 6 + 3 * (turn % 4)
        generator = torch.Generator("cuda").manual_seed(turn)
        states = tuple(
            torch.randn(count, 4, 32 >> k, 32 >> k, device="cuda", generator=generator)
            for k, count in ((2, images), (1, 2 * images // 3), (0, images // 3))
        )
        time = torch.rand(images, device="cuda", generator=generator)
        labels = torch.arange(images, device="cuda") % 10
        found = []
        for model in (one, two):
            model.zero_grad(set_to_none=True)
            outputs = model(states, time, labels)
            sum(output.square().mean() for output in outputs).backward()
            found.append((outputs, [parameter.grad for parameter in model.parameters()]))
        (outputs, gradients), (other_outputs, other_gradients) = found
        for got, wanted in zip(other_outputs, outputs, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        for got, wanted in zip(other_gradients, gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
