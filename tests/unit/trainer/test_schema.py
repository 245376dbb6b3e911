"""The configuration: every mistake is refused with the key, the value and a fix."""

import dataclasses
import re

import pytest

from tests.support.configuration import configuration
from trainer.cli.drawing_config import SampleConfig
from trainer.config.composition import compose_job, parse_words
from trainer.config.groups import members
from trainer.config.job import JobConfig, config_fingerprint, difference, fingerprinted, science
from trainer.config.reading import ConfigError, defaults, from_dict, to_dict
from trainer.config.shapes import encodes, flow_shape
from trainer.training.validate import validate

LATENT = ("+exp=digits", "codec=sd_vae", "data.image_size=64", "data.prepare=none")


def refused(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        validate(compose_job(overrides))
    assert type(caught.value) is not ValueError
    message = str(caught.value)
    assert "\n" not in message
    return message


def chosen(*overrides: str) -> dict[str, object]:
    return science(configuration(*overrides), data_digest="digest")


@pytest.mark.parametrize("name", members("exp"))
def test_every_experiment_is_valid(name):
    job = configuration(f"+exp={name}")
    if job.data.classes == 0:  # a launch asks the data set for them
        job = configuration(f"+exp={name}", "data.classes=1")
    validate(job)
    assert job.run == name.replace("/", "-")


def test_a_configuration_survives_the_way_to_the_workers():
    job = compose_job(["+exp=digits", "flow=three_scales", "+engine.deepspeed.a={b: 1}"])
    assert from_dict(JobConfig, to_dict(job)) == job


def test_the_command_line_wins_over_the_experiment():
    job = compose_job(["+exp=digits", "model=b_2", "train.seed=7", "run=mine"])
    assert (job.model.width, job.train.seed, job.run) == (768, 7, "mine")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["+exp=digitz"], ["exp=digitz", "digits", "imagenet_xl", "ablation/gvp"]),
        (["exp=digits"], ["+exp=digits"]),
        (["+exp=digits", "optim.learning_rat=1"], ["optim.learning_rat", "optim.learning_rate?"]),
        (["+exp=digits", "modle=xl_2"], ["modle", "model"]),
        (["+exp=digits", "model=xxl"], ["model=xxl", "xl_2"]),
        (["+exp=digits", "train.seed=two"], ["train.seed='two'", "integer"]),
        (["+exp=digits", "+train.seed=2"], ["without +", "train.seed=2"]),
        (["+exp=digits", "engine.kind=magic"], ["engine.kind='magic'", "zero"]),
        (["+exp=digits", "train.global_batch=130"], ["train.global_batch=130", "128"]),
        (["+exp=digits", "cluster.workers=3"], ["train.global_batch=128", "cluster.workers=3"]),
        (["+exp=digits", "engine.micro_batch=24"], ["engine.micro_batch=24", "32"]),
        (
            ["+exp=digits", "flow.scales=4", "flow.critical_times=null"],
            ["data.image_size=8", "flow.scales=4", "at most 3"],
        ),
        (["+exp=digits", "model.heads=5"], ["heads=5", "width=96"]),
        (["+exp=digits", "engine.zero_stage=4"], ["engine.zero_stage=4", "3 (weights too)"]),
        (
            ["+exp=digits", "engine=plain", "+engine.deepspeed.communication_data_type=fp16"],
            ["engine.deepspeed.communication_data_type", "engine.kind=zero", "engine=zero1"],
        ),
        (
            ["+exp=digits", "engine=plain", "engine.offload_optimizer=true"],
            ["engine.offload_optimizer=True", "engine.kind=zero"],
        ),
        (["+exp=digits", "engine.activation_checkpointing=[2]"], ["[2]", "0 (finest) to 1"]),
        (
            [
                *("+exp=digits", "cluster.backend=local", "eval.during.every_images=6400"),
                "eval.during.where=beside",
            ],
            ["eval.during.where=beside", "cluster.backend=local", "eval.during.where=inline"],
        ),
        (
            ["+exp=digits", "engine.zero_stage=3", "eval.sampler.solver=dopri5"],
            ["eval.sampler.solver=dopri5", "engine.zero_stage=3", "fixed steps"],
        ),
        (
            ["+exp=digits", "engine.placement={1:2}", "eval.sampler.solver=dopri5"],
            ["eval.sampler.solver=dopri5", "sharded experts", "fixed steps"],
        ),
        *(
            (
                ["+exp=digits", f"+engine.deepspeed.zero_optimization.{setting}"],
                [f"zero_optimization.{setting.split('=')[0]}", "engine.zero_stage", "overlap_comm"],
            )
            for setting in ("stage=3", "round_robin_gradients=true", "zero_hpz_partition_size=2")
        ),
        # A placement of another number of scales, of other ranks, widths and nodes.
        (["+exp=digits", "engine.placement={2:2}"], ["engine.placement={2:2}", "0 (finest) to 1"]),
        (["+exp=digits", "engine.placement={1:0}"], ["engine.placement={1:0}", "at least 1"]),
        (
            ["+exp=digits", "engine.placement={1:3}"],
            ["{1:3}", "number of ranks, which is 2", "nearest that does is {1:2}"],
        ),
        (
            ["+exp=digits", "cluster.workers=64", "engine.placement={1:64}"],
            ["{1:64}", "width", "96"],
        ),
        (
            [
                "+exp=digits",
                "cluster.workers=4",
                "cluster.hardware.gpus_per_node=2",
                "engine.placement={1:4}",
            ],
            ["{1:4}", "node", "{1:2}"],
        ),
        (
            ["+exp=digits", "model.ties.scales=[0,1]", "engine.placement={1:2}"],
            ["{1:2}", "share weights", "same E"],
        ),
        (["+exp=digits", "engine.placement=auto"], ["engine.placement=auto", "gpu_memory_gib"]),
        (["+exp=digits", "engine.placement=somewhere"], ["engine.placement='somewhere'"]),
        (["+exp=digits", "train.label_dropout=0"], ["guidance_scale=1.5", "label_dropout=0"]),
        (["+exp=digits", "train.label_dropout=1.5"], ["train.label_dropout=1.5"]),
        (["+exp=digits", "flow.critical_times=[0.2,0.5]"], ["critical_times"]),
        (["+exp=digits", "data.image_size=16"], ["data.image_size=16", "data.prepare=digits"]),
        (["+exp=digits", "run=../else"], ["run='../else'"]),
        (["+exp=digits", "store.endpoint_url=http://me:secret@host"], ["credentials"]),
        (["+exp=digits", "store.endpoint_url=http://host/#token=secret"], ["credentials"]),
        (["+exp=digits", "tracking.uri=http://me:secret@host"], ["tracking.uri"]),
        (["+exp=digits", "tracking.uri=http://host/#token=secret"], ["credentials"]),
        (["+exp=digits", "cluster.workers=0"], ["workers", "0"]),
        (["+exp=digits", "eval.sampler.steps=0"], ["eval.sampler", "steps=0"]),
        (["+exp=digits", "eval.sampler.steps=1"], ["eval.sampler.steps=1", "at least 2"]),
        (["+exp=digits", "checkpoint.keep_last=0"], ["keep_last=0"]),
        (["+exp=digits", "checkpoint.interval_images=-1"], ["interval_images=-1"]),
        (["+exp=digits", "store.retries=0"], ["retries=0"]),
        (["+exp=digits", "eval.samples=1"], ["eval.samples=1"]),
        (["+exp=digits", "eval.batch=0"], ["eval.batch=0"]),
        (["+exp=digits", "engine.micro_batch=0"], ["engine.micro_batch=0"]),
        (["+exp=digits", "optim.learning_rate=-1"], ["optim.learning_rate=-1"]),
        (["+exp=digits", "optim.learning_rate=nan"], ["optim.learning_rate=nan"]),
        (["+exp=digits", "train.total_images=0"], ["train.total_images=0"]),
        (["+exp=digits", "data.channels=2", "data.prepare=none"], ["data.channels=2"]),
        (["+exp=digits", "data.name=../x"], ["data.name='../x'"]),
        (
            ["+exp=digits", "+engine.deepspeed.data_types.grad_accum_dtype=bf16"],
            ["engine.deepspeed.data_types", "engine.grad_accum_dtype"],
        ),
        (
            ["+exp=digits", "+engine.deepspeed.prescale_gradients=true"],
            ["engine.deepspeed.prescale_gradients", "leave it out"],
        ),
        (
            ["+exp=digits", "+engine.deepspeed.gradient_accumulation_steps=4"],
            ["engine.deepspeed.gradient_accumulation_steps", "engine.micro_batch"],
        ),
        ([*LATENT, "data.image_size=60"], ["data.image_size=60", "codec.factor=8", "64"]),
        ([*LATENT, "data.image_size=4"], ["data.image_size=4", "codec.factor=8", "such as 8"]),
        (
            [*LATENT, "flow=three_scales", "model.patch_size=4", "train.global_batch=192"],
            ["data.image_size=64", "latents of 8 x 8", "multiple of 128", "at most 2"],
        ),
        ([*LATENT, "model.patch_size=3"], ["model.patch_size=3", "multiple of 48"]),
        (["+exp=digits", "codec.source=vae"], ["codec.source=vae", "kind=identity"]),
        (["+exp=digits", "codec.kind=autoencoder_kl"], ["codec.source=None", "on the hub"]),
        (["+exp=digits", "codec=sd_vea"], ["codec=sd_vea", "sd_vae", "eq_vae", "identity"]),
        (["+exp=digits", "data.image_size=0"], ["data.image_size=0", "at least 1"]),
        (["+exp=digits", "data.space=latent"], ["data.space=latent", "codec=eq_vae"]),
        (
            ["+exp=digits", "codec=sd_vae", "data.space=latent", "data.channels=3"],
            ["data.channels=3", "codec.channels=4"],
        ),
        (
            ["+exp=digits", "flow.stage_choice=one_per_step", "engine.micro_batch=24"],
            ["engine.micro_batch=24", "1, 2, 4, 8, 16, 32, 64"],
        ),
        ([], ["+exp=NAME", "digits"]),
        (["model=b_2"], ["+exp=NAME"]),
    ],
)
def test_mistakes_are_named_with_their_value_and_a_fix(overrides, parts):
    message = refused(*overrides)
    for part in parts:
        assert part in message, message
    assert "secret" not in message


