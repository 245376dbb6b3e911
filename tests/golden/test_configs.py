"""A changed default shows here as a diff of every experiment that it reaches."""

import pytest

from tests.golden.render import FOLDER, rendered
from tests.support.configuration import configuration
from trainer.config.groups import members
from trainer.config.job import difference
from trainer.config.reading import to_dict

CHANGED = {
    "one_scale": {"flow.scales", "flow.critical_times"},
    "three_scales": {"flow.scales", "flow.critical_times", "train.global_batch"},
    "four_scales": {"flow.scales", "flow.critical_times"},
    "full_attention": {"model.attention"},
    "own_scale_attention": {"model.attention"},
    "gvp": {"flow.path"},
    "independent_noise": {"flow.noise"},
    "one_stage_per_step": {"flow.stage_choice"},
    "tied_scales": {"model.ties.scales"},
    "pixel": {"codec.kind", "codec.source", "codec.encode_precision", "model.patch_size"},
    "sd_vae": {"codec.source"},
}
ABLATIONS = [name for name in members("exp") if name.startswith("ablation/")]


@pytest.mark.parametrize("experiment", members("exp"))
def test_the_rendered_experiment_is_as_recorded(experiment):
    recorded = (FOLDER / f"{experiment}.yaml").read_text()
    assert rendered(experiment) == recorded, "if this change is meant: make golden, and say why"


def test_there_is_a_record_of_every_experiment_and_no_other():
    recorded = (path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.yaml"))
    assert sorted(name.as_posix() for name in recorded) == members("exp")


@pytest.mark.parametrize("experiment", ABLATIONS)
def test_an_ablation_changes_what_it_is_named_for_and_nothing_else(experiment):
    base, ablation = (
        to_dict(configuration(f"+exp={name}")) for name in ("celeba_hq_256", experiment)
    )
    changed = {line.partition(":")[0] for line in difference(base, ablation)} - {"run"}
    name = experiment.removeprefix("ablation/")
    assert changed == CHANGED.get(name, {"flow.critical_times"}), name
