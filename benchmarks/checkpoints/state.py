"""The state of one rank: parameters, cut as ZeRO cuts them, with all that AdamW keeps of them."""

import argparse
import math
import threading
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks import command
from models.transformer.lapflow import LapFlowTransformer
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.index import CheckpointIndex
from trainer.checkpoint.saver import CheckpointSaver
from trainer.host_group import HostGroup
from trainer.state import Fragment
from trainer.storage.store import Store

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
RUN = "benchmark"
MIB = 2**20


def add_state(parser: argparse.ArgumentParser, *, size: str) -> None:
    """Add the options that choose the state."""
    command.add_size(parser, size=size, depth=None, batch=None)
    parser.add_argument("--scales", type=command.positive, default=2, help="default 2")
    parser.add_argument(
        "--ranks",
        type=command.positive,
        default=1,
        help="the state is of one of so many; default 1",
    )


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What one rank saves.

    Attributes:
        flats: Every kind of value, flat: the layout of ZeRO-1 and ZeRO-2.
        fragments: The slices of parameters in them.
    """

    flats: dict[str, Tensor]
    fragments: list[Fragment]

    @property
    def size_bytes(self) -> int:
        """Size of all values."""
        return sum(flat.nbytes for flat in self.flats.values())

    def step(self) -> None:
        """Change every value, as an update does."""
        for flat in self.flats.values():
            flat.add_(1e-6)


def parameter_shapes(options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the model that the options of `add_state` choose."""
    with torch.device("meta"):
        model = LapFlowTransformer(
            command.sizes(options),
            scales=options.scales,
            channels=options.channels,
            image_size=options.image_size,
            classes=1000,
        )
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def rank_state(options: argparse.Namespace, device: torch.device) -> RankState:
    """Make the state that the options of `add_state` choose: the first of `--ranks` equal parts."""
    shapes = parameter_shapes(options)
    numels = [math.prod(shape) for shape in shapes.values()]
    share = -(-sum(numels) // options.ranks)
    flats = {kind: torch.randn(share, device=device) for kind in KINDS}
    fragments = []
    for (name, shape), stop in zip(shapes.items(), accumulate(numels), strict=True):
        start = stop - math.prod(shape)
        if start < share:
            fragments.append(
                Fragment(
                    name=name,
                    start=0,
                    # The last one is cut; the others of the model are other ranks'.
                    shape=shape if stop <= share else (share - start,),
                    tensors={kind: flat[start : min(stop, share)] for kind, flat in flats.items()},
                )
            )
    return RankState(flats=flats, fragments=fragments)


class Saves:
    """Saves a state to a store again and again, each time after more images."""

    def __init__(self, state: RankState, store: Store) -> None:
        self._state = state
        self._images = 0
        self._ended = threading.Event()
        self.saver = CheckpointSaver(
            store,
            index=CheckpointIndex(store, run=RUN),
            config=CheckpointConfig(keep_last=1),
            ranks=HostGroup(alone=True),
            aside=HostGroup(alone=True),
            report=lambda _report: self._ended.set(),
        )
        self.saver.prepare(state.fragments, science={})

    def begin(self) -> None:
        """Take a snapshot and begin its upload: what training waits for."""
        self._images += 1
        self._ended.clear()
        self.saver.save(
            images=self._images,
            fragments=self._state.fragments,
            train_state={"images": self._images},
            science={},
            config_fingerprint="",
        )

    def until_committed(self) -> None:
        """Wait until the checkpoint exists."""
        self._ended.wait()

    def finish(self) -> None:
        """Wait until old ones are deleted, too."""
        self.saver.finish()
        if not self.saver.is_saved(self._images):
            raise RuntimeError("the checkpoint was not saved, so nothing was measured")
