"""Bytes of all tensors that are alive in this process."""

import gc

import torch
from torch import Tensor


def live_bytes() -> int:
    """Add up the memory of all tensors that Python refers to, each piece of it once.

    What autograd keeps for a backward pass under way is not seen, and there should be none.
    """
    gc.collect()
    found: dict[int, int] = {}
    for tensor in [each for each in gc.get_objects() if isinstance(each, Tensor)]:
        held = (tensor, tensor.grad) if tensor.is_leaf else (tensor,)
        for one in held:
            # On the meta device a tensor is a shape and no memory.
            if one is None or one.device.type == "meta" or one.layout != torch.strided:
                continue
            storage = one.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())
