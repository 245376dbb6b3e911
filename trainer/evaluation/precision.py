"""In which precision samples are drawn: weights and activations, and products on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.products import float32_products
from trainer.config.reading import ConfigError
from trainer.engine.protocol import EngineConfig
from trainer.evaluation.config import Precision, PrecisionChoice


def drawing_precision(choice: PrecisionChoice, device: torch.device) -> Precision:
    """Return what a command draws in.

    Args:
        choice: What it was asked for.
        device: Where it draws.

    Raises:
        ConfigError: The device does not have it.
    """
    if choice == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"precision=tf32 is for NVIDIA's GPUs, and this draws on device={device}; give "
            "precision=fp32, or precision=bf16"
        )
    if choice != "auto":
        return choice
    return auto_precision(is_on_gpu=device.type == "cuda")


def auto_precision(*, is_on_gpu: bool) -> Precision:
    """Return what "auto" is: bf16 on a GPU, unless this machine has one without it."""
    lacks = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    return "bf16" if is_on_gpu and not lacks else "fp32"


def precision_of_training(engine: EngineConfig, device: torch.device) -> Precision:
    """Return what a run draws its own samples in: what it trains in.

    Args:
        engine: The run's engine.
        device: Where it draws.
    """
    if engine.precision == "bf16":
        return "bf16"
    return "tf32" if engine.tf32 and device.type == "cuda" else "fp32"


def is_of_training(precision: str, engine: EngineConfig) -> bool:
    """Tell whether a run of such an engine may have drawn in a precision, wherever it did.

    Older versions do not name it, and had no other.
    """
    drawn = {precision_of_training(engine, torch.device(kind)) for kind in ("cpu", "cuda")}
    return precision in {"", *drawn}


@contextmanager
def products_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let products of float32 on a GPU be as a precision has them, for the time of a block.

    Args:
        precision: The precision.
        device: Where the block computes; on a processor nothing changes.
    """
    with float32_products(device, tf32=precision != "fp32"):
        yield
