"""The wheel holds all that the commands need, wherever they are run."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.interpreter import Interpreter, clone_project, with_requirements

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, **more: object) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return str(ended.stdout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the built wheel was installed to."""
    built = tmp_path_factory.mktemp("built")
    source = built / "source"
    clone_project(source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, source)
    (wheel,) = built.glob("*.whl")
    folder = built / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", folder, wheel)
    return folder


def test_the_wheel_composes_every_experiment_in_any_folder(installed, tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(installed)}
    script = (
        "import trainer.config.groups as groups\n"
        "from trainer.config.composition import compose_job\n"
        "print(groups.__file__)\n"
        "for name in groups.members('exp'): print(name, compose_job([f'+exp={name}']).run)\n"
    )
    place, *composed = run(sys.executable, "-c", script, cwd=tmp_path, env=environment).splitlines()
    assert Path(place).is_relative_to(installed)
    experiments = sorted(
        path.relative_to(ROOT / "configs" / "exp").with_suffix("").as_posix()
        for path in (ROOT / "configs" / "exp").rglob("*.yaml")
    )
    assert [line.split()[0] for line in composed] == experiments


def test_the_wheel_knows_its_licence(installed):
    (licence,) = installed.glob("lapflow_trainer-*.dist-info/licenses/LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()


@pytest.fixture(scope="module")
def elsewhere(installed, tmp_path_factory):
    """Runs Python in an empty folder, with the wheel and what it says that it needs."""
    folder = tmp_path_factory.mktemp("elsewhere")
    interpreter = Interpreter(folder / "venv", PROJECT["dependencies"])
    empty = folder / "empty"
    empty.mkdir()

    def python(*words: str, path: Path = installed) -> str:
        return interpreter.run("env", f"PYTHONPATH={path}", "python", *words, place=empty)

    yield python
    assert list(empty.iterdir()) == []


def test_the_wheel_runs_commands_in_any_folder_with_nothing_of_this_one(elsewhere, installed):
    where = "import trainer, cluster; print(trainer.__path__[0], cluster.__path__[0])"
    assert all(Path(each).is_relative_to(installed) for each in elsewhere("-c", where).split())
    assert "parameters" in elsewhere("-m", "trainer.launch", "+exp=digits", "dry_run=true")
    with pytest.raises(AssertionError, match="No module named"):
        elsewhere("-c", "import trainer", path=Path("nowhere"))


def test_the_wheel_brings_a_command_for_all(elsewhere, installed):
    script = str(installed / "bin" / "lapflow")
    assert "  train  " in elsewhere(script, "--help")
    assert "usage: lapflow plan [-h]" in elsewhere(script, "plan", "--help")
    assert "parameters" in elsewhere(script, "train", "+exp=digits", "dry_run=true")
    with pytest.raises(AssertionError, match=r"there is no .*nope"):
        elsewhere(script, "train", "+exp=nope")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("huggingface", ["-m", "pipelines.ingest", "huggingface", "some/name", "shards"]),
        (
            "inception",
            [
                "-c",
                "from trainer.evaluation import inception; "
                "inception.InceptionFeatures(b'', weights=None)",
            ],
        ),
    ],
)
def test_what_is_optional_is_named_as_an_extra(elsewhere, extra, words):
    with pytest.raises(AssertionError, match=rf"pip install '\.\[{extra}\]'"):
        elsewhere(*words)


def test_an_installation_for_development_has_all_that_the_tests_import():
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"]]
    for requirement in map(Requirement, extras["dev"]):
        if requirement.name == PROJECT["name"]:  # which is installed here as it was some day
            asked += [each for name in requirement.extras for each in extras[name]]
        else:
            asked.append(str(requirement))
    brought = {canonicalize_name(each.name) for each in with_requirements(asked)}
    imported = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    found = packages_distributions()
    others = {name for name in imported & found.keys() if name not in sys.stdlib_module_names}
    assert {"boto3", "hypothesis", "swift", "datasets", "scipy"} <= others
    lacking = {
        name for name in others if not brought & {canonicalize_name(one) for one in found[name]}
    }
    assert lacking == {"trainer", "models", "pipelines", "cluster"} & others
