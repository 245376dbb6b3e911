"""What the settings of an engine come to."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

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
    assert config.has_overlap is expected


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
