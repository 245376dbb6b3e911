"""What each scale computes between two attentions, compiled: fewer kernels, and fewer bytes moved.

A region is small, and alike in all blocks, so each scale's is compiled once: sizes never change,
for stratified stages give every scale a fixed number of images. Attention and the exchange of
expert shards stay as they are. So do passes without gradients, whose batches are of any size.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from cluster.tested import TESTED_TORCH, require_tested
from models.transformer.block import Block
from models.transformer.experts import Regions
from models.transformer.lapflow import LapFlowTransformer
from trainer.engine.protocol import EngineConfig, EngineConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

BACKEND = "inductor"
"""What makes code of the graphs that torch has traced."""

_MOST_PROCESSES = 4
_MOST_SIZES = 64
"""A scale has one, or one for each number of images it is given; torch's own limit is 8."""


def compile_as_asked(model: LapFlowTransformer, config: EngineConfig) -> None:
    """Let the blocks of a model compute their experts by compiled code while it is trained.

    The code is made in the first forward and backward pass.

    Args:
        model: Its layers are in their places, if not its weights.
        config: Whether they are to be compiled.
    """
    if config.compile == "off":
        return
    require_tested("torch", TESTED_TORCH)  # what compiles is told by private parts of it
    eager = Regions()
    compiled = Regions(
        attention_inputs=_while_training(eager.attention_inputs),
        feed_forward=_while_training(eager.feed_forward),
        mlp_inputs=_while_training(eager.mlp_inputs),
        norm=_while_training(eager.norm),
    )
    for block in model.blocks:
        cast(Block, block).layers.regions = compiled
    logger.info(
        "engine.compile=blocks: the first update compiles what each scale computes in a block"
    )


def _while_training(compute: Callable[..., T]) -> Callable[..., T]:
    settings: dict[str, Any] = {"recompile_limit": _MOST_SIZES}  # which torch's own types lack
    compiled = torch.compile(compute, backend=BACKEND, dynamic=False, fullgraph=True, **settings)

    @functools.wraps(compute)
    def choose(*arguments: Any) -> T:
        return compiled(*arguments) if torch.is_grad_enabled() else compute(*arguments)

    return choose


def prepare_compiler(cache: Path, *, ranks: int) -> None:
    """Set where compiled code is kept, and how many processes make it, unless that is set already.

    Args:
        cache: The node's folder; what lies there is used again when a run is started again.
        ranks: Ranks of this node, which all compile.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        from torch._inductor import config  # which has read the variable by now

        config.compile_threads = max(1, min(_MOST_PROCESSES, (os.cpu_count() or 1) // ranks))


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where the compiler that torch's own code goes through is missing.

    Args:
        device: Where the model is computed: on a GPU torch needs Triton, which needs a C compiler;
            else a C++ compiler. Both need Python's header files.

    Raises:
        EngineConfigError: Something of that is not there.
    """
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    named = os.environ.get(variable)
    wanted = (named,) if named else names
    if not any(map(shutil.which, wanted)):
        raise EngineConfigError(
            f"engine.compile=blocks needs the compiler {' or '.join(wanted)} on every node "
            f"(${variable} names another one): install it, on Debian by apt install g++, or set "
            "engine.compile=off"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise EngineConfigError(
            f"engine.compile=blocks needs Python's header files on every node, and {header} is not "
            "there: install them, on Debian by apt install python3-dev, or set engine.compile=off"
        )


class CompileReport:
    """Tells once updates have compiled how long that took; a hook of the training loop.

    Args:
        rank: This rank; the first one tells the time, for all take much the same.
        now: Monotonic clock in seconds.
    """

    def __init__(self, *, rank: int, now: Callable[[], float] = time.monotonic) -> None:
        from torch._dynamo.callback import callback_handler

        self._rank, self._now = rank, now
        self._began = 0.0
        self._seconds, self._times = 0.0, 0
        self._is_first = True
        # Forward passes are compiled as they are met, backward passes when they are run.
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)

    def after_update(self, _report: object) -> None:
        """Tell what was compiled since the last update, if anything."""
        if self._times and self._rank == 0:
            logger.info(
                "compiled %d passes of blocks in %.1f s; a restart on this node finds them in its "
                "cache",
                self._times,
                self._seconds,
            )
        if self._times and not self._is_first:
            logger.warning(
                "an update after the first one was compiled again, for its sizes are others"
            )
        self._is_first = False
        self._seconds, self._times = 0.0, 0

    def _begin(self, _arguments: object) -> None:
        self._began = self._now()

    def _end(self, _arguments: object) -> None:
        self._seconds += self._now() - self._began
        self._times += 1
