"""Coarse scales on a CUDA stream of their own compute what they do on the caller's."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from trainer.engine.exchange import Exchange
from trainer.engine.expert_shards import ExpertShards
from trainer.engine.streams import CudaStreams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def alone() -> Iterator[Exchange]:
    """A group of one rank, which sends to itself whatever it would send to others."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield Exchange(ranks=1, index=0, group=None, replica_group=None)
    dist.destroy_process_group()


def network(
    *, own_stream: bool, checkpointed: tuple[int, ...], exchanges: dict[int, Exchange]
) -> LapFlowTransformer:
    device = torch.device("cuda")
    shards = ExpertShards(exchanges=exchanges)
    torch.manual_seed(0)
    model = LapFlowTransformer(
        TransformerConfig(depth=6, width=256, heads=4),
        scales=3,
        channels=4,
        image_size=32,
        classes=10,
        on_built=shards.partition,
    ).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.checkpoint_activations(checkpointed)
    shards.join(model)
    if own_stream:
        model.queue(CudaStreams(device))
    return model


@pytest.mark.parametrize("sharded", [(), (2, 1), (2, 1, 0)])
@pytest.mark.parametrize("checkpointed", [(), (0, 2)])
def test_outputs_and_gradients_are_the_same_on_two_streams(alone, sharded, checkpointed):
    one = network(own_stream=False, checkpointed=checkpointed, exchanges={})
    two = network(
        own_stream=True, checkpointed=checkpointed, exchanges=dict.fromkeys(sharded, alone)
    )
    # Often, and with other sizes in between, so that freed memory is used again at once. Where fine
    # scales are not active, a sharded one is the finest, and exchanges on the caller's stream.
    for turn in range(24):
        images = 6 + 3 * (turn % 4)
        generator = torch.Generator("cuda").manual_seed(turn)
        states = tuple(
            torch.randn(count, 4, 32 >> k, 32 >> k, device="cuda", generator=generator)
            for k, count in ((2, images), (1, 2 * images // 3), (0, images // 3))
        )
        states = states[: 3 - turn % 3]
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
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    # One set, whichever stream exchanged: to send from, and to receive into.
    assert len(alone.buffers._kept) == (2 if sharded else 0)
    alone.buffers.release()
