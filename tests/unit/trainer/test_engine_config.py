"""What the settings of an engine come to."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from trainer.engine.build import allow_tf32
from trainer.engine.protocol import EngineConfig


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (EngineConfig(zero_stage=2), True),
        (EngineConfig(kind="plain", zero_stage=3), True),
        (EngineConfig(zero_stage=2, overlap_exchange=False), False),
        # It gathers weights on one stream.
        (EngineConfig(zero_stage=3), False),
    ],
)
def test_coarse_scales_have_a_stream_but_with_zero_3(config: EngineConfig, expected: bool) -> None:
    assert config.has_overlap(world_size=2) is expected


def test_one_device_has_no_zero_3_to_gather_weights() -> None:
    assert EngineConfig(zero_stage=3).has_overlap(world_size=1)
    assert not EngineConfig(kind="zero", zero_stage=3).has_overlap(world_size=1)


def test_deepspeed_has_the_switch_that_orders_gradients_of_two_streams():
    """Where there is no GPU nothing sets it, and another version might have dropped it."""
    (folder,) = find_spec("deepspeed").submodule_search_locations
    source = (Path(folder) / "runtime" / "zero" / "stage_1_and_2.py").read_text()
    switch = r"self\._offload_gradient_safety_enabled"
    for guarded in (
        rf"if {switch} and bucket\.index in bucket\.reuse_events:\n.*\n.*wait_event",
        rf"if {switch}:\n +stream = .*\n +for event in .*ready_events.*\n +stream\.wait_event",
    ):
        assert re.search(guarded, source), guarded


@pytest.mark.parametrize(
    ("settings", "alone", "together"),
    [
        ({}, "plain", "zero"),
        ({"zero_stage": 3, "precision": "bf16"}, "plain", "zero"),
        ({"kind": "zero"}, "zero", "zero"),
        ({"kind": "plain"}, "plain", "plain"),
        ({"offload_optimizer": True}, "zero", "zero"),
        ({"deepspeed": {"zero_optimization": {"overlap_comm": False}}}, "zero", "zero"),
    ],
)
def test_one_device_does_without_deepspeed_unless_it_is_asked_for(settings, alone, together):
    config = EngineConfig(**settings)
    assert (config.kind_of(1), config.kind_of(2), config.kind_of(8)) == (alone, together, together)


def test_float32_on_a_gpu_is_multiplied_in_tf32_and_that_is_said(caplog):
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    try:
        with caplog.at_level("INFO"):
            allow_tf32(False)
            assert not matmul.allow_tf32
            assert not convolution.allow_tf32
            assert not caplog.messages
            allow_tf32(True)
            assert matmul.allow_tf32
            assert convolution.allow_tf32
        (said,) = caplog.messages
        assert "engine.tf32=false" in said
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before
