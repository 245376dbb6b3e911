"""Metrics: what is recorded comes out reduced as declared; pace is arithmetic on a clock."""

import json
import math
from dataclasses import replace

import pytest
import torch

from models.transformer.cost import training_multiply_adds
from pipelines.formats import format_duration
from tests.support.configuration import configuration
from trainer.metrics.buffer import MetricBuffer
from trainer.metrics.node_use import NodeUse
from trainer.metrics.tracker import (
    InvalidTrackingUri,
    Tracker,
    TrackingConfig,
)
from trainer.planning.placing import model_shape
from trainer.training.hooks import Progress, UpdateReport, due
from trainer.training.speed import Load, Throughput


def test_values_are_reduced_as_declared_and_forgotten_by_the_flush():
    buffer = MetricBuffer("cpu")
    for value in (1.0, 2.0, 6.0):
        buffer.record("mean", torch.tensor(value))
        buffer.record("sum", value, reduction="sum")
        buffer.record("max", value, reduction="max")
    assert buffer.flush() == {"mean": 3.0, "sum": 9.0, "max": 6.0}
    assert buffer.flush() == {}


def test_recording_keeps_no_graph_and_does_not_change_the_value():
    buffer = MetricBuffer("cpu")
    value = torch.ones((), requires_grad=True) * 2
    buffer.record("loss", value)
    buffer.record("loss", value)
    assert buffer.flush() == {"loss": 2.0}
    assert value.item() == 2.0


def test_one_metric_has_one_reduction():
    buffer = MetricBuffer("cpu")
    buffer.record("x", 1.0)
    with pytest.raises(ValueError, match="reduced by mean, not by max"):
        buffer.record("x", 1.0, reduction="max")


def test_a_mean_is_weighted_and_left_out_where_nothing_weighs():
    buffer = MetricBuffer("cpu")
    for value, weight in ((1.0, 1), (4.0, 3), (100.0, 0)):
        buffer.record("number", value, weight=weight)
        buffer.record("tensor", torch.tensor(value), weight=weight)
    buffer.record("empty", 5.0, weight=0)
    assert buffer.flush() == {"number": 3.25, "tensor": 3.25}


def test_several_means_are_recorded_at_once():
    buffer = MetricBuffer("cpu")
    values, weights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])
    buffer.record_each(["a", "b", "c"], values, weights=weights)
    values[0], weights[1] = 7.0, 1.0
    buffer.record_each(["a", "b", "c"], values, weights=weights)
    buffer.record("d", 1.0)
    assert buffer.flush() == {"a": 4.0, "b": 2.0, "d": 1.0}
    assert buffer.flush() == {}


def record_some(buffer, start, stop):
    for number in range(start, stop):
        value = 0.1 + number / 7
        buffer.record("loss", torch.tensor(value), weight=number % 3)
        buffer.record("images", value, reduction="sum")
        buffer.record("peak", -value, reduction="max")
        buffer.record_each(
            ["a", "b"],
            torch.tensor([value, value**2]),
            weights=torch.tensor([1.0, float(number == 0)]),
        )


def test_a_restored_buffer_flushes_the_same_bits():
    one = MetricBuffer("cpu")
    record_some(one, 0, 5)
    state = json.loads(json.dumps(one.state()))
    other = MetricBuffer("cpu")
    other.load_state(state)
    for buffer in (one, other):
        record_some(buffer, 5, 11)
    values = one.flush()
    assert other.flush() == values
    assert values.keys() == {"loss", "images", "peak", "a", "b"}
    assert one.flush() == other.flush() == {}


def test_a_state_is_what_was_recorded_and_changes_no_value():
    watched, plain = MetricBuffer("cpu"), MetricBuffer("cpu")
    for buffer in (watched, plain):
        record_some(buffer, 0, 4)
    watched.state()
    assert watched.state() == watched.state()
    assert watched.flush() == plain.flush()


def test_a_state_keeps_what_is_not_a_number():
    one, other = MetricBuffer("cpu"), MetricBuffer("cpu")
    one.record("loss", float("nan"))
    other.load_state(json.loads(json.dumps(one.state())))
    assert math.isnan(other.flush()["loss"])
    with pytest.raises(ValueError, match="reduced by 'median'"):
        other.load_state({"loss": ["median", "0x1p+0", "0x1p+0"]})


def test_a_maximum_takes_numbers_and_tensors():
    buffer = MetricBuffer("cpu")
    for value in (0.1, torch.tensor(0.3, dtype=torch.float64), 0.2):
        buffer.record("x", value, reduction="max")
    assert buffer.flush() == {"x": 0.3}


