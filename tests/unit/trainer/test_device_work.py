"""What a step asks of a device beside products: counted on real operations, and put into time."""

from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.experts.full_size import join_alone, stay
from benchmarks.experts.training import Training
from benchmarks.planner import MEASURED, predict
from benchmarks.update import MovedBytes
from cluster.placement import Placement
from tests.unit.cluster.loads import NODE, xl
from trainer.config.composition import compose_job
from trainer.config.reading import to_dict
from trainer.planning.device_work import encoder_flops, launches, update_bytes_each
from trainer.planning.placing import workload, zero_stage
from trainer.planning.planner import Choices, candidate, choose
from trainer.planning.report import assumptions, placement_table
from trainer.planning.step_time import step_time

REPLICATED = Placement((1, 1, 1))


def job(scales: int, *words: str):
    return compose_job(
        [
            *("+exp=imagenet_xl", f"flow.scales={scales}", "flow.critical_times=null"),
            *("data.classes=1000", f"train.global_batch={8 * scales}", *words),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scales", "depth", "words"),
    [
        (1, 3, ()),
        (2, 1, ()),
        (2, 3, ("engine.activation_checkpointing=[0,1]",)),
        (3, 2, ("model.qk_norm=true",)),
        (4, 2, ()),
    ],
)
def test_kernels_of_a_pass_are_those_that_torch_dispatches(scales, depth, words):
    made = job(
        scales,
        *("model=s_2", f"model.depth={depth}", "engine=auto", "engine.precision=bf16"),
        *("cluster.workers=1", f"train.global_batch={scales}", *words),
    )
    context = join_alone(made)
    try:
        with ExitStack() as stack:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(patch.object(nn.Module, "to", stay))
            training = Training(to_dict(made), context)
            with MovedBytes() as counted:
                training.backward(last=True)
    finally:
        dist.destroy_process_group()
    work = workload(made)
    one_us = replace(NODE, launch_us=1.0, matmul_tflops=1e9)
    time = step_time(work, Placement((1,) * scales), zero_stage=0, hardware=one_us)
    assert time.launching == pytest.approx(counted.calls / 1e6, abs=1e-9)


def test_xl_launches_as_many_kernels_as_it_did_on_a_gpu():
    """1,858, 3,905 and 6,062, as an H200 was seen to launch."""
    counted = [launches(scales=scales, depth=28) for scales in (1, 2, 3)]
    assert counted == [1859, 3906, 6065]


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 256])
def test_flops_of_the_encoder_are_those_of_stable_diffusions(size):
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
        images = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.encode(images)
    assert counter.get_total_flops() == encoder_flops(size**2)


def test_an_update_moves_the_bytes_that_are_counted():
    """`python -m benchmarks.update`; tests/unit/test_benchmarks.py holds it to the engines."""
    alone = ("cluster.workers=1", "engine=auto")
    each = {
        name: update_bytes_each(workload(made), zero_stage=zero_stage(made))
        for name, made in {
            "ZeRO": job(2, "cluster.workers=8", "engine=zero1", "engine.precision=bf16"),
            "bf16": job(2, *alone, "engine.precision=bf16"),
            "fp32": job(2, *alone, "engine.precision=fp32"),
        }.items()
    }
    assert each == {"ZeRO": 54, "bf16": 56, "fp32": 44}


def test_an_update_takes_what_its_bytes_do_where_state_is_on_the_device():
    def update_s(work, stage):
        return step_time(work, REPLICATED, zero_stage=stage, hardware=NODE).update

    whole, rate = 2_019_000_000, 1e9 * NODE.memory_gb_per_s
    assert update_s(xl(), 0) == pytest.approx(whole * 56 / rate)
    assert update_s(xl(), 1) == pytest.approx(whole / 8 * 54 / rate, rel=1e-6)
    assert update_s(xl(averages=3), 1) == pytest.approx(whole / 8 * (54 + 24) / rate, rel=1e-6)
    assert update_s(xl(ema_on_host=True), 1) == pytest.approx(whole / 8 * 42 / rate, rel=1e-6)
    assert update_s(xl(offload=True), 1) == 0


def test_images_are_encoded_at_the_rate_of_their_precision():
    made = job(2, "cluster.workers=8")
    work = workload(made)
    assert work.encoder_flops == encoder_flops(256**2) == pytest.approx(0.273e12, rel=0.01)
    assert not work.encodes_in_fp32
    full = workload(job(2, "cluster.workers=8", "codec.encode_precision=fp32"))
    images = full.images * full.grad_accum_steps
    for asked, tflops in ((work, NODE.matmul_tflops), (full, NODE.fp32_tflops)):
        time = step_time(asked, Placement((1, 1)), zero_stage=2, hardware=NODE)
        assert time.encoding == pytest.approx(images * work.encoder_flops / (1e12 * tflops))
    latents = compose_job(["+exp=imagenet_xl_latents", "data.classes=1000"])
    assert workload(latents).encoder_flops == 0


def test_passes_take_no_less_than_the_host_takes_to_launch_their_kernels():
    work = xl(launches=6065, grad_accum_steps=2)
    bare = step_time(replace(work, launches=0), REPLICATED, zero_stage=2, hardware=NODE)
    for share in (0.5, 2.0):
        hardware = replace(NODE, launch_us=1e6 * share * bare.compute / (2 * 6065))
        time = step_time(work, REPLICATED, zero_stage=2, hardware=hardware)
        waited = max(0.0, share - 1) * bare.compute
        assert time == replace(bare, launching=pytest.approx(waited))


def test_how_fast_the_host_is_changes_no_choice():
    for stages in ([1], [1, 2, 3]):
        chosen = [
            str(choose(xl(launches=6065), replace(NODE, launch_us=us), Choices(zero_stages=stages)))
            for us in (1e-3, 1e3)
        ]
        assert chosen[0] == chosen[1]


def test_blocks_that_are_compiled_have_kernels_that_nobody_has_counted():
    made = job(2, "cluster.workers=8", "engine.compile=blocks")
    assert workload(made).launches == 0


def test_a_plan_names_what_its_times_stand_on():
    made = job(3, "cluster=h100_8")
    work, hardware = workload(made), made.cluster.hardware
    told = assumptions(work, hardware, zero_stage=2)
    for words in (
        "matrix products at 396 TFLOP/s",
        "an update of 54 bytes for each parameter of a rank at 2680 GB/s of its memory",
        "0.273 TFLOP to encode an image, in bf16 at 396 TFLOP/s",
        "10 us of the host for each of the 6,065 kernels of a pass",
    ):
        assert words in told
    one = candidate(work, REPLICATED, zero_stage=2, hardware=hardware)
    head = placement_table([one]).splitlines()[0].split()
    assert head[-8:] == [
        "compute",
        "reduce",
        "exchange",
        "update",
        "encode",
        "launch",
        "ms",
        "images/s",
    ]


def test_measured_steps_are_nearer_than_products_alone_would_have_them():
    """What benchmarks.md tells: none of them is faster than the planner says."""
    for step in MEASURED:
        planned = predict(step)
        assert 1.5 * planned.total < step.ms / 1e3 < 8 * planned.total
        assert planned.total >= planned.compute
