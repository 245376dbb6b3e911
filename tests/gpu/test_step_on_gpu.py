"""The host queues a whole step on a GPU without waiting for anything."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from cluster.contract import ClusterConfig, WorkerContext
from cluster.launcher import run
from cluster.placement import Placement
from tests.support.engine_worker import OPTIM, tiny_model
from tests.support.whole_step import EMA, IMAGES, MICRO_BATCH, some_images, whole_step
from trainer.engine.build import build_engine
from trainer.engine.protocol import EngineConfig
from trainer.state import TrainState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ENGINES: list[dict[str, Any]] = [
    {"kind": "plain", "precision": "fp32"},
    {"kind": "plain", "precision": "bf16"},
    {"kind": "zero", "zero_stage": 1, "precision": "bf16"},
    {"kind": "zero", "zero_stage": 2, "precision": "bf16"},
]


def test_a_step_synchronises_nothing():
    told: list[Any] = []
    config = ClusterConfig(backend="local", workers=1, gpus_per_worker=1)
    run(config, train, {}, on_message=told.append, stop=threading.Event())
    assert told == [{"engine": engine, "applied": 6} for engine in ENGINES]


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Raise where the host waits for the GPU: torch's own check sees all but what asks for it."""
    asked = mock.patch.object(torch.cuda, "synchronize", side_effect=AssertionError("it waits"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with asked:
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(context: WorkerContext, _payload: Mapping[str, Any]) -> None:
    """Train each engine for a few steps in which a wait is an error."""
    device = torch.device(context.device)
    for settings in ENGINES:
        engine = build_engine(
            tiny_model,
            config=EngineConfig(**settings),
            placement=Placement.of({}, scales=2),
            optim=OPTIM,
            ema=EMA,
            micro_batch=MICRO_BATCH,
            rank_batch=IMAGES,
            world_size=1,
            device=device,
        )
        step, state = whole_step(engine, device), TrainState()
        batches = [some_images(device) for _ in range(6)]
        for number, batch in enumerate(batches):
            # What is done for the first time may wait: memory, libraries, communicators.
            with waits_are_errors() if number >= 2 else nullcontext():
                step(batch, state, first_image=state.images)
            state.images += IMAGES
        step.settle()
        context.report({"engine": settings, "applied": state.updates})
