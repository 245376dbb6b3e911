"""Fragments refuse what is no slice; the train state survives JSON and refuses what is no state."""

from __future__ import annotations

import json

import pytest
import torch

from trainer.state import Fragment, TrainState


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


def test_a_train_state_survives_json() -> None:
    state = TrainState(images=10, updates=4, skipped_updates=1)
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


@pytest.mark.parametrize(
    "change", [{"extra": 1}, {"images": -1}, {"images": 1.0}, {"images": True}, {"images": None}]
)
def test_a_strange_train_state_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="train state"):
        TrainState.from_dict({**TrainState().to_dict(), **change})


def test_an_incomplete_train_state_is_refused() -> None:
    with pytest.raises(ValueError, match="skipped_updates"):
        TrainState.from_dict({"images": 1, "updates": 1})
