"""The GPUs of a cluster and what connects them, as the planner needs to know them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Dense bfloat16 TFLOP/s with sums in float32, from NVIDIA's data sheets of each product; where a
# sheet gives the figure of sparse products alone, half of it. The first name that fits counts.
_PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 154.8,
}
# 10^9 bytes a second from and to the memory of the device, of the same sheets.
_MEMORY_GB_PER_S = {
    "GB200": 8000.0,
    "B200": 8000.0,
    "H100 PCIe": 2000.0,
    "H100 NVL": 3900.0,
    "H100": 3350.0,
    "H200": 4800.0,
    "GH200": 4000.0,
    "A100-SXM4-40GB": 1555.0,
    "A100-PCIE-40GB": 1555.0,
    "A100": 2039.0,
    "A40": 696.0,
    "A30": 933.0,
    "A10": 600.0,
    "L40S": 864.0,
    "L40": 864.0,
    "L4": 300.0,
    "RTX 6000 Ada": 960.0,
    "RTX A6000": 768.0,
}
_PART_OF_A_DEVICE = r"\bMIG\b"


def peak_tflops(name: str) -> float | None:
    """Return the peak of a device in dense bfloat16, 10^12 FLOPs per second.

    Args:
        name: As its driver calls it.

    Returns:
        What its data sheet promises; None for one that is not known, or a part of one.
    """
    return _look_up(_PEAK_TFLOPS, name)


def memory_gb_per_s(name: str) -> float | None:
    """Return the bandwidth of a device's own memory, 10^9 bytes per second.

    Args:
        name: As its driver calls it.

    Returns:
        What its data sheet promises; None for one that is not known, or a part of one.
    """
    return _look_up(_MEMORY_GB_PER_S, name)


def _look_up(figures: Mapping[str, float], name: str) -> float | None:
    if re.search(_PART_OF_A_DEVICE, name):
        return None
    for known, figure in figures.items():
        if re.search(rf"\b{known}\b", name):  # an A1000 is no A100
            return figure
    return None


class HardwareError(ValueError):
    """A figure of the hardware that cannot be, with the fix."""


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """What the cluster is made of; figures to plan with, not settings of anything.

    Rates are what a job achieves, not what a data sheet promises, in 10^9 bytes or 10^12 FLOPs per
    second, and one way. The defaults are those of an A100 of 80 GB, at 40 % of its dense bf16 peak
    of 312 TFLOP/s, 70 % of its 19.5 in float32, and 80 % of its links and of its memory's 2,039
    GB/s, except for the size of memory, which is never guessed.

    Attributes:
        gpus_per_node: GPUs of a node; None is one node with as many as there are workers.
        gpu_memory_gib: Memory of a GPU in GiB, as its driver shows it; None if it is not known.
        matmul_tflops: Matrix products of a GPU in the precision of training.
        fp32_tflops: The same in float32 without TF32, as an autoencoder encodes in.
        memory_gb_per_s: From and to a GPU's own memory, which sets the pace of an update.
        launch_us: Microseconds of the host for each kernel that it launches by itself. Eager torch
            takes 5 to 25 of them for an operation, by its layers from Python to the driver.
        node_link_gb_per_s: From a GPU to the others of its node.
        network_gb_per_s: From a node to others, divided by its GPUs.
        host_link_gb_per_s: From a GPU to the memory of its node.
        host_memory_gib: Memory of a node, for offloaded optimizer state; None if it is not known.

    Raises:
        HardwareError: A figure is not positive.
    """

    gpus_per_node: int | None = None
    gpu_memory_gib: float | None = None
    matmul_tflops: float = 125.0
    fp32_tflops: float = 13.7
    memory_gb_per_s: float = 1630.0
    launch_us: float = 10.0
    node_link_gb_per_s: float = 240.0
    network_gb_per_s: float = 20.0
    host_link_gb_per_s: float = 25.0
    host_memory_gib: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise HardwareError(f"hardware.{name} is {value!r}; it must be positive.")

    def ranks_per_node(self, workers: int) -> int:
        """How many consecutive ranks are on one node."""
        return workers if self.gpus_per_node is None else min(workers, self.gpus_per_node)
