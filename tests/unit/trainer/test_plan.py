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
from models.transformer.cost import parameters
from trainer.cli.plan import main
from trainer.config.composition import compose_job
from trainer.config.reading import ConfigError, to_dict
from trainer.engine.protocol import EngineConfig
from trainer.planning.placing import (
    cost_table,
    model_shape,
    predict_configured,
    resolve_placement,
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
    assert "No sharding is needed" in done.stdout


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
    assert resolve_placement(with_engine(xl, placement="auto")) == Placement((1, 1, 1))
    # Whole weights are 3.8 of 10.5 GiB with ZeRO-1.
    tight = with_engine(with_memory(xl, TIGHT_GIB), placement="auto", zero_stage=1)
    found = predict_configured(tight)
    assert found.zero_stage == 1
    assert found.placement.sharded
    assert resolve_placement(tight) == found.placement


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
    own = {"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}}
    work = workload(with_engine(xl, deepspeed=own))
    assert (work.bucket_elements, work.reduces_in_backward) == (1000, True)


def test_one_stage_per_step_may_put_every_image_at_the_finest(xl):
    work = workload(replace(xl, flow=replace(xl.flow, stage_choice="one_per_step")))
    assert [load.max_images for load in work.scales] == [12, 12, 12]
    assert [load.images for load in work.scales] == [12, 8, 4]


def test_the_plain_engine_has_no_stages_to_choose_from(capsys):
    words = [*job_words("h100_8"), "engine.kind=plain", "engine.precision=fp32", "--json"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {one["zero_stage"] for one in plan["candidates"]} == {0}


def test_the_dry_run_tells_of_the_placement_it_would_take(xl):
    whole = cost_table(xl)
    sharded = cost_table(with_engine(xl, placement={2: 8, 1: 8, 0: 8}))
    weights = [table[table.index("  weights") :].split()[1] for table in (whole, sharded)]
    assert [float(value) for value in weights] == pytest.approx(
        [parameters(model_shape(xl)).total * 2 / 2**30, 0.5], abs=0.05
    )
    assert "in host memory" not in whole
    assert "in host memory" in cost_table(with_engine(xl, offload_optimizer=True))


def test_a_placement_survives_the_way_to_the_workers(xl):
    plain = to_dict(replace(xl, engine=EngineConfig(placement={2: 4})))
    assert plain["engine"]["placement"] == {"2": 4}
    assert plain["cluster"]["hardware"]["gpus_per_node"] == 8
    assert HardwareConfig(**plain["cluster"]["hardware"]) == xl.cluster.hardware
