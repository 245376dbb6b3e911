"""What a network keeps for the backward pass, measured."""

import gc

import torch

from models.transformer.lapflow import LapFlowTransformer


def kept_bytes(
    model: LapFlowTransformer, batches: list[int], *, channels: int = 4, size: int = 32
) -> int:
    """Bytes kept for the backward pass of a batch whose scales hold so many images, coarse to fine.

    Autograd keeps tensors that its hooks show; recomputation holds its inputs itself.
    """
    states = tuple(
        torch.randn(batch, channels, size >> k, size >> k)
        for batch, k in zip(batches, reversed(range(len(batches))), strict=True)
    )
    labels, time = torch.zeros(batches[0], dtype=torch.long), torch.rand(batches[0])
    gc.collect()
    # Held, or what is let go on the way would leave its address to what is kept.
    held_before = [tensor.untyped_storage() for tensor in alive()]
    before = {storage.data_ptr() for storage in held_before}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(states, time, labels)
    assert len(outputs) == len(batches)
    held = {tensor.untyped_storage().data_ptr() for tensor in outputs}
    for tensor in alive():
        if tensor.untyped_storage().data_ptr() not in held:
            keep(tensor)
    return sum(storage.nbytes() for storage in kept.values())


def alive() -> list[torch.Tensor]:
    return [
        found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)
    ]
