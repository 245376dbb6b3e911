"""A changed default shows here as a diff of every experiment that it reaches."""

import pytest

from tests.golden.render import FOLDER, rendered
from trainer.composition import members


@pytest.mark.parametrize("experiment", members("exp"))
def test_the_rendered_experiment_is_as_recorded(experiment):
    recorded = (FOLDER / f"{experiment}.yaml").read_text()
    assert rendered(experiment) == recorded, "if this change is meant: make golden, and say why"


def test_there_is_a_record_of_every_experiment_and_no_other():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == members("exp")
