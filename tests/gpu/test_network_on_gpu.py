"""The network on a GPU: the same numbers, on kernels that keep no score matrix, and compiled."""

import jaxtyping
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.transformer.attention import prefix_attention
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from tests.unit.models.reference import tiny_model, tiny_states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TIME = torch.tensor([0.1, 0.55, 0.93], dtype=torch.float64)
LABELS = torch.tensor([0, 5, 3])


@pytest.mark.parametrize("attention", ["causal", "full", "own_scale"])
def test_a_gpu_computes_what_the_processor_does(attention: str) -> None:
    model = tiny_model(scales=3, attention=attention)
    states = tiny_states(scales=3, batches=[3, 2, 1])
    want = model(states, TIME, LABELS)
    got = model.cuda()(tuple(s.cuda() for s in states), TIME.cuda(), LABELS.cuda())
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-9)


def test_prefix_attention_runs_on_flash_kernels_without_a_score_matrix() -> None:
    images, heads, width = 8, 12, 64
    sizes = [256, 1024, 4096]
    parts = [
        tuple(
            torch.randn(
                images, n, heads, width, device="cuda", dtype=torch.bfloat16
            ).requires_grad_()
            for n in sizes
        )
        for _ in range(3)
    ]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        gathered = prefix_attention(*parts)
        sum(x.float().sum() for x in gathered).backward()
    peak = torch.cuda.max_memory_allocated() - before
    scores = 2 * images * heads * sizes[-1] * sum(sizes)
    assert peak < scores / 4


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the shape types of `models` unchecked: the compiler cannot trace the checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unchecked")
def test_a_compiled_network_has_one_graph_for_each_number_of_scales() -> None:
    import torch._dynamo.testing  # seconds, which the collection of tests need not take

    torch.manual_seed(0)
    model = LapFlowTransformer(
        TransformerConfig(depth=2, width=128, heads=2),
        scales=2,
        channels=4,
        image_size=32,
        classes=10,
    ).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
    states = tuple(torch.randn(4, 4, size, size, device="cuda") for size in (16, 32))
    time, labels = torch.rand(4, device="cuda"), torch.randint(10, (4,), device="cuda")
    for _ in range(3):
        for active in (1, 2):
            got = compiled(states[:active], time, labels)
            want = model(states[:active], time, labels)
            for ours, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert counter.frame_count == 2
