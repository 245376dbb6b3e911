"""How fast a run is, and what that takes of its devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cluster.hardware import peak_tflops
from models.transformer.cost import ModelShape, training_flops


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Speed over one window.

    Attributes:
        images_per_s: Images of the global batch per second of training.
        data_wait_share: Part of the window in which this rank waited for the loader, 0 to 1.
        remaining_s: Seconds until the run's last image at this speed, with as many interruptions
            on the way as there were so far.
    """

    images_per_s: float
    data_wait_share: float
    remaining_s: float


class Throughput:
    """Measures the window between two calls of `pace`, interruptions left out.

    Args:
        images: Images already seen when measuring starts.
        now: Monotonic clock in seconds.
    """

    def __init__(self, images: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._first_images = images
        self._images = images
        self._time = now()
        self._waited_s = 0.0
        self._interrupted_s = 0.0
        self._interrupted_before_s = 0.0

    def restart(self, *, images: int, waited_s: float) -> None:
        """Begin the window here: what came before was a start, which is slower than training.

        Args:
            images: Images seen so far.
            waited_s: Seconds waited for data since the run began.
        """
        self._images, self._time, self._waited_s = images, self._now(), waited_s
        self._interrupted_before_s = self._interrupted_s

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of a `with` block out of the speed."""
        _wait_for_device()  # what was asked of it before is training
        began = self._now()
        yield
        self._interrupted_s += self._now() - began

    def pace(self, *, images: int, total_images: int, waited_s: float) -> Pace:
        """Close the window and open the next.

        Args:
            images: Images seen so far.
            total_images: Images of the whole run.
            waited_s: Seconds waited for data since the run began.

        Returns:
            The pace of the window just closed.
        """
        _wait_for_device()  # or it would be the pace at which updates are queued
        interrupted_s = self._interrupted_s - self._interrupted_before_s
        elapsed = max(self._now() - self._time - interrupted_s, 1e-9)
        speed = (images - self._images) / elapsed
        share = min(1.0, max(0.0, (waited_s - self._waited_s) / elapsed))
        self.restart(images=images, waited_s=waited_s)
        remaining_s = float("inf")
        if speed > 0:
            interruption = self._interrupted_s / (images - self._first_images)
            remaining_s = (total_images - images) * (1 / speed + interruption)
        return Pace(images_per_s=speed, data_wait_share=share, remaining_s=remaining_s)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True)
class Load:
    """What training takes of the devices, by the formula of `models.transformer.cost`.

    Encoding images on the way, and what recomputation computes again, do not count.

    Attributes:
        flops_per_image: FLOPs of the forward and backward pass of an image.
        devices: How many devices train.
        peak_tflops: 10^12 dense bfloat16 FLOPs per second of one of them; None if not known.
    """

    flops_per_image: float
    devices: int
    peak_tflops: float | None

    @classmethod
    def of(cls, shape: ModelShape, *, devices: int, device: torch.device) -> Load:
        """Look up what a device can do.

        Args:
            shape: The model.
            devices: How many devices train it.
            device: One of them.
        """
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls(
            flops_per_image=training_flops(shape), devices=devices, peak_tflops=peak_tflops(name)
        )

    def figures(self, images_per_s: float) -> dict[str, float]:
        """Return the metrics of a speed: of each device images/s, TFLOP/s, and share of its peak.

        Args:
            images_per_s: Of all devices together.
        """
        own = images_per_s / self.devices
        tflops = own * self.flops_per_image / 1e12
        found = {"speed/images_per_s_per_device": own, "speed/tflops_per_device": tflops}
        if self.peak_tflops is not None:
            found["speed/mfu"] = tflops / self.peak_tflops
        return found

    def text(self, images_per_s: float) -> str:
        """Return them for a line about progress; nothing where the peak is not known."""
        if self.peak_tflops is None:
            return ""
        own, tflops, mfu = self.figures(images_per_s).values()
        return f" ({own:,.0f} a GPU, {tflops:,.0f} TFLOP/s, MFU {mfu:.1%})"
