"""Record the losses of a tiny run: `make golden` rewrites the file.

The whole update is in it: stages, times, noise and label dropout from the run's seed, two scales,
two micro-batches, clipping, warm-up, AdamW and the moving average's schedule, on real digits, in
float32 as the engine trains. On a processor of the same kind the bits repeat.
"""

from __future__ import annotations

from pathlib import Path

import torch

from models.ema import EmaConfig
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.objective import Objective
from models.pyramid import split
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer, OnBuilt, no_op
from pipelines.loading.loader import Batch
from tests.support.loss_watch import watch
from trainer.config.job import TrainConfig
from trainer.engine.expert_shards import ExpertShards
from trainer.engine.optimizer import OptimConfig
from trainer.engine.plain import PlainEngine
from trainer.metrics.buffer import MetricBuffer
from trainer.metrics.curves import Curves, curves_as_json
from trainer.state import TrainState
from trainer.training.step import TrainStep

FILE = Path(__file__).parent / "two_scales.json"

_UPDATES, _BATCH, _SIZE, _CLASSES = 30, 32, 8, 10
_RECORDED = ("loss/total", "loss/scale_0", "loss/scale_1", "optim/gradient_norm")


def recorded() -> Curves:
    """Train the tiny model, on one thread, and return its curves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _trained()
    finally:
        torch.set_num_threads(threads)


def kind() -> dict[str, str]:
    """What decides in which order sums are rounded: torch, and the processor's instructions."""
    wanted = ("vendor_id", "cpu family", "model", "stepping")
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    processor = {name.strip(): value.strip() for name, _, value in lines}
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": " ".join(processor.get(name, "?") for name in wanted),
    }


def _model(on_built: OnBuilt) -> LapFlowTransformer:
    return LapFlowTransformer(
        TransformerConfig(depth=2, width=32, heads=2),
        scales=2,
        channels=1,
        image_size=_SIZE,
        classes=_CLASSES,
        on_built=on_built,
    )


def _trained() -> Curves:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    flow = Flow(FlowConfig(scales=2))
    optim = OptimConfig(learning_rate=3e-3, clip_norm=1.0, warmup_images=4 * _BATCH)
    metrics = MetricBuffer("cpu")
    step = TrainStep(
        engine=PlainEngine(
            _model,
            arrange=no_op,
            shards=ExpertShards(exchanges={}),
            optim=optim,
            ema=EmaConfig(),
            grad_accum_steps=2,
            device=torch.device("cpu"),
        ),
        objective=Objective(flow),
        config=TrainConfig(total_images=_UPDATES * _BATCH, global_batch=_BATCH),
        optim=optim,
        metrics=metrics,
        noise_size=flow.noise_size(channels=1, image_size=_SIZE),
        null_label=_CLASSES,
        micro_batch=_BATCH // 2,
        device=torch.device("cpu"),
        watch=watch(optim),
    )
    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    state = TrainState()
    curves: dict[str, dict[int, float]] = {name: {} for name in _RECORDED}
    for update in range(_UPDATES):
        taken = slice(update * _BATCH, (update + 1) * _BATCH)
        batch = Batch(
            bands=split(images[taken], 2),
            labels=labels[taken],
            sample_ids=torch.arange(taken.start, taken.stop),
            skipped=0,
        )
        step(batch, state, first_image=state.images)
        state.images += _BATCH
        values = metrics.flush()
        for name, curve in curves.items():
            curve[state.images] = values[name]
    return curves


def main() -> None:
    """Write the file."""
    FILE.write_text(curves_as_json(recorded(), about=kind()))


if __name__ == "__main__":
    main()
