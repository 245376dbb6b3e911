"""Laws of the house that no linter knows."""

import re
from pathlib import Path

import pytest

from tests.house.import_graph import read_import_graph
from tests.house.measures import PACKAGES, Measures, measure

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def test_the_method_knows_no_process_groups():
    offenders = [
        path.name
        for path in (ROOT / "models").rglob("*.py")
        if re.search(r"torch\.distributed|import distributed", path.read_text())
    ]
    assert offenders == []


def test_rooms_have_names_of_their_own():
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [path for path in SOURCES if vague & {path.stem, path.parent.name}] == []


@pytest.fixture(scope="module")
def house() -> Measures:
    return measure(ROOT)


@pytest.mark.parametrize(
    "broken", ["long_files", "long_functions", "slivers", "file_cycles", "package_cycles"]
)
def test_the_house_keeps_its_laws(house, broken):
    """What each counts: `tests/house/measures.py`."""
    assert getattr(house, broken) == ()


def test_nothing_imports_a_command():
    graph = read_import_graph(ROOT, PACKAGES)
    commands = {name for name, file in graph.files.items() if file.is_command}
    assert len(commands) > 10
    assert [edge for edge in graph.edges if edge[1] in commands] == []


def test_no_test_demands_that_a_machine_is_fast():
    """Counts and events tell what a limit in seconds would; what hangs ends at pytest's timeout."""
    hurry = re.compile(
        r"^\s*assert (?!.*_clock\.).*((time|monotonic|counter)\(\) - \w+|\w+_s) <=? [\d.]+$"
    )
    offenders = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "tests").rglob("*.py")
        for line in path.read_text().splitlines()
        if hurry.match(line)
    ]
    assert offenders == []


def test_nothing_is_unpickled():
    """Neither by this code nor by the loaders of libraries that it calls."""
    loads = re.compile(
        r"^\s*(import|from) (pickle|cloudpickle|joblib|dill)\b|weights_only=False|allow_pickle=True"
        r"|torch\.load\((?!.*weights_only=True\))|load_state_dict_from_url|trust_remote_code=True"
        r"|\.from_pretrained\((?!…|\{|.*\n.*\n\s*use_safetensors=True)"
        # torch's collectives of any objects
        r"|\b(all_gather_object|gather_object|(broadcast|scatter|send|recv)_object_list)\b",
        re.MULTILINE,
    )
    assert [str(path) for path in SOURCES if loads.search(path.read_text())] == []


def test_documents_are_read_in_one_room():
    """Whose bounds hold for all: `pipelines.documents`. It looks at YAML before Hydra reads it."""
    reads = re.compile(
        r"\b(json|ujson|orjson|yaml)\.(?!dump|safe_dump|YAMLError)\w*load\w*\(|\bJSONDecoder\b"
        r"|\bfrom (json|yaml|orjson) import|OmegaConf\.load\(|\b(tomllib|tomli|configparser)\b"
    )
    assert reads.search("yaml.safe_load(x)")
    assert reads.search("json.load(x)")
    found = [path for path in SOURCES if reads.search(path.read_text())]
    assert found == [ROOT / "pipelines" / "documents.py"]


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
@pytest.mark.parametrize("patch", [2, 4])
def test_model_files_are_the_presets(size, patch):
    import yaml

    from models.transformer.config import preset

    values = yaml.safe_load((ROOT / "configs" / "model" / f"{size}_{patch}.yaml").read_text())
    wanted = preset(f"{size.upper()}/{patch}")
    assert values == {name: getattr(wanted, name) for name in values}
    assert set(values) == {"depth", "width", "heads", "patch_size"}


def test_the_set_up_of_tests_sets_what_is_listed_and_users_are_told():
    """The list, with reasons, is in tests/conftest.py."""
    tests = ROOT / "tests"
    files = [*tests.rglob("conftest.py"), *(tests / "support").glob("*.py")]
    sets = re.compile(
        r'(?:setdefault|setenv)\("(_?[A-Z][A-Z\d]\w+)"|"(_?[A-Z][A-Z\d]\w+)"(?::|\] =)'
    )
    found = {name for path in files for names in sets.findall(path.read_text()) for name in names}

    _, told, untold = re.split(
        r"^# (?:Not t|T)old to users:$", (tests / "conftest.py").read_text(), flags=re.M
    )
    names_of = re.compile(r"^#   (\w+(?:, \w+)*)", flags=re.M)
    listed = [set(", ".join(names_of.findall(part)).split(", ")) for part in (told, untold)]
    assert found - {""} == listed[0] | listed[1]
    pages = (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
    documentation = "".join(page.read_text() for page in pages)
    assert [name for name in sorted(listed[0]) if name not in documentation] == []
