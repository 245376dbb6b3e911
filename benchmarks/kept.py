"""How much memory autograd keeps between a forward pass and its backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], object]) -> int:
    """Sum the storages that a forward pass saves for its backward pass, each once.

    Inputs that are saved count too, so a forward pass that saves nothing but its inputs keeps
    exactly their size.

    Args:
        forward: Forward pass; gradients must be enabled.
    """
    storages: dict[int, int] = {}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        # Held until the end, or a later tensor could get the same address.
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())