def test_nothing_composed_can_name_code_to_run():
    assert "_target_" in refused("+exp=digits", "+model._target_=os.system")


@pytest.mark.slow
def test_science_holds_what_decides_the_weights_and_nothing_else():
    base = chosen("+exp=digits")
    operational = (
        "cluster.workers=1",
        "engine.zero_stage=1",
        "checkpoint.keep_last=9",
        "tracking.experiment=other",
        "eval.samples=10",
        "train.total_images=512000",
        "data.prefix=s3://bucket/digits",
        "loader.prefetch_batches=5",
        "train.ema.device=host",
    )
    other = chosen("+exp=digits", *operational)
    assert fingerprinted(other) == fingerprinted(base)
    assert config_fingerprint(other) == config_fingerprint(base)
    # Recorded all the same, so that the run's images are found again and measured with alike.
    assert (other["eval"]["samples"], other["data"]["prefix"]) == (10, "s3://bucket/digits")
    for scientific in (
        "train.seed=1",
        "train.ema.decay=0.9",
        "optim.learning_rate=1e-4",
        "model.depth=5",
        "flow=one_scale",
        "engine.precision=bf16",
        "loader.shuffle_block_samples=99",
        "+engine.deepspeed.communication_data_type=fp16",
    ):
        other = chosen("+exp=digits", scientific)
        assert config_fingerprint(other) != config_fingerprint(base), scientific
    assert difference(base, chosen("+exp=digits", "train.seed=1")) == ["train.seed: 0 -> 1"]
    assert science(configuration("+exp=digits"), data_digest="other") != base