def test_pace_is_measured_over_the_window_since_the_last_call():
    now = [100.0]
    throughput = Throughput(1000, now=lambda: now[0])
    now[0] += 4.0
    pace = throughput.pace(images=1800, total_images=2800, waited_s=1.0)
    assert (pace.images_per_s, pace.data_wait_share, pace.remaining_s) == (200.0, 0.25, 5.0)
    now[0] += 1.0
    pace = throughput.pace(images=2800, total_images=2800, waited_s=1.0)
    assert (pace.images_per_s, pace.data_wait_share, pace.remaining_s) == (1000.0, 0.0, 0.0)


def test_interruptions_slow_no_speed_and_are_expected_again():
    now = [0.0]
    throughput = Throughput(0, now=lambda: now[0])
    now[0] += 50.0  # the start: a first batch, compiling
    throughput.restart(images=100, waited_s=40.0)
    speeds, remaining = [], []
    for images in range(200, 1001, 100):
        now[0] += 1.0
        pace = throughput.pace(images=images, total_images=1000, waited_s=40.0)
        speeds.append(pace.images_per_s)
        remaining.append(pace.remaining_s)
        assert pace.data_wait_share == 0.0
        if images % 500 == 0:
            with throughput.pause():
                now[0] += 5.0
    assert speeds == [100.0] * 9
    assert remaining[:4] == [8.0, 7.0, 6.0, 5.0]
    assert remaining[4] == pytest.approx(4 + 5 * 400 / 600)
    assert remaining[-1] == 0.0


def test_a_window_without_images_has_no_end_in_sight():
    throughput = Throughput(10)
    pace = throughput.pace(images=10, total_images=20, waited_s=0.0)
    assert format_duration(pace.remaining_s) == "∞"


@pytest.mark.parametrize(
    ("before", "after", "interval", "expected"),
    [
        (0, 99, 100, False),
        (0, 100, 100, True),
        (100, 199, 100, False),
        (99, 350, 100, True),
        (5, 9, 0, False),
    ],
)
def test_due_when_a_multiple_is_crossed(before, after, interval, expected):
    assert due(before, after, interval) is expected


@pytest.mark.parametrize(("seconds", "text"), [(44.6, "45s"), (185, "3m05s"), (7620, "2h07m")])
def test_durations_are_written_for_people(seconds, text):
    assert format_duration(seconds) == text


def test_progress_tells_when_due_and_at_the_end_and_only_on_the_first_rank():
    told: dict[int, list] = {0: [], 1: []}
    for rank, messages in told.items():
        metrics = MetricBuffer("cpu")
        progress = Progress(
            metrics=metrics,
            tracker=Tracker(),
            report=messages.append,
            interval_images=100,
            total_images=260,
            throughput=Throughput(0),
            load=Load(flops_per_image=1e9, devices=2, peak_tflops=None),
            rank=rank,
            node=NodeUse(rank=rank, local_rank=rank, world_size=2, device=torch.device("cpu")),
        )
        for before in range(0, 260, 52):
            metrics.record("loss/total", 0.5)
            progress.after_update(
                UpdateReport(images_before=before, images=before + 52, waited_s=0.0)
            )
    assert [message["images"] for message in told[0]] == [104, 208, 260]
    assert "104/260 images (40%)" in told[0][0]["text"]
    assert "total 0.5000" in told[0][0]["text"]
    assert told[1] == []


def test_the_share_of_the_peak_is_of_each_device_where_that_is_known():
    load = Load(flops_per_image=3e11, devices=8, peak_tflops=989.0)
    figures = load.figures(8000.0)
    assert figures == {
        "speed/images_per_s_per_device": 1000.0,
        "speed/tflops_per_device": 300.0,
        "speed/mfu": 300.0 / 989.0,
    }
    assert load.text(8000.0) == " (1,000 a GPU, 300 TFLOP/s, MFU 30.3%)"
    unknown = replace(load, peak_tflops=None)
    assert "speed/mfu" not in unknown.figures(8000.0)
    assert unknown.text(8000.0) == ""


def test_a_processor_has_no_peak_and_the_flops_are_those_of_the_formula():
    shape = model_shape(configuration("+exp=digits"))
    load = Load.of(shape, devices=2, device=torch.device("cpu"))
    assert load.peak_tflops is None
    assert load.flops_per_image == 6 * training_multiply_adds(shape)


def test_credentials_in_the_tracking_uri_are_refused_and_not_repeated():
    with pytest.raises(InvalidTrackingUri) as caught:
        TrackingConfig(uri="http://me:hunter2@host")
    assert "hunter2" not in str(caught.value)
