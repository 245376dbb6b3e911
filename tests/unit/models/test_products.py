"""How float32 is multiplied within a block, and after it."""

import pytest
import torch

from models.products import float32_products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("tf32", [True, False])
def test_what_a_process_has_allowed_is_put_back(*, tf32: bool) -> None:
    before = allowed()
    with float32_products(CUDA, tf32=not tf32):
        for device, within in ((CUDA, tf32), (CPU, not tf32)):
            with float32_products(device, tf32=tf32):
                assert allowed() == (within, within)
            assert allowed() == (not tf32, not tf32)
    with pytest.raises(ZeroDivisionError), float32_products(CUDA, tf32=tf32):
        _ = 1 / 0
    assert allowed() == before
