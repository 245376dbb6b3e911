"""Recorded network calls: real recordings, of a tracer in the place of CUDA, give the same images.

The tracer notes each operation with the memory that it reads, as a CUDA graph does, and runs them
again without the network's Python.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from models.axes import Bands
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler import sample
from models.flow.sampler_config import SamplerConfig
from tests.unit.models.reference import tiny_model, tiny_states
from trainer.evaluation import graphs
from trainer.evaluation.graphs import GraphedNetwork, Replay, with_graphs

LABELS = torch.tensor([1, 4])


def trace(compute: Callable[[], Bands]) -> Replay:
    graph = make_fx(compute)()
    places = [torch.empty_like(band) for band in compute()]

    def replay() -> Bands:
        for place, band in zip(places, graph(), strict=True):
            place.copy_(band)  # each replay writes where the one before it did
        return tuple(places)

    return replay


class Counted(torch.nn.Module):
    """A network that counts the calls of its Python."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny_model(scales=2)
        self.calls = 0

    def forward(self, states: Bands, time: Tensor, labels: Tensor) -> Bands:
        self.calls += 1
        velocities: Bands = self.network(states, time, labels)
        return velocities


def time_of(value: float) -> Tensor:
    return torch.full((2,), value, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_samples_are_the_same_and_each_shape_is_recorded_once() -> None:
    network = Counted()
    graphed = GraphedNetwork(network, trace)
    flow = Flow(FlowConfig(scales=2))

    def images(model: Callable[..., Bands], seed: int, share_coarse: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        numbers = flow.noise_size(channels=2, image_size=16)
        return sample(
            model,
            flow=flow,
            config=SamplerConfig(
                solver="heun", steps=6, guidance_scale=2.0, guidance_interval=(0.0, 0.8)
            ),
            noise=torch.randn(2, numbers, generator=generator, dtype=torch.float64),
            labels=LABELS,
            channels=2,
            image_size=16,
            null_label=5,
            share_coarse=share_coarse,
        ).images

    want = images(network, 1)
    network.calls = 0
    got = images(graphed, 1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # Guided and not, with one scale and with both; the guidance ends within the last segment.
    assert graphed.graphs == 3
    recording, network.calls = network.calls, 0
    assert recording == 2 * graphed.graphs
    torch.testing.assert_close(images(graphed, 2), images(network, 2), rtol=1e-12, atol=1e-12)
    assert graphed.graphs == 3
    # Weights that change in place are seen, as by a graph that holds their memory.
    with torch.no_grad():
        network.network.final["scale0"].projection.bias.add_(0.5)
    assert (images(graphed, 1) - want).abs().max() > 0.1
    torch.testing.assert_close(images(graphed, 1), images(network, 1), rtol=1e-12, atol=1e-12)
    shared = images(graphed, 3, share_coarse=2)
    torch.testing.assert_close(shared, images(network, 3, share_coarse=2), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_a_result_outlives_the_next_call() -> None:
    graphed = GraphedNetwork(tiny_model(scales=2), trace)
    states = tiny_states(scales=2, batches=[2, 2])
    first = graphed(states, time_of(0.6), LABELS)
    kept = [band.clone() for band in first]
    second = graphed(tuple(2 * state for state in states), time_of(0.9), LABELS)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("unchecked")
def test_beyond_so_many_shapes_calls_are_made_without_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 1)
    network = Counted()
    graphed = GraphedNetwork(network, trace)
    states = tiny_states(scales=2, batches=[2, 2])
    for active in (1, 2, 1, 2):
        got = graphed(states[:active], time_of(0.7), LABELS)
        want = network.network(states[:active], time_of(0.7), LABELS)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert graphed.graphs == 1
    assert network.calls == 2 + 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "calls of 1 shapes are recorded, and those of further shapes" in record.getMessage()


def test_what_cannot_be_recorded_is_computed_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(compute: Callable[[], Bands]) -> Replay:
        compute()
        raise RuntimeError("operation not permitted when stream is capturing\nmore words")

    network = Counted()
    graphed = GraphedNetwork(network, refuse)
    states = tiny_states(scales=2, batches=[2, 2])
    for active in (2, 1):
        got = graphed(states[:active], time_of(0.7), LABELS)
        want = network.network(states[:active], time_of(0.7), LABELS)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert network.calls == 1 + 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "graphs=true has no effect from here on" in record.getMessage()
    assert "more words" not in record.getMessage()

    def starve(compute: Callable[[], Bands]) -> Replay:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        GraphedNetwork(network, starve)(states, time_of(0.7), LABELS)


def test_a_processor_draws_without_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    network = Counted()
    assert with_graphs(network, torch.device("cpu")) is network
    assert "graphs=true needs a GPU" in caplog.text
