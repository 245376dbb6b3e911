"""The evaluation at the end of a run: all ranks draw samples, the first measures them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.codec import Codec
from models.flow.flow import Flow
from models.flow.sampler import Samples
from trainer.checkpoint.store import Store
from trainer.engine.protocol import Engine
from trainer.evaluate.grid import grid_png
from trainer.evaluate.learned_features import LabelledImages
from trainer.evaluate.report import (
    EvalConfig,
    EvaluationReport,
    evaluate,
    evaluation_key,
)
from trainer.evaluate.samples import ImageShape, draw
from trainer.metrics.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class FinalEvaluation:
    """Draws and measures the samples of a trained run.

    Attributes:
        config: What to draw and measure.
        flow: The flow the model was trained with.
        shape: Shape of what the flow works on.
        codec: Makes images of it.
        device: Device of the model.
        held_out: Gives batches of held-out real images and labels.
        train: Gives batches of the training images and labels.
    """

    config: EvalConfig
    flow: Flow
    shape: ImageShape
    codec: Codec
    device: torch.device
    held_out: Callable[[], LabelledImages]
    train: Callable[[], LabelledImages]

    def run(
        self, engine: Engine, *, images: int, rank: int, store: Store, run: str, tracker: Tracker
    ) -> None:
        """Evaluate the EMA weights against the initial ones; a collective call.

        Args:
            engine: Holds the EMA.
            images: Images the weights were trained on.
            rank: This rank; the first one measures and publishes.
            store: Where results go.
            run: Name of the run.
            tracker: Takes the figures and the grid.
        """
        labels = torch.arange(self.config.samples) % self.shape.classes
        with engine.ema_weights() as model:
            samples = self._draw(model, labels)
            grid = self.draw_grid(model)
        # Where training started, in the place of the trained weights: there may be no other.
        with engine.initial_weights() as model:
            untrained = self._draw(model, labels).images
        if rank != 0:
            return
        report = evaluate(
            self.config,
            images=images,
            device=self.device,
            samples=(samples.images, labels),
            untrained=untrained,
            held_out=self.held_out,
            train=self.train,
            segment_evaluations=samples.evaluations,
        )
        self._publish(report, samples.images, labels, grid, store=store, run=run, tracker=tracker)

    def draw_grid(self, model: nn.Module) -> Tensor:
        """Draw one row of `grid_columns` images for each class shown; a collective call."""
        classes = min(self.config.grid_classes, self.shape.classes)
        labels = torch.arange(classes).repeat_interleave(self.config.grid_columns)
        return self._draw(model, labels).images

    def _draw(self, model: nn.Module, labels: Tensor) -> Samples:
        return draw(
            model,
            flow=self.flow,
            config=self.config.sampler,
            shape=self.shape,
            codec=self.codec,
            labels=labels,
            seed=self.config.seed,
            batch=self.config.batch,
            device=self.device,
        )

    def _publish(
        self,
        report: EvaluationReport,
        samples: Tensor,
        labels: Tensor,
        grid: Tensor,
        *,
        store: Store,
        run: str,
        tracker: Tracker,
    ) -> None:
        picture = grid_png(grid, columns=self.config.grid_columns)
        # The report comes last: where it is, the evaluation is complete.
        results = {
            "samples.npz": _npz(samples, labels),
            "grid.png": picture,
            "report.json": json.dumps(report.to_dict(), indent=2).encode(),
        }
        for name, data in results.items():
            store.put(evaluation_key(run, report.images, name), data)
        tracker.metrics(report.metrics(), images=report.images)
        tracker.image("evaluation", picture, images=report.images)


def _npz(samples: Tensor, labels: Tensor) -> bytes:
    """Pack samples as FID tools expect them: uint8 NHWC under arr_0, labels under arr_1."""
    pixels = (samples * 127.5 + 127.5).round().clamp(0, 255).byte()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pixels.permute(0, 2, 3, 1).numpy(), labels.numpy())
    return buffer.getvalue()
