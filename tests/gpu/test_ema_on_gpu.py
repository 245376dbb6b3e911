"""An average in host memory follows weights on a GPU to the bit, beside what the GPU computes."""

import gc
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from cluster.contract import ClusterConfig, WorkerContext
from cluster.launcher import run
from cluster.placement import Placement
from models.ema import EmaConfig
from tests.support.engine_worker import OPTIM, tiny_model
from trainer.engine.build import build_engine
from trainer.engine.ema import MovingAverage
from trainer.engine.ema_room import CHUNK_ELEMENTS, LANES
from trainer.engine.protocol import EngineConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = (CHUNK_ELEMENTS + 1, 7, 3 * CHUNK_ELEMENTS - 5, 1, 2 * CHUNK_ELEMENTS)
ENGINES: list[dict[str, Any]] = [
    {"kind": "plain"},
    {"kind": "zero", "zero_stage": 1, "precision": "bf16"},
    {"kind": "zero", "zero_stage": 2},
    {"kind": "zero", "zero_stage": 3},
    {"kind": "zero", "zero_stage": 2, "offload_optimizer": True},
]


def drawn() -> list[torch.Tensor]:
    return [torch.randn(size, device="cuda") for size in SIZES]


@pytest.mark.parametrize("decay", [0.9999, 0.1])
def test_the_host_has_the_bits_of_the_device(decay):
    weights, work = drawn(), torch.randn(4096, 4096, device="cuda")
    beside, away = (MovingAverage(weights, device=device) for device in ("device", "host"))
    assert all(value.is_cuda for value in beside.values)
    assert all(value.is_pinned() for value in away.values)
    for turn in range(12):
        away.join()
        if turn % 2:
            # Weights that are still being made must be waited for. In other turns they follow upon
            # the last update at once, and must not overtake it.
            for _ in range(20):
                work = torch.nn.functional.normalize(work @ work)
        for weight in weights:
            weight.add_(torch.randn_like(weight), alpha=0.1)
        for average in (beside, away):
            average.follow(weights, decay=decay)
        if turn % 3 == 2:
            for value, wanted in zip(away.values, beside.values, strict=True):
                assert torch.equal(value, wanted.cpu()), turn
    kept = [weight.clone() for weight in weights]
    away.follow(weights, decay=decay)
    beside.follow(weights, decay=decay)
    with away.set_aside(weights):
        away.copy_to(weights)
        assert all(map(torch.equal, weights, beside.values))
    assert all(map(torch.equal, weights, kept))


def test_the_device_keeps_two_chunks_instead_of_the_average():
    weights = drawn()
    size = sum(weight.nbytes for weight in weights)

    gc.collect()
    before = torch.cuda.memory_allocated()
    average = MovingAverage(weights, device="device")
    beside = torch.cuda.memory_allocated() - before
    del average
    assert torch.cuda.memory_allocated() == before
    average = MovingAverage(weights, device="host")
    average.follow(weights, decay=0.5)
    away = torch.cuda.memory_allocated() - before
    rooms = LANES * CHUNK_ELEMENTS * 4
    assert away == rooms
    assert beside - away >= size - rooms


def test_host_memory_is_not_given_back_while_it_is_written():
    weights, work = drawn(), torch.randn(8192, 8192, device="cuda")
    average = MovingAverage(weights, device="host")
    for _ in range(50):
        work = torch.nn.functional.normalize(work @ work)
    average.follow(weights, decay=0.5)
    del average
    # It has waited for what was queued before the update, and so for the update.
    assert torch.cuda.current_stream().query()


@pytest.mark.slow
def test_it_follows_every_engine():
    told: list[Any] = []
    config = ClusterConfig(backend="local", workers=1, gpus_per_worker=1)
    run(config, following, {}, on_message=told.append, stop=threading.Event())
    assert told == [{"engine": engine, "moved": True} for engine in ENGINES]


def following(context: WorkerContext, _payload: Mapping[str, Any]) -> None:
    """Train each engine, its average on the host, beside an average that is worked out here."""
    device = torch.device(context.device)
    states = (torch.randn(4, 1, 4, 4, device=device), torch.randn(2, 1, 8, 8, device=device))
    time, labels = torch.rand(4, device=device), torch.arange(4, device=device) % 3
    for settings in ENGINES:
        engine = build_engine(
            tiny_model,
            config=EngineConfig(**settings),
            placement=Placement.of({}, scales=2),
            optim=OPTIM,
            ema=EmaConfig(device="host"),
            micro_batch=4,
            rank_batch=4,
            world_size=1,
            device=device,
        )
        # Live views, so that nothing waits for the average between updates.
        masters = [each.tensors["master"] for each in engine.fragments()]
        wanted = [master.clone() for master in masters]
        for _ in range(5):
            velocities = engine(states, time, labels)
            engine.backward(sum(v.square().mean() for v in velocities), last=True)
            assert engine.update(learning_rate=1e-2, ema_decays=(0.9,)).applied
            for average, master in zip(wanted, masters, strict=True):
                average.lerp_(master, 1.0 - 0.9)
        with engine.initial_weights():  # they go where the average comes from
            assert not any(map(torch.equal, masters, wanted)), settings
        averages = [each.tensors["ema"] for each in engine.fragments()]
        assert not any(each.is_cuda for each in averages)
        assert all(map(torch.equal, averages, (each.cpu() for each in wanted))), settings
        with engine.ema_weights():
            assert all(map(torch.equal, masters, wanted)), settings
        moved = not any(map(torch.equal, masters, wanted))
        context.report({"engine": settings, "moved": moved})
