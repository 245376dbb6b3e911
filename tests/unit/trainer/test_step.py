"""One update: what the step makes of a batch."""

import pytest
import torch

from cluster.placement import Placement
from models.codec import AutoencoderKlCodec
from models.ema import EmaConfig
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.objective import Objective
from models.pyramid import band_statistics, split
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer, OnBuilt
from pipelines.loading.loader import Batch
from tests.support.autoencoder import tiny_autoencoder
from tests.support.loss_watch import watch
from trainer import rng
from trainer.config.job import TrainConfig
from trainer.engine.build import build_engine
from trainer.engine.optimizer import OptimConfig
from trainer.engine.protocol import EngineConfig
from trainer.metrics.buffer import MetricBuffer
from trainer.state import TrainState
from trainer.training.step import TrainStep

FLOW = Flow(FlowConfig(scales=2))
CPU = torch.device("cpu")
SEED, FIRST = 3, 40


@pytest.fixture(scope="module")
def codec():
    return AutoencoderKlCodec(tiny_autoencoder())


@pytest.fixture(scope="module")
def images():
    return torch.rand(8, 1, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def model(on_built: OnBuilt) -> LapFlowTransformer:
    return LapFlowTransformer(
        TransformerConfig(depth=1, width=16, heads=2, patch_size=2),
        scales=2,
        channels=4,
        image_size=8,
        classes=10,
        on_built=on_built,
    )


def updated(bands, *, micro_batch=8, first_image=FIRST, encoder=None) -> dict[str, float]:
    """Run one update of a fresh model and return its metrics."""
    torch.manual_seed(0)
    metrics = MetricBuffer(CPU)
    step = TrainStep(
        engine=build_engine(
            model,
            config=EngineConfig(kind="plain"),
            placement=Placement((1, 1)),
            optim=OptimConfig(),
            ema=EmaConfig(),
            micro_batch=micro_batch,
            rank_batch=8,
            world_size=1,
            device=CPU,
        ),
        objective=Objective(FLOW),
        config=TrainConfig(seed=SEED, global_batch=8),
        optim=OptimConfig(),
        metrics=metrics,
        noise_size=FLOW.noise_size(channels=4, image_size=8),
        null_label=10,
        micro_batch=micro_batch,
        device=CPU,
        watch=watch(OptimConfig()),
        encoder=encoder,
    )
    batch = Batch(bands=bands, labels=torch.arange(8), sample_ids=torch.arange(8), skipped=0)
    step(batch, TrainState(images=FIRST), first_image=first_image)
    return metrics.flush()


def encoded(codec, images, *, first_image=FIRST):
    """Bands of the latents, with the posterior drawn for each image of the run by itself."""
    latents = []
    for position, image in enumerate(images):
        normals = rng.normals(SEED, "posterior", first=first_image + position, count=1, size=256)
        latents.append(codec.encode(image[None], normals))
    return split(torch.cat(latents), 2)


def test_images_are_encoded_and_split_on_the_device(codec, images):
    apart = updated(encoded(codec, images))
    together = updated((images,), encoder=codec)
    assert together == pytest.approx(apart, rel=1e-4, abs=1e-6)
    halves = updated((images,), encoder=codec, micro_batch=4)
    assert halves["loss/total"] == pytest.approx(together["loss/total"], rel=1e-4)


def test_the_posterior_belongs_to_the_image_of_the_run(codec, images):
    here = updated((images,), encoder=codec)
    assert updated((images,), encoder=codec) == here
    later = updated((images,), encoder=codec, first_image=FIRST + 8)
    assert later["training_data/scale_0_std"] != here["training_data/scale_0_std"]


def test_the_moments_of_every_band_are_recorded(images):
    bands = split(torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 2)
    metrics = updated(bands)
    statistics = band_statistics(bands)
    for position, k in enumerate((1, 0)):
        assert metrics[f"training_data/scale_{k}_std"] == pytest.approx(
            statistics.std[position].item()
        )
        assert metrics[f"training_data/scale_{k}_mean"] == pytest.approx(
            statistics.mean[position].item(), abs=1e-7
        )
