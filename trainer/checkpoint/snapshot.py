"""A rank's part of a checkpoint in host memory, laid out as the object that it becomes.

Training goes on as soon as the values are copied; whoever uploads the object reads the copy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from trainer.checkpoint.errors import CheckpointMismatch, NonFiniteState
from trainer.checkpoint.manifest import BYTES_PER_ELEMENT
from trainer.checkpoint.objects import block_hash, blocks_of, header
from trainer.checkpoint.slices import Span
from trainer.finite import all_finite
from trainer.host_memory import host_buffer
from trainer.state import Fragment


class Snapshot:
    """One buffer for all saves of a run: what is in flight must be gone before the next `take`.

    The buffer is a safetensors file: its header, then all slices of the first kind, of the second,
    and so on, so that a reader of one kind reads one range. It is written here rather than by the
    safetensors package, which would hold a second copy of everything.

    Args:
        spans: The slice of each parameter this rank writes.
        kinds: The kinds of values of each slice.
        page_locked: Lock the buffer's pages, into which a GPU copies several times as fast.
    """

    def __init__(
        self, spans: Mapping[str, Span], *, kinds: Sequence[str], page_locked: bool = False
    ) -> None:
        self._spans = dict(spans)
        self._kinds = tuple(sorted(kinds))
        start = header(self._spans, self._kinds)
        numel = len(self._kinds) * sum(span.numel for span in self._spans.values())
        self._buffer = host_buffer(len(start) + BYTES_PER_ELEMENT * numel, page_locked=page_locked)
        self._buffer[: len(start)] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
        self._values = self._buffer[len(start) :].view(torch.float32)

    @property
    def data(self) -> memoryview:
        """The bytes of the object."""
        view: memoryview = self._buffer.numpy().data
        return view

    @torch.no_grad()
    def take(self, fragments: Collection[Fragment]) -> None:
        """Copy the live values, as they are after all work queued on the device so far.

        Args:
            fragments: The slices this snapshot was made for, among others.

        Raises:
            CheckpointMismatch: One is missing, or is another slice.
        """
        named = {fragment.name: fragment for fragment in fragments}
        live = {
            name: (Span(found.start, found.numel), tuple(sorted(found.tensors)))
            for name in self._spans
            if (found := named.get(name)) is not None
        }
        if live != {name: (span, self._kinds) for name, span in self._spans.items()}:
            raise CheckpointMismatch(
                "The engine's fragments() are other slices than when the run began. No checkpoint "
                "was written."
            )
        on_device = False
        for (kind, name), place in zip(self._order(), self._places(), strict=True):
            value = named[name].tensors[kind]
            on_device |= value.is_cuda
            place.copy_(value, non_blocking=True)
        if on_device:
            torch.cuda.current_stream().synchronize()

    def examine(self) -> tuple[str, ...]:
        """Look at the values, and return the hash of each block of the bytes.

        Raises:
            NonFiniteState: A value is not finite.
        """
        self._check_finite()
        return tuple(block_hash(block) for block in blocks_of(self.data))

    def _check_finite(self) -> None:
        for (kind, name), values in zip(self._order(), self._places(), strict=True):
            if not all_finite(values):
                raise NonFiniteState(
                    f"The {kind} of {name} holds values that are not finite, so this state is not "
                    "saved: the last checkpoint is better. Lower optim.learning_rate, set "
                    "optim.clip_norm, or use engine.precision=fp32."
                )

    def _order(self) -> list[tuple[str, str]]:
        return [(kind, name) for kind in self._kinds for name in self._spans]

    def _places(self) -> Sequence[Tensor]:
        numels = [self._spans[name].numel for _, name in self._order()]
        return torch.split(self._values, numels)
