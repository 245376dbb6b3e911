"""What the documentation shows works: its Python runs, and its pictures and pages are there."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from tests.house.measures import PACKAGES
from tests.support.commands import GIVEN
from trainer.cli.lapflow import COMMANDS
from trainer.config.groups import members
from trainer.config.settings import settings_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("design/*.md")])
FILES = [
    f"/{path.relative_to(ROOT).as_posix()}"
    for folder in (*PACKAGES, "benchmarks", "docs", "install", "tests")
    for path in (ROOT / folder).rglob("*.py")
]
EVERY_PAGE = sorted([*ROOT.glob("*.md"), *DOCS.glob("**/*.md")])


def test_the_session_of_the_method_page_runs(capsys):
    text = (DOCS / "method.md").read_text()
    blocks = [
        (text[: found.start()].count("\n") + 2, found[1])
        for found in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]
    assert len(blocks) >= 7
    session: dict[str, object] = {}
    for line, block in blocks:
        # Empty lines in front, so that an error names the line of the page.
        exec(compile("\n" * (line - 1) + block, "docs/method.md", "exec"), session)
    assert "K=2: 1,347 M parameters" in capsys.readouterr().out


def test_the_method_page_needs_the_method_alone():
    text = (DOCS / "method.md").read_text()
    imports = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    assert set(imports) == {"torch", "models"}


@pytest.mark.slow
def test_the_pictures_are_drawn(tmp_path):
    from docs import pictures, placement_picture, rooms_picture

    for each in (pictures, placement_picture, rooms_picture):
        each.main(["--output", str(tmp_path)])
    drawn = {path.stem: Image.open(path).size for path in tmp_path.iterdir()}
    assert set(drawn) == {"attention", "placement", "pyramid_and_path", "rooms", "time_and_scale"}
    assert all(width > 600 and height > 300 for width, height in drawn.values())


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "first-steps.md"])
def test_what_the_first_pages_show_can_be_typed(page):
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    assert [
        line for block in blocks for line in block.splitlines() if "…" in line or "<" in line
    ] == []


def test_the_license_is_there_in_full_and_is_the_one_that_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    (name,) = project["license-files"]
    words = (ROOT / name).read_text().split()
    assert " ".join(words[:6]) == "Apache License Version 2.0, January 2004"
    assert len(words) == 1581  # as published, with its appendix


@pytest.mark.slow
def test_the_heading_of_the_placement_says_what_its_bars_show():
    from docs import placement_picture

    (panel,) = [
        axes for axes in placement_picture.placement().axes if "sharding:" in axes.get_title()
    ]
    totals: dict[float, float] = {}
    for bar in panel.patches:
        row = bar.get_y()
        totals[row] = max(totals.get(row, 0.0), bar.get_x() + bar.get_width())
    whole, sharded, host, single = (totals[row] for row in sorted(totals))
    saved, against_one = panel.get_title().splitlines()
    assert f"together {sharded - whole:+.1f} GiB" in saved
    assert saved.endswith(f"host {host - whole:+.1f} GiB")
    assert against_one.endswith(f"{sharded - single:+.1f} GiB, and {host - single:+.1f} GiB")
    assert whole > single > sharded > host


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_page_of_the_rooms_names_every_room():
    text = (DOCS / "architecture.md").read_text()
    files = [path.relative_to(ROOT) for each in PACKAGES for path in (ROOT / each).rglob("*.py")]
    # A folder within a room goes with it.
    rooms = {"/".join(path.parts[:-1][:2]) for path in files}
    assert len(rooms) > 15
    assert [room for room in sorted(rooms) if f"| `{room}" not in text] == []


def test_what_the_page_of_the_rooms_says_a_file_does_is_in_the_file():
    text = (DOCS / "architecture.md").read_text()
    steps = re.findall(r"\[`[\w/.]+`\]\(\.\./([\w/]+\.py)\) · `(\w+)`", text)
    assert len(steps) > 20
    missing = [
        (path, name)
        for path, name in steps
        if not re.search(rf"^\s*(?:def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE)
    ]
    assert missing == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_the_files_that_a_page_names_are_there(page):
    """Decisions and the changelog name what there was."""
    named = re.findall(r"`([\w./]+\.py)`", page.read_text())
    assert [name for name in named if not any(each.endswith(f"/{name}") for each in FILES)] == []


LONGEST_LINE = 120


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_prose_keeps_to_its_line_length(page):
    """Tables, formulas, pictures and blocks of code cannot be broken."""
    text = re.sub(r"^```.*?^```", blank, page.read_text(), flags=re.DOTALL | re.MULTILINE)
    long = [
        (number, len(line))
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > LONGEST_LINE and not line.startswith(("|", "$$", "!["))
    ]
    assert long == []


def blank(block: re.Match[str]) -> str:
    return "\n" * block[0].count("\n")


GROUPS = (
    "data|codec|model|flow|optim|train|eval|engine|cluster|loader|shards|store|checkpoint|tracking|"
    "runtime"
)
# Not a module (models.flow.path), a file (data.md) or a call (flow.noise_size(...)).
NAMED = re.compile(rf"(?<![\w./])(?:{GROUPS})(?:\.[a-z_0-9]+)+(?![\w(/])")
MEMBER = re.compile(
    r"(?<![\w./])\+?(exp|data|codec|model|flow|optim|engine|cluster)=(\w[\w/]*)(?![\w/(])"
)


def shown(page: Path) -> str:
    """What a page shows as code, in blocks and in lines, but for Python."""
    text = re.sub(r"^```python\n.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    code = re.findall(r"^```\n.*?^```|`[^`\n]+`", text, re.DOTALL | re.MULTILINE)
    return "\n".join(code)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_setting_that_a_page_names_exists(page):
    known = {each.key for kind in GIVEN for each in settings_of(kind)}
    streams = {"data.streams.prefix", "data.streams.weight"}
    commands = {command.module for command in COMMANDS.values()}
    commands.add("cluster.spot_notice")  # for nodes, and not for users
    named = {
        name
        for name in NAMED.findall(shown(page))
        if not name.endswith((".md", ".py", ".json", ".yaml"))
        and not name.startswith("engine.deepspeed.")
    }
    assert named - known - streams - commands == set()
    missing = {
        f"{group}={member}"
        for group, member in MEMBER.findall(shown(page))
        if member not in members(group) and not member.isupper()
    }
    assert missing == set()


@pytest.mark.parametrize("target", ["data-demo", "bench", "ui"])
def test_folders_with_spaces_are_one_word_in_the_makefile(target, tmp_path):
    home = tmp_path / "my home"
    told = subprocess.run(
        ["make", "-n", target, f"LAPFLOW_HOME={home}", f"IMAGES={tmp_path}/my pictures"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line.strip("@\t \\") for line in told.splitlines() if "my " in line]
    assert lines
    for line in lines:
        for word in shlex.split(line, comments=True):
            assert not word.endswith("/my"), line
