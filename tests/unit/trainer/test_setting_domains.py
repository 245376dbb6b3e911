"""No number is taken that means nothing: each setting of each command against its domain."""

import dataclasses
import math
from functools import reduce
from typing import Any

import pytest

from pipelines.domains import Checked
from tests.support.commands import GIVEN, leaves, refusal
from tests.support.configuration import configuration
from trainer.cli.drawing_config import SampleConfig
from trainer.config.job import JobConfig
from trainer.config.reading import ConfigError, from_dict, to_dict
from trainer.config.settings import Setting, leaf_types
from trainer.config.written_paths import resolve_places
from trainer.training.validate import validate

LARGEST = 2**63 - 1
DIGITS = "+exp=digits"

# Least value, and the largest or the first that is too large, of every number by its last words.
COUNTS = (
    "image_size data.channels codec.factor codec.channels width heads patch_size flow.scales "
    "total_images global_batch batch adaptive_group share_coarse grid_columns grid_classes "
    "micro_batch "
    "workers min_workers cpus_per_worker beside_cpus gpus_per_node prefetch_batches decode_threads "
    "shuffle_block_samples "
    "download_threads open_files retries keep_last columns repeats zero_stage n"
)
FROM_ZERO = (
    "classes class_tokens warmup_images max_skipped_updates seed grid_interval_images every_images "
    "max_failures max_failures_in_place max_failures_of_node max_preemptions interval_images "
    "keep_every_images keep_best log_interval_images label choose "
    "weight_decay clip_norm guidance_scale patience_s grace_s flush_timeout_s hang_s "
    "download_patience_s gpus_per_worker beside_gpus shrink_after_s preflight_s"
)
ABOVE_ZERO = (
    "codec.scale mlp_ratio learning_rate epsilon "
    "start_timeout_s room_timeout_s gpu_memory_gib matmul_tflops node_link_gb_per_s "
    "fp32_tflops memory_gb_per_s launch_us "
    "network_gb_per_s "
    "host_link_gb_per_s host_memory_gib download_timeout_s cache_limit_gib connect_timeout_s "
    "read_timeout_s"
)
BELOW_ONE = "beta1 beta2 label_dropout ema.decay max_bad_fraction"
OTHER = {
    "min_area": lambda value: 0 < value <= 1,
    "max_aspect": lambda value: value >= 1,
    "final_ratio": lambda value: 0 <= value <= 1,
    "depth": lambda value: 1 <= value <= 10**4,
    "codec.shift": lambda value: True,
    "steps": lambda value: 1 <= value <= 10**4,
    "absolute_tolerance": lambda value: 1e-9 <= value <= 1,
    "relative_tolerance": lambda value: 1e-9 <= value <= 1,
    "samples": lambda value: 2 <= value <= 10**7,
    "compared": lambda value: 4 <= value <= 10**6,
    "port": lambda value: 1 <= value <= 65535,
    "seeds": lambda value: 1 <= value <= 1000,
}
DOMAINS = {
    **dict.fromkeys(COUNTS.split(), lambda value: value >= 1),
    **dict.fromkeys(FROM_ZERO.split(), lambda value: value >= 0),
    **dict.fromkeys(ABOVE_ZERO.split(), lambda value: value > 0),
    **dict.fromkeys(BELOW_ONE.split(), lambda value: 0 <= value < 1),
    **OTHER,
}
NONSENSE = [
    -LARGEST,
    -1,
    -1e-9,
    0,
    1e-300,
    1,
    1.5,
    7,
    10**9,
    2 * LARGEST,
    math.inf,
    -math.inf,
    math.nan,
]


def is_number(setting: Setting) -> bool:
    return setting.is_single and bool({int, float} & {*leaf_types(setting.wanted)})


def domain(setting: Setting) -> Any:
    words = setting.key.split(".")
    return DOMAINS.get(".".join(words[-2:])) or DOMAINS[words[-1]]


def changed(kind: type[Any], key: str, value: Any) -> Any:
    """The configuration with one value set, checked as its command does."""
    values = to_dict(configuration(DIGITS)) if kind is JobConfig else dict(GIVEN[kind])
    *groups, name = key.split(".")
    group: dict[str, Any] = values
    for each in groups:
        group = group.setdefault(each, {})
    group[name] = value
    config = resolve_places(from_dict(kind, values))
    if kind is JobConfig:
        validate(config)
    return config


NUMBERS = [(kind, each) for kind in GIVEN for each in leaves(kind) if is_number(each)]


@pytest.mark.parametrize(
    ("kind", "setting"), NUMBERS, ids=[f"{kind.__name__}-{each.key}" for kind, each in NUMBERS]
)
def test_no_number_is_taken_outside_of_its_domain(kind, setting):
    for value in NONSENSE:
        whole = float not in leaf_types(setting.wanted)
        meaningful = (
            math.isfinite(value)
            and abs(value) <= LARGEST
            and (not whole or value == int(value))
            and domain(setting)(value)
        )
        error = refusal(lambda value=value: changed(kind, setting.key, value))
        if error is None:
            assert meaningful, value
        else:
            # A meaningful value may contradict another setting.
            assert meaningful or setting.key.rpartition(".")[2] in error, (value, error)


