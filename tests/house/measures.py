"""What is counted, and the limits of the laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.house.import_graph import Cycle, ImportGraph, read_import_graph
from tests.house.source_file import SourceFile, When

PACKAGES = ("trainer", "models", "pipelines", "cluster")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MIN_LINES_FOR_ONE_IMPORTER = 40


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The figures of one state of the source. What has a name is listed by it.

    Importers are files of the four packages, each counted once, those under TYPE_CHECKING included;
    users are the importers of a command. Cycles and floors are those of a running program.

    Attributes:
        imports: Pairs of files of which one imports the other.
        imports_called: Those of which every statement stands within functions.
        imports_typing: Those that stand under TYPE_CHECKING alone.
        without_importer: Files that no file imports, neither commands nor a package's `__init__`.
        single_importer: Those that one file imports.
        slivers: Those of one importer with fewer than 40 lines.
        loose_files: Files that lie in `trainer/` itself.
        room_floors: The longest chain of imports among the folders and files of `trainer/`.
        file_floors: The longest chain among all files in and below `trainer/`.
    """

    files: int
    files_with_code: int
    lines: int
    import_lines_percent: float
    imports: int
    imports_called: int
    imports_typing: int
    without_importer: tuple[str, ...]
    single_importer: tuple[str, ...]
    slivers: tuple[str, ...]
    loose_files: tuple[str, ...]
    room_floors: int
    file_floors: int
    file_cycles: tuple[Cycle, ...]
    package_cycles: tuple[Cycle, ...]
    long_files: tuple[str, ...]
    long_functions: tuple[str, ...]


def measure(root: Path) -> Measures:
    """Count what lies in the four packages of `root`."""
    graph = read_import_graph(root, PACKAGES)
    files = graph.files.values()
    lines = sum(each.lines for each in files)
    trainer = graph.below("trainer")
    return Measures(
        files=len(files),
        files_with_code=len(_with_code(graph)),
        lines=lines,
        import_lines_percent=round(
            100 * sum(each.import_lines for each in files) / max(lines, 1), 1
        ),
        imports=len(graph.edges),
        imports_called=list(graph.edges.values()).count(When.CALLED),
        imports_typing=list(graph.edges.values()).count(When.TYPING),
        without_importer=_named(_imported_by(graph, 0)),
        single_importer=_named(_imported_by(graph, 1)),
        slivers=_named(_imported_by(graph, 1), lambda f: f.lines < MIN_LINES_FOR_ONE_IMPORTER),
        loose_files=_named(_with_code(trainer), lambda each: each.folder == "trainer"),
        room_floors=trainer.floors(lambda each: "/".join(each.path.split("/")[:2])),
        file_floors=trainer.floors(lambda each: each.path),
        file_cycles=graph.cycles(lambda each: each.path),
        package_cycles=graph.cycles(lambda each: each.package),
        long_files=_named(list(files), lambda each: each.lines > MAX_FILE_LINES),
        long_functions=tuple(
            f"{file.path}:{each.line} {each.name}, {each.lines} lines"
            for file in files
            for each in file.functions
            if each.lines > MAX_FUNCTION_LINES
        ),
    )


def _with_code(graph: ImportGraph) -> list[SourceFile]:
    """All but a package's `__init__` with nothing in it."""
    return [each for each in graph.files.values() if not (each.is_init and each.is_empty)]


def _imported_by(graph: ImportGraph, count: int) -> list[SourceFile]:
    files = (each for each in graph.files.values() if not (each.is_command or each.is_init))
    return [each for each in files if len(graph.importers(each.module)) == count]


def _named(
    files: list[SourceFile], chosen: Callable[[SourceFile], bool] = lambda _: True
) -> tuple[str, ...]:
    return tuple(f"{each.path}, {each.lines} lines" for each in files if chosen(each))
