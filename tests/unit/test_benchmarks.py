"""Every benchmark command at its smallest size, and the claims that need no clock."""

import json

import pytest
import torch

from benchmarks import (
    beside,
    expert_matmul,
    frechet,
    gpu_training,
    prefix_attention,
    restart,
    sample_sets,
    sampling,
    tracking,
    training_loop,
    training_step,
    update,
)
from benchmarks.bare_loop import BareLoop
from benchmarks.checkpoints import blocked, transfer
from benchmarks.checkpoints import memory as save_memory
from benchmarks.data import decoding, starting, streaming, waiting
from benchmarks.data.__main__ import main as data_main
from benchmarks.data.photographs import photographs
from benchmarks.gpu_training import kind_of, shares_by_kind
from benchmarks.prefix_attention import Attention, kept_bytes
from benchmarks.workload import Latents, TrainingWork
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.objective import Objective
from models.transformer.config import TransformerConfig
from tests.support.engine_worker import tiny_model

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--rounds", "1"]
FEW_IMAGES = ["--batch", "4", "--image-size", "32"]
TINY_MODEL = [*TINY, "--size", "tiny", "--image-size", "8"]


@pytest.mark.parametrize(
    ("benchmark", "arguments", "rows"),
    [
        (training_step, [*TINY_MODEL, "--batch", "6", "--optimizer"], 3),
        (training_loop, [*TINY_MODEL, "--batch", "6", "--depth", "1"], 7),
        (
            training_loop,
            [*TINY_MODEL, "--batch", "6", "--depth", "1", "--scales", "1", "--precision", "bf16"],
            3,
        ),
        (prefix_attention, [*TINY, "--pixels", "256", "--batch", "1", "--heads", "1"], 6),
        (expert_matmul, [*TINY, "--sizes", "S/2", "--scales", "2", "--batch", "2"], 3),
        (sampling, [*TINY_MODEL, "--batches", "1,3", "--finest-batch", "2", "--ways", "fp32"], 4),
        (sampling, [*TINY_MODEL, "--batches", "4", "--ways", "fp32", "--share-coarse", "2"], 2),
        (sample_sets, [*TINY_MODEL, "--steps", "2", "--samples", "3", "--batch", "2"], 4),
        (frechet, [*TINY, "--features", "40"], 4),
        (decoding, [*TINY, *FEW_IMAGES, "--decode-threads", "1,2"], 3 + decoding.has_turbo()),
        (waiting, [*TINY_MODEL, "--batch", "4", "--steps", "1"], 1),
        (blocked, TINY_MODEL, 2),
        pytest.param(
            tracking,
            [*TINY_MODEL, "--batch", "6", "--updates", "2", "--every", "1", "--metrics", "3"],
            2,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            beside,
            [*TINY_MODEL, "--batch", "6", "--updates", "2"],
            3,
            marks=pytest.mark.slow,
        ),
        pytest.param(transfer, TINY_MODEL, 4, marks=pytest.mark.slow),
        pytest.param(streaming, [*TINY, *FEW_IMAGES, "--samples", "8"], 2, marks=pytest.mark.slow),
        pytest.param(starting, [*TINY, *FEW_IMAGES, "--samples", "8"], 4, marks=pytest.mark.slow),
        pytest.param(
            gpu_training,
            [*TINY_MODEL, "--batch", "6", "--compile", "off"],
            3,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_command_prints_a_table_and_writes_its_rows(
    benchmark, arguments, rows, tmp_path, capsys
):
    file = tmp_path / "out.json"
    assert benchmark.main([*arguments, "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    assert len(found["rows"]) == rows
    assert found["benchmark"] in capsys.readouterr().out
    for row in found["rows"]:
        timed = [value for name, value in row.items() if name.endswith(("_s", "_ms"))]
        assert timed
        assert min(timed) > 0


def test_the_bare_loop_in_bf16_updates_fp32_masters():
    def trained(precision: str) -> BareLoop:
        model = tiny_model()
        bands = (torch.randn(6, 1, 4, 4), torch.randn(6, 1, 8, 8))
        loop = BareLoop(
            model,
            objective=Objective(Flow(FlowConfig(scales=2))),
            batches=[(bands, torch.arange(6) % 3)],
            noise_size=64,
            null_label=3,
            precision=precision,
            updates=3,
        )
        loop()
        return loop

    full, half = (trained(precision) for precision in ("fp32", "bf16"))
    begun = list(tiny_model().parameters())
    for weight, master in zip(half.network.parameters(), half.masters, strict=True):
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, master.bfloat16())
    moved = [
        torch.cat([(now - was).flatten() for now, was in zip(loop.masters, begun, strict=True)])
        for loop in (full, half)
    ]
    assert torch.cosine_similarity(*moved, dim=0) > 0.9
    assert not torch.equal(half.masters[0], half.masters[0].bfloat16().float())


@pytest.mark.slow
def test_an_update_moves_little_more_than_it_must(tmp_path):
    file = tmp_path / "out.json"
    words = ["--model", "digits", "--scales", "2", "--ranks", "4", "--output", str(file)]
    assert update.main([*words, "--engines", "one device", "ZeRO-1"]) == 0
    alone, sharded = json.loads(file.read_text())["rows"]
    # Beside those of the weights, a few numbers for the whole update.
    assert alone["ratio"] == pytest.approx(56 / 38, rel=0.02)
    assert sharded["ratio"] == pytest.approx(54 / 38, rel=0.02)
    # Of each gradient 4 bytes into the bucket, and 4 of this rank's quarter out of it; and of a
    # model that is one bucket 4 more, to join what goes to the same rank.
    assert sharded["reducing"] == pytest.approx(9, rel=0.01)


def test_a_restart_is_divided_by_what_the_launch_says():
    lines = [
        (11.0, "attempt 0: worker 1 died; the workers start again at once"),
        (12.5, "attempt 1: 2 workers on 127.0.0.1 (host)"),
        (13.0, "[9s] 2 of 2 workers have met"),
        (17.0, "[13s] the model is there"),
        # Nothing was saved, so no line tells of a restore.
        (18.0, "[14s] the first batch is there; the first update takes longer"),
        (18.5, "[14s] the first update is done"),
    ]
    blows = restart.Blows()
    blows.add(10.0, lines)
    blows.add(10.0, [(at + 1.0, line) for at, line in lines])
    blows.add(10.0, [(at + 2.0, line) for at, line in lines])
    assert blows.totals == [8.5, 9.5, 10.5]
    row = blows.row()
    parts = [row[f"{name}_s"] for name in ("noticed", "processes", "met", "model", "restored")]
    assert parts == [2.0, 1.5, 0.5, 4.0, 0.0]
    assert (row["batch_s"], row["update_s"], row["middle_s"]) == (1.0, 0.5, 9.5)


@pytest.mark.slow
def test_the_memory_of_a_save_is_counted(tmp_path):
    file = tmp_path / "out.json"
    asked = [*TINY, "--size", "S/2", "--depth", "2", "--output", str(file)]
    assert save_memory.main(asked) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["state_mib"] > 150
    # One copy and no more: this is no timing, and the state is far larger than a page.
    assert row["snapshot_per_state"] == pytest.approx(1.0, abs=0.05)
    # Six parts of 16 MiB, and what boto3 makes of them.
    assert row["upload_mib"] < 256


@pytest.mark.slow
def test_the_utilisation_is_that_of_the_stated_formula(tmp_path):
    file = tmp_path / "out.json"
    asked = [*TINY_MODEL, "--batch", "6", "--compile", "off", "--peak-tflops", "0.5"]
    gpu_training.main([*asked, "--scales", "2", "--output", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    work = TrainingWork(
        TransformerConfig(depth=2, width=64, heads=2),
        scales=2,
        latents=Latents(batch=6, channels=4, size=8),
        device=CPU,
    )
    flops = 6 * work.multiply_adds * row["images_per_s"]
    assert row["mfu"] == pytest.approx(flops / 0.5e12)
    shares = [row.get(kind, 0.0) for kind in ("matmul", "attention", "norm", "optimizer")]
    assert 0 < sum(shares) < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_benchmark_says_so_and_fails():
    with pytest.raises(SystemExit, match="nothing was measured"):
        gpu_training.main([])


@pytest.mark.parametrize("benchmark", [training_step, expert_matmul, gpu_training])
def test_batches_that_the_stages_cannot_share_are_refused(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([*TINY, "--batch", "4", "--scales", "3"])
    assert "multiple of every K" in capsys.readouterr().err


def test_the_ways_of_attention_agree_in_values_and_gradients():
    attention = Attention(
        (4, 16, 64), batch=2, heads=2, head_width=8, device=CPU, dtype=torch.float32
    )
    ways = (attention.prefix(), attention.joining(), attention.masked())
    for *got, want in zip(*ways, strict=True):
        for values in got:
            torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-5)
    attention.with_backward(attention.prefix)()
    pieces = torch.cat([scale.grad for scale in attention.scales], dim=1)
    attention.with_backward(attention.masked)()
    torch.testing.assert_close(pieces, attention.joined.grad, rtol=1e-5, atol=1e-5)


def test_prefix_attention_keeps_no_mask_and_no_scores():
    """What it keeps grows with the tokens; a mask or scores would grow with their square."""
    small, large = (
        kept_bytes(
            Attention(
                (n, 4 * n, 16 * n), batch=1, heads=2, head_width=8, device=CPU, dtype=torch.float32
            ).prefix
        )
        for n in (16, 64)
    )
    assert large == pytest.approx(4 * small, rel=0.01)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("aten::addmm", "matmul"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("aten::native_layer_norm_backward", "norm"),
        ("triton_per_fused_addcmul_native_layer_norm_3", "fused"),
        ("triton_poi_fused_addmm_gelu_3", "fused"),
        ("triton_poi_fused__to_copy_cat_1", "fused"),
        ("triton_tem_fused_addmm_5", "matmul"),
        ("triton_poi_fused_gelu_7", "fused"),
        ("aten::_foreach_addcdiv_", "optimizer"),
        ("multi_tensor_apply_kernel", "optimizer"),
        ("aten::copy_", "copy"),
        ("aten::gelu", "elementwise and other"),
    ],
)
def test_kernels_are_told_by_their_names(kernel, kind):
    assert kind_of(kernel) == kind


def test_shares_sum_to_one_and_find_the_matrix_products():
    a = torch.randn(512, 512)
    shares = shares_by_kind(lambda: a @ a, device=CPU)
    assert sum(shares.values()) == pytest.approx(1)
    assert next(iter(shares)) == "matmul"
    assert shares["matmul"] > 0.5


def test_the_made_photographs_are_as_large_as_those_of_imagenet():
    sizes = [len(data) for data in photographs(None, count=4)]
    assert 80_000 < sum(sizes) / 4 < 140_000


def test_photographs_of_a_folder_are_repeated_and_a_folder_without_any_is_named(tmp_path):
    with pytest.raises(SystemExit, match="holds no file that ends in"):
        photographs(tmp_path, count=1)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.JPEG").write_bytes(b"one")
    (tmp_path / "2.jpg").write_bytes(b"two")
    assert photographs(tmp_path, count=3) == [b"two", b"one", b"two"]


def test_the_data_benchmarks_are_named(capsys):
    assert data_main(["--help"]) == 0
    assert data_main(["nothing"]) == 2
    said = capsys.readouterr().out
    assert all(name in said for name in ("decoding", "streaming", "starting", "waiting"))
