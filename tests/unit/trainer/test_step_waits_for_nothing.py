"""A step is queued without a look at any value of the device.

Its double is torch's fake tensor: it has a shape and no values, and raises where one is asked for.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from cluster.placement import Placement
from tests.support.engine_worker import OPTIM, tiny_model
from tests.support.whole_step import EMA, IMAGES, MICRO_BATCH, some_images, whole_step
from trainer.engine.build import build_engine
from trainer.engine.ema import decays_on_device
from trainer.engine.protocol import EngineConfig
from trainer.state import TrainState

CPU = torch.device("cpu")


def train(ranks: int, **settings: Any) -> TrainState:
    """Queue updates of an engine, then show that the double would have told of a look."""
    stay = patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with FakeTensorMode(allow_non_fake_inputs=True), stay:  # fake tensors cannot be moved
        engine = build_engine(
            tiny_model,
            config=EngineConfig(**settings),
            placement=Placement.of({}, scales=2),
            optim=OPTIM,
            ema=EMA,
            micro_batch=MICRO_BATCH,
            rank_batch=IMAGES,
            world_size=ranks,
            device=CPU,
        )
        step, state = whole_step(engine, CPU), TrainState()
        for _ in range(3):
            step(some_images(CPU), state, first_image=state.images)
            state.images += ranks * IMAGES
        for look in (step.settle, step.metrics.flush):
            with pytest.raises(DataDependentOutputException):
                look()
    return state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_one_device_a_step_waits_for_nothing(precision):
    train(1, precision=precision)


def train_on_a_rank(engines: list[dict[str, Any]]) -> int:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    for settings in engines:
        train(2, **settings)
    return len(engines)


@pytest.mark.slow
def test_with_zero_1_and_2_a_step_waits_for_nothing():
    engines = [
        {"kind": "zero", "zero_stage": stage, "precision": precision}
        for stage in (1, 2)
        for precision in ("fp32", "bf16")
    ]
    # In a process of its own: DeepSpeed keeps groups for all engines of one.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        assert process.submit(train_on_a_rank, engines).result() == len(engines)


@pytest.mark.parametrize("warmup", [True, False])
def test_the_device_knows_the_decays_of_the_host(warmup):
    config = EMA.__class__(decay=0.9999, decays=(0.5, 0.99), warmup=warmup)
    for update in (0, 1, 7, 8, 1000, 10**6):
        counted = torch.tensor(float(update), dtype=torch.float64)
        assert tuple(decays_on_device(config, counted).tolist()) == config.decays_at(update)