def test_the_flow_works_on_latents_where_images_are_encoded_on_the_way():
    def shape(*overrides: str) -> tuple[int, int]:
        job = configuration(*overrides)
        validate(job)
        found = flow_shape(job.data, job.codec)
        assert found.classes == job.data.classes
        return found.channels, found.size

    assert shape("+exp=digits") == (1, 8)
    assert shape(*LATENT) == (4, 8)
    assert shape("+exp=imagenet_xl") == (4, 32)
    assert encodes(configuration(*LATENT))
    assert not encodes(configuration("+exp=digits"))
    assert not encodes(compose_job([*LATENT, "data.space=latent", "data.channels=4"]))


def test_one_stage_per_step_needs_no_share_for_each_stage():
    validate(
        compose_job(
            [
                "+exp=digits",
                "flow.stage_choice=one_per_step",
                "train.global_batch=6",
                "engine.micro_batch=1",
            ]
        )
    )


def test_the_autoencoder_is_science_and_its_place_is_not():
    def hashed(*overrides: str, digest: str = "digest") -> str:
        return config_fingerprint(
            science(configuration(*LATENT, *overrides), data_digest="data", codec_digest=digest)
        )

    assert hashed("codec.source=/elsewhere") == hashed()
    assert hashed(digest="other") != hashed()
    assert hashed("codec.scale=0.5") != hashed()
    assert hashed("codec.posterior=mean") != hashed()
    recorded = science(configuration(*LATENT), data_digest="data", codec_digest="digest")
    assert recorded["codec"]["source"] == "stabilityai/sd-vae-ft-ema"
    assert recorded["autoencoder"] == {"sha256": "digest"}


def test_the_length_is_science_once_the_rate_decays_with_it():
    cosine = ["+exp=digits", "optim.decay=cosine"]
    longer = [*cosine, "train.total_images=512000"]
    assert chosen(*cosine) != chosen(*longer)


def test_every_setting_is_documented():
    def check(config: object) -> None:
        for field in dataclasses.fields(config):
            documentation = "".join(kind.__doc__ or "" for kind in type(config).__mro__[:-1])
            assert re.search(rf"^ +{field.name}:", documentation, re.M), (config, field.name)
            if dataclasses.is_dataclass(value := getattr(config, field.name)):
                check(value)

    check(configuration("+exp=digits"))


def test_what_must_be_given_is_asked_for():
    assert defaults(SampleConfig)["checkpoint"] == "???"
    with pytest.raises(ConfigError, match="checkpoint"):
        parse_words(SampleConfig, ["columns=3"])
    with pytest.raises(ConfigError, match="colums"):
        parse_words(SampleConfig, ["checkpoint=x", "colums=3"])
    with pytest.raises(ConfigError, match="key=value"):
        parse_words(SampleConfig, ["checkpoint"])
