"""The planning command on the clusters that have names, and what a job makes of its placement."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from cluster.hardware import HardwareConfig
from cluster.placement import Placement
from models.transformer.config import TransformerConfigError
from models.transformer.cost import parameters
from trainer.cli.plan import main
from trainer.config.composition import compose_job
from trainer.config.reading import ConfigError, to_dict
from trainer.engine.protocol import EngineConfig
from trainer.engine.zero_config import KEEP_WEIGHTS
from trainer.planning.memory import rank_memory
from trainer.planning.placing import (
    cost_table,
    model_shape,
    predict_configured,
    resolve_placement,
    settle,
    workload,
)

WORKERS = {"one_24gb": 1, "eight_24gb": 8, "h100_8": 8, "h100_8x8": 64, "h100_128x8": 1024}
FLOWS = {2: "two_scales", 3: "three_scales", 4: "four_scales"}
MODELS, SIZES = ("xl_2", "xxl_2", "xxxl_2"), (256, 512, 1024)


TIGHT_GIB = 11.2
"""Of which 90 % are less than XL takes with ZeRO-1, replicated."""


def job_words(cluster: str, *, scales: int = 3, images: int = 12) -> list[str]:
    batch = images * WORKERS[cluster]
    return [
        "+exp=imagenet_xl",
        f"cluster={cluster}",
        f"flow={FLOWS[scales]}",
        f"train.global_batch={batch}",
    ]


def cases():
    """A third of all combinations: each two of cluster, scales, model and size meet."""
    names = product(enumerate(WORKERS), enumerate(FLOWS), enumerate(MODELS), enumerate(SIZES))
    for (a, cluster), (b, scales), (c, model), (d, size) in names:
        if (a + b + c + d) % 3 == 0:
            yield cluster, scales, model, size


@cache
def memory_of(cluster: str) -> float | None:
    return compose_job(job_words(cluster)).cluster.hardware.gpu_memory_gib


@pytest.mark.slow
@pytest.mark.parametrize(("cluster", "scales", "model", "size"), list(cases()))
def test_there_is_a_decision_for_every_named_cluster(cluster, scales, model, size, capsys):
    words = [*job_words(cluster, scales=scales), f"model={model}", f"data.image_size={size}"]
    code = main([*words, "--json"])
    plan = json.loads(capsys.readouterr().out)
    chosen, limit = plan["chosen"], memory_of(cluster)
    assert code == (0 if chosen else 1)
    fitting = [one for one in plan["candidates"] if one["fits"]]
    assert fitting[:1] == ([chosen] if chosen else [])
    for one in plan["candidates"]:
        sizes = one["bytes_per_rank"]
        assert sizes["total"] == sum(sizes.values()) - sizes["total"] - sizes["host"]
        assert one["fits"] == (sizes["total"] <= 0.9 * limit * 2**30)
    decision = plan["words"][0]
    if chosen is None:
        assert decision.startswith("Nothing fits")
    else:
        assert decision.startswith("Shard" if chosen["placement"] else "No sharding is needed")
    assert any(line.startswith("With all scales tied") for line in plan["words"])


def test_the_table_is_short_and_marks_the_choice(capsys):
    assert main(job_words("h100_8")) == 0
    out = capsys.readouterr().out
    table, words = out.split("\n\n")
    head, first, *rows, last = table.splitlines()
    assert head.split()[:3] == ["placement", "ZeRO", "weights"]
    assert first.startswith("*")
    assert not any(row.startswith("*") for row in rows)
    assert sum("replicated" in row for row in [first, *rows]) == 3
    assert last.endswith("more (--all)")
    assert "As configured (engine.placement=replicated engine.zero_stage=2)" in words
    assert main([*job_words("h100_8"), "--all"]) == 0
    assert len(capsys.readouterr().out.split("\n\n")[0].splitlines()) == 1 + 3 * 4**3


def test_offloaded_state_has_a_column(capsys):
    assert main([*job_words("one_24gb"), "engine.offload_optimizer=true"]) == 0
    head = capsys.readouterr().out.splitlines()[0].split()
    assert {"host", "offload"} < set(head)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+exp=imagenet_xl"], "gpu_memory_gib=null: nothing tells what fits"),
        (["+exp=imagenet_xl", "cluster=h100_9"], "configs/cluster has"),
        (
            ["+exp=imagenet_xl", "cluster=h100_8", "flow=three_scales"],
            "train.global_batch=256.*use a multiple of 24, such as 264",
        ),
        ([*job_words("h100_8"), "data.image_size=40"], "must be a multiple of 8"),
        ([*job_words("h100_8"), "engine.placement={2:16}"], "must not span nodes"),
        ([*job_words("h100_8"), "cluster.hardware.gpus_per_node=0"], "gpus_per_node is 0"),
    ],
)
def test_a_bad_configuration_is_refused_in_words(words, message, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)


@pytest.mark.slow
def test_it_loads_nothing_that_trains():
    program = (
        "import sys; from trainer.plan import main; "
        f"main({job_words('h100_8x8')!r}); "
        "print({'ray', 'deepspeed', 'streaming', 'mlflow'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=540
    )
    assert done.stderr.strip() == "set()"
    assert "As configured (engine.placement=replicated engine.zero_stage=2)" in done.stdout


@pytest.fixture
def xl():
    return compose_job(job_words("h100_8"))


def with_engine(job, **changes):
    return replace(job, engine=replace(job.engine, **changes))


def with_memory(job, gib):
    hardware = replace(job.cluster.hardware, gpu_memory_gib=gib)
    return replace(job, cluster=replace(job.cluster, hardware=hardware))


def test_replicated_and_named_placements_are_taken_as_they_are(xl):
    assert resolve_placement(xl) == Placement((1, 1, 1))
    assert resolve_placement(with_engine(xl, placement={2: 8, 0: 2})) == Placement((8, 1, 2))


def test_auto_keeps_the_stage_and_takes_the_fastest_that_fits(xl):
    many = compose_job(job_words("h100_8", images=33))
    auto = with_engine(many, placement="auto", overlap_exchange=False)
    assert resolve_placement(auto) == Placement((1, 1, 1))
    # What is hidden need not be avoided.
    assert resolve_placement(with_engine(auto, overlap_exchange=True)).sharded
    # Whole weights are 3.8 of 10.5 GiB with ZeRO-1.
    tight = with_engine(with_memory(xl, TIGHT_GIB), placement="auto", zero_stage=1)
    found = predict_configured(tight)
    assert found.zero_stage == 1
    assert found.placement.sharded
    assert resolve_placement(tight) == found.placement


def test_what_is_left_open_is_settled_and_what_is_not_stays(xl):
    tight = with_engine(with_memory(xl, 7.5), placement="auto", zero_stage=1)
    found, settled = predict_configured(tight), settle(tight).engine
    assert settled.placement == found.placement.sharded
    assert settled.activation_checkpointing == found.recomputed
    assert found.recomputed
    assert settled.regather_tokens == found.regathers
    # It says now what it would have been planned as.
    assert predict_configured(replace(xl, engine=settled)).memory == found.memory
    given = with_engine(tight, activation_checkpointing=(0, 1, 2), regather_tokens=True)
    assert settle(given).engine.activation_checkpointing == (2, 1, 0)
    assert settle(given).engine.regather_tokens is True
    with pytest.raises(ConfigError, match=r"engine.placement=auto with engine.zero_stage=1"):
        settle(with_engine(tight, activation_checkpointing=()))
    plain = settle(xl).engine
    assert (plain.placement, plain.activation_checkpointing) == ("replicated", ())


def test_weights_are_kept_where_there_is_room_and_the_user_has_not_said(xl):
    many = compose_job(job_words("eight_24gb", images=33))
    auto = with_engine(many, placement="auto", zero_stage=3)
    found, settled = predict_configured(auto), settle(auto)
    assert found.keeps_weights
    assert found.time.total - found.time.encoding - found.time.update <= 0.5
    assert settled.engine.deepspeed == {"zero_optimization": dict(KEEP_WEIGHTS)}
    again = predict_configured(settled)
    assert (again.memory, again.time, str(again)) == (found.memory, found.time, str(found))
    tight = with_memory(auto, 14.6)
    other = predict_configured(tight)
    assert other.fits
    assert (other.keeps_weights, other.recomputed) == (False, ())
    assert settle(tight).engine.deepspeed == {}
    own = {"zero_optimization": {"stage3_max_reuse_distance": 5}}
    given = with_engine(auto, deepspeed=own)
    assert not predict_configured(given).keeps_weights
    assert settle(given).engine.deepspeed == own
    # What DeepSpeed keeps is decided by the distance alone, and what is given stays.
    ahead = with_engine(
        auto, deepspeed={"zero_optimization": {"stage3_max_live_parameters": 10**12}}
    )
    assert workload(ahead).kept_parameters == workload(with_engine(auto)).kept_parameters
    own = {"zero_optimization": KEEP_WEIGHTS | {"stage3_max_live_parameters": 7}}
    assert settle(with_engine(auto, deepspeed=own)).engine.deepspeed == own
    # Passes that are not alike keep nothing.
    random = replace(auto, flow=replace(auto.flow, stage_choice="one_per_step"))
    assert workload(random).kept_parameters == 0
    assert not predict_configured(random).keeps_weights


def test_memory_decides_what_auto_takes(xl):
    tight = with_engine(with_memory(xl, TIGHT_GIB), placement="auto", zero_stage=1)
    fit = predict_configured(tight)
    least = predict_configured(with_engine(tight, memory="least"))
    assert least.memory.total < fit.memory.total
    assert least.time.total > fit.time.total
    tighter = with_memory(tight, 8)
    with pytest.raises(ConfigError, match=r"does not fit 8 GiB.*engine.memory=fit"):
        resolve_placement(with_engine(tighter, memory="fastest"))


def test_the_table_of_costs_is_that_of_what_auto_decides(xl):
    least = with_engine(with_memory(xl, TIGHT_GIB), placement="auto", memory="least", zero_stage=1)
    assert cost_table(least) == cost_table(settle(least))
    assert re.search(r"experts +\{.*recomputed", cost_table(least))


def test_host_memory_that_is_too_little_is_named(xl):
    hardware = replace(xl.cluster.hardware, host_memory_gib=4.0)
    poor = replace(xl, cluster=replace(xl.cluster, hardware=hardware))
    with pytest.raises(ConfigError, match="host_memory_gib") as error:
        resolve_placement(with_engine(poor, offload_optimizer=True))
    assert "4.0 GiB" in str(error.value)
    assert "gpu_memory_gib" not in str(error.value)
    assert "offload_optimizer=true" not in str(error.value)


def test_no_plan_goes_through_blocks_without_end(xl):
    with pytest.raises(TransformerConfigError, match="depth=10001 must be at most 10000 blocks"):
        replace(xl.model, depth=10_001)
    deepest = replace(xl, model=replace(xl.model, depth=10_000, width=64, heads=4))
    assert resolve_placement(deepest) == Placement((1, 1, 1))


def test_what_does_not_fit_is_refused_with_what_does(xl):
    tight = with_engine(with_memory(xl, TIGHT_GIB), zero_stage=1)
    with pytest.raises(ConfigError, match=r"engine.placement=replicated.*zero_stage=1") as error:
        resolve_placement(tight)
    assert f"does not fit {TIGHT_GIB} GiB of cluster.hardware.gpu_memory_gib" in str(error.value)
    assert "placement   " in str(error.value)
    # Where memory is not known the user is believed.
    assert resolve_placement(with_memory(tight, None)) == Placement((1, 1, 1))


def test_auto_is_refused_where_nothing_fits_or_nothing_is_known(xl):
    auto = with_engine(xl, placement="auto")
    with pytest.raises(ConfigError, match=r"lower engine.micro_batch, set engine.activation"):
        resolve_placement(with_memory(auto, 2))
    with pytest.raises(ConfigError, match=r"engine.placement=auto: cluster.hardware.gpu_memory"):
        resolve_placement(with_memory(auto, None))


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({3: 2}, r"engine.placement=\{3:2\} has \{3:2\}, but the scales are 0"),
        ({2: 5}, r"engine.placement=\{2:5\} cannot work: .*nearest that does is \{2:4\}"),
    ],
)
def test_impossible_placements_are_refused_by_their_setting(xl, placement, message):
    with pytest.raises(ConfigError, match=message):
        resolve_placement(with_engine(xl, placement=placement))


def test_a_job_is_reduced_to_the_numbers_of_its_model(xl):
    work = workload(with_engine(xl, micro_batch=6, activation_checkpointing=(2,)))
    count = parameters(model_shape(xl))
    assert work.shared_parameters == count.shared
    assert tuple(load.parameters for load in work.scales) == count.per_scale
    assert [load.max_images for load in work.scales] == [6, 4, 2]
    assert [load.activation_checkpointing for load in work.scales] == [True, False, False]
    assert (work.images, work.grad_accum_steps, work.world_size, work.element_bytes) == (6, 2, 8, 2)
    # Whole rows: nothing is lost when matrices are divided.
    for ranks in (2, 4, 8):
        shards = work.shards(Placement((ranks,) * 3))
        assert sum(weights * times for weights, times in shards) == count.total


def test_settings_of_deepspeed_count(xl):
    own = {
        "reduce_bucket_size": 1000,
        "overlap_comm": True,
        "use_multi_rank_bucket_allreduce": True,
    }
    work = workload(with_engine(xl, deepspeed={"zero_optimization": own}))
    assert (work.bucket_elements, work.reduces_in_backward) == (1000, True)
    assert not work.reduces_to_owners
    assert workload(xl).reduces_to_owners
    assert not workload(with_engine(xl, offload_optimizer=True)).reduces_to_owners


def test_where_tokens_and_the_average_are_kept_counts(xl):
    assert workload(xl).regathers
    assert not workload(with_engine(xl, regather_tokens=False)).regathers
    assert workload(with_engine(xl, zero_stage=1)).overlaps_exchange
    assert not workload(with_engine(xl, zero_stage=3)).overlaps_exchange
    away = replace(xl, train=replace(xl.train, ema=replace(xl.train.ema, device="host")))
    assert not workload(xl).ema_on_host
    assert workload(away).ema_on_host
    assert "in host memory" in cost_table(away)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_each_average_takes_its_room(xl, stage):
    def kept(**ema):
        job = replace(xl, train=replace(xl.train, ema=replace(xl.train.ema, **ema)))
        return rank_memory(workload(job), resolve_placement(xl), zero_stage=stage)

    one, three = kept(), kept(decays=(0.999, 0.9999, 0.99))
    assert three.ema == 3 * one.ema
    assert replace(three, ema=one.ema) == one
    away, far = kept(device="host"), kept(device="host", decays=(0.999, 0.99))
    assert (away.host, far.host) == (one.ema, 3 * one.ema)
    assert away.ema == far.ema == 0
    assert far.buffers - one.buffers == 3 * (away.buffers - one.buffers) > 0


def test_the_plan_says_what_separate_weights_cost(capsys):
    assert main(job_words("h100_8", images=96)) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"Against one scale with the same images \(replicated, ZeRO-[^:]*: [\d.]+ GiB, [\d.]+ ms\) "
        r"the separate weights of 3 scales take [\d.]+ [MG]iB (more|less) of a rank, and "
        r"[\d.]+ ms less a step",
        words,
    )
    own = re.search(r"As configured .* ([\d.]+) ms and .* block by block, take ([\d.]+) ms", words)
    assert float(own[1]) == pytest.approx(float(own[2]), rel=0.03)
    one = ["+exp=imagenet_xl", "cluster=h100_8", "flow=one_scale", "train.global_batch=256"]
    assert main(one) == 0
    assert "Against one scale" not in capsys.readouterr().out


def test_one_stage_per_step_may_put_every_image_at_the_finest(xl):
    work = workload(replace(xl, flow=replace(xl.flow, stage_choice="one_per_step")))
    assert [load.max_images for load in work.scales] == [12, 12, 12]
    assert [load.images for load in work.scales] == [12, 8, 4]


def test_the_plain_engine_has_no_stages_to_choose_from(capsys):
    words = [*job_words("h100_8"), "engine.kind=plain", "engine.precision=fp32", "--json"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {one["zero_stage"] for one in plan["candidates"]} == {0}


def test_the_dry_run_tells_which_engine_trains(xl):
    one = replace(xl, cluster=replace(xl.cluster, workers=1))
    for job, engine in (
        (xl, "DeepSpeed, ZeRO-2"),
        (with_engine(xl, zero_stage=3), "DeepSpeed, ZeRO-3"),
        (with_engine(one, zero_stage=3), "torch alone"),
    ):
        assert re.search(rf"^engine +{engine}$", cost_table(job), re.MULTILINE)


def test_the_dry_run_tells_of_the_placement_it_would_take(xl):
    whole = cost_table(xl)
    sharded = cost_table(with_engine(xl, placement={2: 8, 1: 8, 0: 8}))
    weights = [table[table.index("  weights") :].split()[1] for table in (whole, sharded)]
    held = sum(count for count, _ in workload(xl).shards(Placement((8, 8, 8))))
    assert [float(value) for value in weights] == pytest.approx(
        [parameters(model_shape(xl)).total * 2 / 2**30, held * 2 / 2**30], abs=0.01
    )
    assert "in host memory" not in whole
    assert "in host memory" in cost_table(with_engine(xl, offload_optimizer=True))


def test_a_placement_survives_the_way_to_the_workers(xl):
    plain = to_dict(replace(xl, engine=EngineConfig(placement={2: 4})))
    assert plain["engine"]["placement"] == {"2": 4}
    assert plain["cluster"]["hardware"]["gpus_per_node"] == 8
    assert HardwareConfig(**plain["cluster"]["hardware"]) == xl.cluster.hardware


def test_one_gpu_is_planned_without_zero_and_two_with_it(capsys):
    words = ["+exp=imagenet_xl_latents", "cluster=h100_8", "cluster.workers=1"]
    assert main([*words, "train.global_batch=64"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "As configured (engine.placement=replicated engine.kind=plain)" in told
    (together,) = re.findall(r"With 2 GPUs and as many images on each: ([^.]*)\.", told)
    assert "no ZeRO" not in together
    assert "engine.zero_stage=0" not in told
