"""Which file imports which, and the circles and floors of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import networkx

from tests.house.source_file import Import, SourceFile, When, read_source_file


@dataclass(frozen=True, kw_only=True)
class Step:
    """What leads from one file or folder to another: pairs of importer and imported file."""

    importer: str
    imported: str
    imports: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """Files or folders that all reach each other; the steps with the fewest imports come first."""

    members: tuple[str, ...]
    steps: tuple[Step, ...]


class ImportGraph:
    """The imports between the files of some packages.

    Attributes:
        files: The files by their modules' names.
        edges: When a module imports another, by the names of both; where it does so several times,
            the first of `When`. What the type checker alone sees is an edge here and in no cycle.
    """

    def __init__(self, files: Iterable[SourceFile]) -> None:
        self.files: Mapping[str, SourceFile] = {each.module: each for each in files}
        self.edges: dict[tuple[str, str], When] = {}
        order = list(When)
        for name, file in self.files.items():
            for each in file.imports:
                imported = self._module_of(each)
                if imported not in (None, name):
                    found = (each.when, self.edges.get((name, imported), each.when))
                    self.edges[name, imported] = min(found, key=order.index)

    def _module_of(self, each: Import) -> str | None:
        names = (f"{each.module}.{each.name}", each.module)
        return next((name for name in names if name in self.files), None)

    def importers(self, module: str) -> set[str]:
        """The modules that import this one, those that only need its types included."""
        return {importer for importer, imported in self.edges if imported == module}

    def cycles(self, node: Callable[[SourceFile], str]) -> tuple[Cycle, ...]:
        """The largest sets of nodes that all reach each other when the program runs.

        Args:
            node: What a file belongs to: itself, its folder.
        """
        graph = self._running(node)
        found = sorted(map(sorted, networkx.strongly_connected_components(graph)))
        return tuple(_cycle(graph, each) for each in found if len(each) > 1)

    def floors(self, node: Callable[[SourceFile], str]) -> int:
        """How many nodes the longest chain of imports has, a cycle taken for one."""
        return int(networkx.dag_longest_path_length(networkx.condensation(self._running(node)))) + 1

    def below(self, folder: str) -> ImportGraph:
        """The part whose files lie in a folder or below it."""
        return ImportGraph(f for f in self.files.values() if f.path.startswith(f"{folder}/"))

    def _running(self, node: Callable[[SourceFile], str]) -> networkx.DiGraph:
        """What takes place when the program runs."""
        graph = networkx.DiGraph()
        graph.add_nodes_from(map(node, self.files.values()))
        for names, when in sorted(self.edges.items(), key=itemgetter(0)):
            importer, imported = (self.files[name] for name in names)
            ends = node(importer), node(imported)
            if when is not When.TYPING and ends[0] != ends[1]:
                graph.add_edge(*ends)
                graph.edges[ends].setdefault("imports", []).append((importer.path, imported.path))
        return graph


def _cycle(graph: networkx.DiGraph, members: list[str]) -> Cycle:
    steps = [
        Step(importer=importer, imported=imported, imports=tuple(imports))
        for importer, imported, imports in graph.subgraph(members).edges(data="imports")
    ]
    steps.sort(key=lambda each: (len(each.imports), each.importer, each.imported))
    return Cycle(members=tuple(members), steps=tuple(steps))


def read_import_graph(root: Path, packages: Iterable[str]) -> ImportGraph:
    """Read all files of the packages in `root`; a package that is not there has none."""
    paths = [path for each in packages for path in sorted((root / each).rglob("*.py"))]
    return ImportGraph(read_source_file(path, root=root) for path in paths)
