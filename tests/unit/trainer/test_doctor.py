"""The doctor imports all that the project and its documentation import, and says what fails."""

import re
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trainer.cli import doctor

ROOT = Path(__file__).resolve().parents[3]
OWN = {"models", "pipelines", "cluster", "trainer"}
DOCS = "\n".join(page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


def test_all_that_the_project_needs_is_looked_at():
    needed = map(Requirement, requires("lapflow-trainer"))
    assert {each.name for each in needed if "extra" not in str(each.marker)} <= set(doctor.IMPORTS)


def test_all_that_the_documentation_imports_is_looked_at():
    imported = set(re.findall(r"^(?:from|import) (\w+)[\w.]*(?: import|$)", DOCS, re.MULTILINE))
    assert {"torch", "trainer"} <= imported
    found = packages_distributions()
    distributions = {found[name][0].lower().replace("_", "-") for name in imported - OWN}
    assert distributions <= set(doctor.IMPORTS)


@pytest.mark.slow
def test_users_can_import_what_the_documentation_is_about(monkeypatch):
    together = {name: doctor.IMPORTS[name] for name in ("torchvision", "diffusers")}
    monkeypatch.setattr(doctor, "IMPORTS", together)
    assert [finding.text() for finding in doctor.examine() if finding.wrong] == []


def test_what_fails_is_told_with_its_reason_and_a_fix(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor,
        "IMPORTS",
        {
            "numpy": "import numpy",
            "einops": "raise RuntimeError('operator torchvision::nms does not exist')",
            "no-such-package": "import no_such_package",
        },
    )
    assert doctor.main([]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said if re.match("ok|WRONG", line)][:4] == [
        ["ok", "python"],
        ["ok", "numpy"],
        ["WRONG", "einops"],
        ["WRONG", "no-such-package"],
    ]
    assert any("RuntimeError: operator torchvision::nms does not exist" in line for line in said)
    assert "       it is not installed" in said
    assert said.count("       fix: make clean-venv setup") == 2
    assert re.match(r"2 of \d wrong", said[-1])


def test_a_version_that_the_project_cannot_use_is_told(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["numpy>=99"])
    monkeypatch.setattr(doctor, "IMPORTS", {"numpy": "import numpy"})
    (wrong,) = [finding for finding in doctor.examine() if finding.wrong]
    assert wrong.wrong == "the project needs numpy>=99"
