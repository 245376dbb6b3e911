"""What a card says to install is enough to run what the card says to run."""

import hashlib
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.support.interpreter import Interpreter, clone_project
from tests.unit.trainer.export.runs import export, save_run
from trainer.export.model_card import NEEDED

ROOT = Path(__file__).resolve().parents[4]
DIGEST = "print(hashlib.sha256(images[0].tobytes()).hexdigest())"


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", card, re.DOTALL | re.MULTILINE)


def test_what_the_card_needs_is_what_the_project_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(NEEDED) <= set(project["dependencies"])


@pytest.mark.slow
def test_the_card_runs_with_nothing_but_what_it_says_to_install(tmp_path, monkeypatch):
    run = save_run(tmp_path / "store", "everything")
    folder = export(run, tmp_path / "out", weights="both")
    card = (folder / "README.md").read_text()
    (install,) = blocks(card, "bash")
    interpreter = Interpreter(tmp_path / "venv", NEEDED)
    clone = tmp_path / "clone"
    clone_project(clone)
    interpreter.run("sh", "-ec", install, place=clone)

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere / folder.name)
    code = "\n".join(["import hashlib", *blocks(card, "python"), DIGEST])
    code += "\nimport trainer; print(trainer.__file__)"
    digest, place = interpreter.run("python", "-c", code, place=elsewhere).splitlines()
    assert Path(place).is_relative_to(tmp_path / "venv")

    monkeypatch.chdir(elsewhere)
    session: dict = {}
    exec("\n".join(blocks(card, "python")), session)
    assert digest == hashlib.sha256(session["images"][0].tobytes()).hexdigest()


def test_an_interpreter_without_a_package_of_the_list_is_noticed(tmp_path):
    interpreter = Interpreter(tmp_path, ["einops"])
    assert "True False" in interpreter.run(
        "python",
        "-c",
        "from importlib.util import find_spec as find; print(*(find(n) is not None for n in "
        "('einops', 'torchdiffeq')))",
        place=tmp_path,
    )