@pytest.mark.parametrize(
    ("kind", "setting"), NUMBERS, ids=[f"{kind.__name__}-{each.key}" for kind, each in NUMBERS]
)
def test_a_component_refuses_such_a_number_also_where_it_is_made_in_python(kind, setting):
    config: Any = configuration(DIGITS) if kind is JobConfig else from_dict(kind, GIVEN[kind])
    *groups, name = setting.key.split(".")
    component = reduce(getattr, groups, config)
    whole = float not in leaf_types(setting.wanted)
    numbers = [each for each in NONSENSE if math.isfinite(each) and abs(each) <= LARGEST]
    wrong: list[Any] = [int(each) if whole else float(each) for each in numbers]
    wrong = [each for each in wrong if not domain(setting)(each)]
    if isinstance(component, Checked):  # those of the method and the cluster know no pydantic
        wrong += [math.inf, math.nan, True, "7", *([1.5] if whole else [])]
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            dataclasses.replace(component, **{name: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("flow.critical_times", [each]) for each in (0, 1, -1, 2, math.nan, math.inf)),
        *(("flow.scale_weights", [1, each]) for each in (0, -1, math.nan, math.inf)),
        *(("eval.sampler.guidance_interval", [0.5, each]) for each in (0, 2, math.nan, math.inf)),
        *(("model.ties.scales", each) for each in ([-1, 0], [1], [0, 0], [0, 7], [0, 0.5])),
        *(("engine.activation_checkpointing", [each]) for each in (-1, 7, 0.5, math.inf)),
        ("engine.activation_checkpointing", [0, 0]),
        *(("engine.placement", {1: each}) for each in (-2, 0, 0.5, math.inf, math.nan)),
        *(("data.streams.weight", each) for each in (0, -1, math.nan, math.inf)),
        ("engine.zero_stage", 0),
        ("engine.zero_stage", 4),
        ("codec.factor", 3),
        ("cluster.gpus_per_worker", 2),
        ("model.mlp_ratio", 1e-9),
        ("train.seed", True),
        ("optim.warmup_images", False),
        ("optim.warmup_images", 10**9),
        *((f"engine.deepspeed.{key}", each) for key in "ab" for each in (math.inf, math.nan)),
        *(("train.global_batch", each) for each in ("128", "64", "1e2", "")),
        *(("optim.learning_rate", each) for each in ("1e-4", "0.1", "fast")),
        ("flow.scale_weights", ["1", "1"]),
        ("eval.sampler.guidance_interval", [0.5]),
        ("eval.sampler.guidance_interval", [0.1, 0.2, 0.3]),
        ("flow.scale_weights", [True, 1]),
    ],
)
def test_no_list_of_numbers_is_taken_outside_of_its_domain(key, value):
    if key == "data.streams.weight":
        key, value = "data.streams", [{"prefix": "/a", "weight": value}]
    error = refusal(lambda: changed(JobConfig, key, value))
    assert key.rpartition(".")[2].removesuffix("s") in (error or "")


def test_classes_to_draw_are_not_negative():
    with pytest.raises(ConfigError, match="classes"):
        changed(SampleConfig, "classes", [3, -1])


def test_the_settings_of_deepspeed_pass_through():
    passed = {"communication_data_type": "fp32"}
    assert changed(JobConfig, "engine.deepspeed", passed).engine.deepspeed == passed


TEXTS = [
    (kind, each.key)
    for kind in GIVEN
    for each in leaves(kind)
    if each.is_text and not each.place and not each.words
]


@pytest.mark.parametrize(("kind", "key"), TEXTS, ids=[f"{kind.__name__}-{k}" for kind, k in TEXTS])
def test_no_text_is_taken_that_is_empty_or_more_than_a_line(kind, key):
    for text in ("", " ", "a\nb", "\x1b[2J"):
        error = refusal(lambda text=text: changed(kind, key, text)) or ""
        assert key in error, text
        assert error.isprintable()


SWITCHES = [(kind, each.key) for kind in GIVEN for each in leaves(kind) if each.wanted is bool]


@pytest.mark.parametrize(
    ("kind", "key"), SWITCHES, ids=[f"{kind.__name__}-{k}" for kind, k in SWITCHES]
)
def test_a_switch_is_true_or_false_and_nothing_that_looks_like_it(kind, key):
    for value in (1, 0, 1.0, "yes", "on", "t", "true", [True]):
        error = refusal(lambda value=value: changed(kind, key, value)) or ""
        assert f"{key}={value!r} must be true or false" in error, value
