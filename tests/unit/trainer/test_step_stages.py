"""The stages of an update, and the losses it tells per scale and time."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.objective import Objective
from models.pyramid import split
from pipelines.loading.loader import Batch
from tests.support.loss_watch import watch
from trainer import rng
from trainer.config.job import TrainConfig
from trainer.engine.optimizer import OptimConfig
from trainer.engine.protocol import UpdateOutcome
from trainer.metrics.buffer import MetricBuffer
from trainer.state import TrainState
from trainer.training.step import TrainStep

SIZE, CLASSES = 8, 3


class Linear:
    """An engine around one number for each scale, which keeps what it was given."""

    def __init__(self) -> None:
        self.weight = torch.tensor([0.3, 0.6, 0.9], requires_grad=True)
        self.seen: list[tuple[list[int], Tensor]] = []

    def __call__(self, states: tuple[Tensor, ...], time: Tensor, labels: Tensor):
        self.seen.append(([len(state) for state in states], time))
        return tuple(w * state for w, state in zip(self.weight, states, strict=False))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def update(self, *, learning_rate: float, ema_decays: Sequence[float]) -> UpdateOutcome:
        return UpdateOutcome(applied=torch.tensor(True), gradient_norm=torch.tensor(1.0))

    def fragments(self) -> list:
        return []

    def load_fragments(self, updates: int) -> None: ...

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        yield nn.Identity()


def run(
    choice: str, *, images: int, count: int, first: int, micro_batch: int, seed: int = 0
) -> tuple[Linear, dict[str, float]]:
    """Run one update with three scales; return the engine and the metrics of the losses."""
    flow = Flow(FlowConfig(scales=3, stage_choice=choice))
    engine, metrics = Linear(), MetricBuffer("cpu")
    step = TrainStep(
        engine=engine,
        objective=Objective(flow),
        config=TrainConfig(seed=seed),
        optim=OptimConfig(),
        metrics=metrics,
        noise_size=flow.noise_size(channels=1, image_size=SIZE),
        null_label=CLASSES,
        micro_batch=micro_batch,
        device=torch.device("cpu"),
        watch=watch(OptimConfig()),
    )
    pixels = rng.normals(1, "images", first=first, count=count, size=SIZE**2)
    batch = Batch(
        bands=split(pixels.view(-1, 1, SIZE, SIZE), 3),
        labels=torch.arange(first, first + count) % CLASSES,
        sample_ids=torch.arange(first, first + count),
        skipped=0,
    )
    step(batch, TrainState(images=images), first_image=first)
    told = {name: value for name, value in metrics.flush().items() if name.startswith("loss")}
    return engine, told


def stage_of(engine: Linear) -> int:
    (stage,) = {3 - len(carried) for carried, _ in engine.seen}
    return stage


@pytest.mark.parametrize("images", [0, 12, 24, 36, 48, 60])
def test_ranks_and_micro_batches_of_an_update_share_its_stage(images: int) -> None:
    engines = [
        run("one_per_step", images=images, count=6, first=images + 6 * rank, micro_batch=micro)[0]
        for rank in range(2)
        for micro in (2, 3, 6)
    ]
    assert len({stage_of(engine) for engine in engines}) == 1
    assert [len(engine.seen) for engine in engines] == [3, 2, 1, 3, 2, 1]


@pytest.mark.slow
def test_stages_are_uniform_over_the_updates_and_follow_the_seed() -> None:
    def stages(seed: int, updates: int) -> list[int]:
        places = [32 * update for update in range(updates)]
        return [
            stage_of(run("one_per_step", images=i, count=1, first=i, micro_batch=1, seed=seed)[0])
            for i in places
        ]

    drawn = stages(0, 180)
    counts = Counter(drawn)
    assert set(counts) == {0, 1, 2}
    # 4.5 standard deviations
    assert all(abs(count - 60) < 28 for count in counts.values())
    assert drawn[:30] != stages(1, 30)


@pytest.mark.parametrize("choice", ["stratified", "one_per_step"])
def test_losses_are_told_per_scale_and_time(choice: str) -> None:
    engine, metrics = run(choice, images=96, count=48, first=96, micro_batch=48)
    _, parts = run(choice, images=96, count=48, first=96, micro_batch=6)
    assert parts == pytest.approx(metrics, rel=1e-5)
    ((carried, time),) = engine.seen
    for position, images in enumerate(carried):
        k = 2 - position
        sums = 0.0
        for part in range(5):
            name = f"loss_by_time/scale_{k}_{part / 5:.1f}-{(part + 1) / 5:.1f}"
            inside = int(((time[:images] * 5).floor() == part).sum())
            assert (name in metrics) == (inside > 0)
            sums += inside * metrics.get(name, 0.0)
        assert metrics[f"loss/scale_{k}"] == pytest.approx(sums / images, rel=1e-5)
    absent = {f"loss/scale_{2 - position}" for position in range(len(carried), 3)}
    assert not absent & metrics.keys()
    total = sum(metrics[f"loss/scale_{2 - p}"] * n / 48 for p, n in enumerate(carried))
    assert metrics["loss/total"] == pytest.approx(total, rel=1e-5)
