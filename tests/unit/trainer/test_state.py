"""Fragments refuse what is no slice."""

from __future__ import annotations

import pytest
import torch

from trainer.state import Fragment


def test_a_fragment_knows_its_length() -> None:
    tensors = {"master": torch.zeros(4), "ema": torch.zeros(4)}
    assert Fragment(name="w", start=2, shape=(2, 3), tensors=tensors).numel == 4


@pytest.mark.parametrize(
    ("start", "tensors"),
    [
        (3, {"master": torch.zeros(4)}),
        (-1, {"master": torch.zeros(4)}),
        (0, {"master": torch.zeros(4), "ema": torch.zeros(3)}),
        (0, {"master": torch.zeros(2, 2)}),
        (0, {"master": torch.zeros(4, dtype=torch.bfloat16)}),
        (0, {}),
    ],
)
def test_what_is_no_slice_is_refused(start: int, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="the fragment of w"):
        Fragment(name="w", start=start, shape=(2, 3), tensors=tensors)
