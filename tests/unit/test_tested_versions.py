"""Private parts of other packages are used in the versions alone that were tested."""

import ast
import re
import threading
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster import process_group
from cluster.contract import ClusterConfig
from cluster.launcher import run
from cluster.tested import TESTED_RAY, TESTED_TORCH, UntestedVersion, require_tested
from pipelines.errors import DataError
from pipelines.source import TESTED_STREAMING, Source, SourceConfig
from tests.support.engine_worker import tiny_model
from trainer.engine import zero
from trainer.engine.compiled import compile_as_asked
from trainer.engine.protocol import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED = {
    "ray": TESTED_RAY,
    "torch": TESTED_TORCH,
    "deepspeed": zero.TESTED_DEEPSPEED,
    "mosaicml-streaming": TESTED_STREAMING,
}


def run_on_ray():
    run(
        ClusterConfig(backend="ray", workers=1),
        print,
        None,
        on_message=print,
        stop=threading.Event(),
    )


def prove_peers():
    meeting = process_group.Rendezvous(place="nowhere", timeout_s=1.0, secret=b"secret")
    process_group._Proofs.rendezvous = meeting
    try:
        process_group.prove_peers()
    finally:
        process_group._Proofs.rendezvous = None


def compile_blocks():
    compile_as_asked(tiny_model(), EngineConfig(compile="blocks"))


DOORS = [
    ("ray", run_on_ray),
    ("torch", prove_peers),
    ("torch", compile_blocks),
    ("deepspeed", zero.import_deepspeed),
    ("mosaicml-streaming", lambda: Source("s3://bucket/prefix", config=SourceConfig())),
]


def test_pip_is_asked_for_the_tested_versions():
    needed = {each.name: each.specifier for each in map(Requirement, PROJECT["dependencies"])}
    assert {name: needed[name] for name in TESTED} == {
        name: SpecifierSet(tested) for name, tested in TESTED.items()
    }


def test_the_tested_versions_include_the_pinned_ones():
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert all(SpecifierSet(tested).contains(pins[name]) for name, tested in TESTED.items())
    for name, tested in TESTED.items():
        require_tested(name, tested)


@pytest.mark.parametrize(("package", "enter"), DOORS)
def test_another_version_is_refused_before_anything_is_touched(
    package, enter, tmp_path, monkeypatch
):
    there = tmp_path / f"{package.replace('-', '_')}-99.1.dist-info"
    there.mkdir()
    (there / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 99.1\n")
    monkeypatch.syspath_prepend(tmp_path)  # metadata are looked for there first
    assert version(package) == "99.1"
    with pytest.raises((UntestedVersion, DataError)) as told:
        enter()
    assert str(told.value) == (
        f"{package} 99.1 is installed. Private parts of it are used here, which were tested with "
        f"{package} {TESTED[package]} alone: pip install '{package}{TESTED[package]}'"
    )


@pytest.mark.slow
def test_modules_that_are_private_are_imported_of_tested_packages_alone():
    private = set()
    for package in ("trainer", "models", "pipelines", "cluster"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                else:
                    continue
                private |= {name.split(".")[0] for name in names if re.search(r"\._[a-z]", name)}
    assert private - {"__future__"} == {"ray", "torch"}
