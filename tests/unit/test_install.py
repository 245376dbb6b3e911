"""What install.sh asks of pip, with a pip that has some builds and not others."""

import os
import re
import subprocess
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)
CPU = [f"{name}=={PINS[name]}+cpu" for name in ("torch", "torchvision")]
ORDINARY = [f"{name}==={PINS[name]}" for name in ("torch", "torchvision")]

# Stands for Python: makes environments of itself, notes what pip is asked for, refuses what
# $REFUSED matches, and cannot import torchvision while $BROKEN names a file that is not there.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" "$3/packages"; cp "$0" "$3/bin/python" ;;
    *"pip install"*)
        words="$*"
        echo "${words#*--disable-pip-version-check }" >>"$ASKED"
        if [[ "$words" =~ $REFUSED ]]; then
            echo "ERROR: the index has no such build"
            exit 1
        fi ;;
    *sysconfig*) echo "$(dirname "$0")/../packages" ;;
    *"import torchvision"*) [ -z "$BROKEN" ] || [ -e "$(dirname "$0")/../packages/$BROKEN" ] ;;
esac
"""
NOTHING = "nothing at all"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = "torchvision_without_operators.pth"


class Installed:
    """What an install did: its exit code, all that it said, and what pip was asked for."""

    def __init__(self, folder: Path, *, refused: str = NOTHING, broken: str = "", **more: str):
        python, asked = folder / "python", folder / "asked"
        python.write_text(PYTHON)
        python.chmod(0o755)
        done = subprocess.run(
            [ROOT / "install.sh", python, folder / "venv"],
            env={**os.environ, "ASKED": f"{asked}", "REFUSED": refused, "BROKEN": broken} | more,
            capture_output=True,
            text=True,
            check=False,
        )
        self.code, self.said = done.returncode, done.stdout + done.stderr
        self.asked = [line.split() for line in asked.read_text().splitlines()]
        self.declared = (folder / "venv/packages" / DECLARED).exists()


def test_without_a_gpu_the_pair_of_cpu_builds_is_installed(tmp_path):
    done = Installed(tmp_path, TORCH_BUILD="cpu")
    assert done.code == 0, done.said
    assert done.asked[0] == CPU
    assert done.asked[1][-2:] == ["--editable", f"{ROOT}[dev]"]
    assert len(done.asked) == 2
    assert not done.declared


def test_the_index_of_pytorch_is_asked_next_and_what_pip_said_is_shown(tmp_path):
    done = Installed(tmp_path, TORCH_BUILD="cpu", refused=r"check torch==[^ ]*\+cpu torchvision")
    assert done.code == 0, done.said
    assert done.asked[1][0] == "--extra-index-url"
    assert done.asked[1][-2:] == CPU
    assert re.search(r"torchvision==\S+\+cpu cannot be installed.*\n +ERROR: the index", done.said)


def test_without_torchvisions_cpu_build_its_operators_are_declared(tmp_path):
    done = Installed(
        tmp_path, TORCH_BUILD="cpu", refused=r"torchvision==[^=]*\+cpu", broken=DECLARED
    )
    assert done.code == 0, done.said
    assert done.asked[2] == CPU[:1]
    assert done.asked[3][-2:] == ["--no-deps", ORDINARY[1]]
    assert done.declared
    assert "without its compiled operators" in done.said


def test_without_any_cpu_build_the_ordinary_pair_is_installed(tmp_path):
    done = Installed(tmp_path, TORCH_BUILD="cpu", refused=r"\+cpu")
    assert done.code == 0, done.said
    assert done.asked[3][-2:] == ORDINARY
    assert not done.declared


def test_with_a_gpu_the_ordinary_pair_is_installed(tmp_path):
    done = Installed(tmp_path, TORCH_BUILD="gpu")
    assert done.code == 0, done.said
    assert done.asked[0][-2:] == ORDINARY


@pytest.mark.parametrize("refused", ["torch", "editable"])
def test_what_pip_refuses_in_the_end_is_said_and_ends_it(tmp_path, refused):
    done = Installed(tmp_path, TORCH_BUILD="gpu", refused=refused)
    assert done.code != 0
    assert "ERROR: the index has no such build" in done.said


def test_a_torchvision_that_cannot_be_imported_either_way_is_refused(tmp_path):
    done = Installed(tmp_path, TORCH_BUILD="gpu", broken="never")
    assert done.code == 1
    assert "cannot be imported beside this torch" in done.said


def test_whatever_can_be_asked_for_has_a_pin_that_will_do():
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    optional = chain.from_iterable(PROJECT["optional-dependencies"].values())
    for each in map(Requirement, chain(PROJECT["dependencies"], optional)):
        if each.name == PROJECT["name"]:
            assert each.extras <= set(PROJECT["optional-dependencies"])
        else:
            assert each.specifier.contains(pins[canonicalize_name(each.name)]), each


def test_the_extras_are_those_that_users_are_told_of():
    assert set(PROJECT["optional-dependencies"]) == {"inception", "huggingface", "bench", "dev"}
