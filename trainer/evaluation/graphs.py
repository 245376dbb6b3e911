"""Network calls as CUDA graphs: recorded once for each shape of their inputs, then replayed.

A small batch leaves a GPU idle while Python launches thousands of kernels for one call. A graph
launches them at once. It reads and writes the memory that it was recorded with, so inputs are
copied in, and outputs out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.axes import Bands

logger = logging.getLogger(__name__)

Replay = Callable[[], Bands]
"""Computes anew from what the inputs hold now; its results are the same memory each time."""
Recorder = Callable[[Callable[[], Bands]], Replay]
"""Records what a function does with tensors, and returns what does it again."""

_WARM_UPS = 3
"""Calls before recording, in which libraries choose their kernels and take memory."""
_MOST_GRAPHS = 16
"""Each keeps memory for what lies between its kernels; further shapes are computed without."""


class CudaRecorder:
    """Records CUDA graphs, which share the memory of what lies between their kernels."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Bands]) -> Replay:
        """Record a function that computes on the current CUDA device."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the GPU meanwhile, such as pinned memory, is no part of it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = compute()

        def replay() -> Bands:
            graph.replay()
            return outputs

        return replay


class _Recorded(NamedTuple):
    """A recorded call, and the memory that it reads."""

    inputs: tuple[Tensor, ...]
    """States, times and labels."""
    replay: Replay

    def __call__(self, inputs: tuple[Tensor, ...]) -> Bands:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        # The next call overwrites what this one returns, and a solver keeps several slopes.
        return tuple(band.clone() for band in self.replay())


class GraphedNetwork(nn.Module):
    """A velocity model that records its network's calls, one graph for each shape of inputs.

    What cannot be recorded is computed as without, which one warning says, and so are shapes beyond
    the sixteenth. The network's weights must stay where they are.

    Args:
        network: The network, in evaluation mode.
        recorder: Records a call.

    Attributes:
        network: The network.
    """

    def __init__(self, network: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.network = network
        self._recorder: Recorder | None = recorder
        self._recorded: dict[tuple[tuple[object, ...], ...], _Recorded] = {}

    @property
    def graphs(self) -> int:
        """How many calls are recorded."""
        return len(self._recorded)

    @torch.no_grad()
    def forward(self, states: Bands, time: Tensor, labels: Tensor) -> Bands:
        """Predict velocities, see `models.axes.VelocityModel`; without gradients."""
        inputs = (*states, time, labels)
        shapes = tuple((*each.shape, each.dtype) for each in inputs)
        if shapes not in self._recorded and self._recorder:
            self._record(shapes, inputs)
        recorded = self._recorded.get(shapes)
        return self._compute(inputs) if recorded is None else recorded(inputs)

    def _record(self, shapes: tuple[tuple[object, ...], ...], inputs: tuple[Tensor, ...]) -> None:
        assert self._recorder is not None
        if self.graphs >= _MOST_GRAPHS:
            self._recorder = None
            logger.warning(
                "graphs=true: calls of %d shapes are recorded, and those of further shapes are "
                "computed without; draw with fewer sizes of batch to have them all recorded",
                self.graphs,
            )
            return
        held = tuple(each.clone() for each in inputs)
        try:
            replay = self._recorder(lambda: self._compute(held))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._recorder = None
            logger.warning(
                "graphs=true has no effect from here on: a call of the network cannot be recorded "
                "(%s)",
                str(error).partition("\n")[0],
            )
            return
        self._recorded[shapes] = _Recorded(held, replay)

    def _compute(self, inputs: tuple[Tensor, ...]) -> Bands:
        *states, time, labels = inputs
        velocities: Bands = self.network(tuple(states), time, labels)
        return velocities


def with_graphs(network: nn.Module, device: torch.device) -> nn.Module:
    """Return a network that records its calls where that can be done, with a word where not.

    Args:
        network: The network, on its device.
        device: Its device.
    """
    if device.type == "cuda":
        return GraphedNetwork(network, CudaRecorder())
    logger.warning("graphs=true needs a GPU, and this draws on %s: it has no effect", device)
    return network
