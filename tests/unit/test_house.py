"""What `make house` counts, on trees small enough to count by hand."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.house.__main__ import main
from tests.house.measures import measure

EMPTY = '"""Nothing."""\n'


@pytest.fixture
def write(tmp_path):
    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def function(lines: int, *, start: str = "def f():") -> str:
    return f"{start}\n" + "    x = 0\n" * (lines - 1)


def test_an_import_within_a_function_closes_a_cycle(write):
    root = write(
        {
            "trainer/a.py": "from trainer import b\n",
            "trainer/b.py": "import trainer.c\n",
            "trainer/c.py": "class C:\n    async def f(self):\n        from .a import x\n",
            "trainer/d.py": "from trainer.a import x\n",
        }
    )
    found = measure(root)
    (cycle,) = found.file_cycles
    assert cycle.members == ("trainer/a.py", "trainer/b.py", "trainer/c.py")
    assert [(step.importer, step.imported) for step in cycle.steps] == [
        ("trainer/a.py", "trainer/b.py"),
        ("trainer/b.py", "trainer/c.py"),
        ("trainer/c.py", "trainer/a.py"),
    ]
    assert (found.imports, found.imports_called) == (4, 1)


@pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_the_type_checkers_imports_close_none_and_run_elsewhere(write, test):
    typed = f"if {test}:\n    from trainer.low.a import x\n"
    root = write({"trainer/b.py": typed, "trainer/low/a.py": "import trainer.b\n"})
    found = measure(root)
    assert (found.file_cycles, found.package_cycles) == ((), ())
    assert (found.imports, found.imports_typing, found.file_floors) == (2, 1, 2)
    # They are importers all the same: two files need that name.
    assert found.single_importer == ("trainer/b.py, 2 lines", "trainer/low/a.py, 1 lines")

    write({"trainer/b.py": f"{typed}else:\n    from trainer.low.a import x\n"})
    found = measure(root)
    assert [each.members for each in found.file_cycles] == [("trainer/b.py", "trainer/low/a.py")]
    assert found.imports_typing == 0


def test_a_package_is_a_folder_without_those_below(write):
    root = write(
        {
            "trainer/low/__init__.py": "from trainer.clock import x\n",
            "trainer/low/a.py": EMPTY,
            "trainer/clock.py": EMPTY,
            "trainer/worker.py": "import trainer.low.a\n",
            "trainer/low/b/c.py": "import trainer.low.a\n",
        }
    )
    found = measure(root)
    assert found.file_cycles == ()
    (cycle,) = found.package_cycles
    assert cycle.members == ("trainer", "trainer/low")
    assert [step.imports for step in cycle.steps] == [
        (("trainer/worker.py", "trainer/low/a.py"),),
        (("trainer/low/__init__.py", "trainer/clock.py"),),
    ]

    guard = '\nif __name__ == "__main__":\n    pass\n'
    write({"trainer/worker.py": f"import trainer.low.a\n{guard}"})
    assert measure(root).package_cycles == ()

    write({"trainer/worker.py": "import trainer.low.a\n", "trainer/low/__init__.py": EMPTY})
    assert measure(root).package_cycles == ()


def test_a_sliver_is_short_and_has_one_importer(write):
    guard = 'if __name__ == "__main__":\n    pass\n'
    root = write(
        {
            "models/__init__.py": EMPTY,
            "models/sliver.py": "x = 0\n" * 39,
            "models/long_enough.py": "x = 0\n" * 40,
            "models/shared.py": "x = 0\n",
            "models/command.py": guard,
            "models/dead.py": "x = 0\n",
            "cluster/a.py": "import models.sliver\nimport models.long_enough, models.shared\n"
            "def f():\n    import models.sliver\n    import models\n",
            "cluster/__main__.py": "import cluster.a, models.command\nfrom models import shared\n",
        }
    )
    found = measure(root)
    assert found.slivers == ("models/sliver.py, 39 lines", "cluster/a.py, 5 lines")
    assert {*found.single_importer} - {*found.slivers} == {"models/long_enough.py, 40 lines"}
    assert found.without_importer == ("models/dead.py, 1 lines",)
    assert (found.files, found.files_with_code) == (8, 7)


def test_long_functions_are_named_with_their_docstrings_and_without_decorators(write):
    method = function(61, start='def m(self):\n    """What it does."""')
    body = "".join(f"    {line}\n" for line in method.splitlines())
    root = write(
        {
            "pipelines/a.py": function(60, start="@decorator(\n    1,\n)\ndef f():"),
            "pipelines/b.py": f"class B:\n    @property\n{body}",
            "pipelines/c.py": function(61, start="async def g():"),
        }
    )
    assert measure(root).long_functions == (
        "pipelines/b.py:3 B.m, 62 lines",
        "pipelines/c.py:1 g, 61 lines",
    )


def test_long_files_and_the_lines_of_import_statements(write):
    imports = "from __future__ import annotations\nfrom os import (\n    path,\n)\n"
    root = write({"cluster/a.py": imports + "x = 0\n" * 496, "cluster/b.py": "x = 0\n" * 501})
    write({"cluster/notes.txt": "import os\n", "docs/c.py": "import os\n" * 501})
    found = measure(root)
    assert found.long_files == ("cluster/b.py, 501 lines",)
    assert (found.lines, found.import_lines_percent) == (1001, 0.4)


def test_floors_of_trainer_are_those_of_rooms_and_of_files(write):
    root = write(
        {
            "trainer/launch.py": "import trainer.room.a\nfrom trainer.room import d\n",
            "trainer/room/a.py": "import trainer.room.b\n",
            "trainer/room/b.py": "import trainer.room.c\n",
            "trainer/room/c.py": "import trainer.room.a, trainer.room.d\n",
            "trainer/room/d.py": "from ..clock import now\n",
            "trainer/clock.py": "import pipelines.order\n",
            "pipelines/order.py": EMPTY,
        }
    )
    found = measure(root)
    assert found.loose_files == ("trainer/clock.py, 1 lines", "trainer/launch.py, 2 lines")
    assert found.room_floors == 3
    # The cycle of a, b and c is one floor.
    assert found.file_floors == 4


def test_the_command_compares_with_a_revision(write, capsys):
    root = write({"trainer/a.py": "from trainer import b\n", "trainer/b.py": EMPTY})
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "First"]):
        subprocess.run([*git, *words], check=True)
    write({"trainer/b.py": "from trainer import a\n"})

    assert main(["--against", "HEAD"], root=root) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["before", "now"]
    assert [line.split()[-2:] for line in lines if line.startswith("import cycles between f")] == [
        ["0", "1"],
        ["between", "files:"],
    ]
    assert "  trainer/a.py trainer/b.py" in lines

    assert main(["--against", "HEAD", "--json"], root=root) == 0
    states = json.loads(capsys.readouterr().out)
    assert states["before"]["file_cycles"] == []
    assert states["now"]["file_cycles"][0]["members"] == ["trainer/a.py", "trainer/b.py"]

    assert main(["--against", "nothing"], root=root) == 2
    assert "--against nothing" in capsys.readouterr().err
