"""Draws the picture of docs/architecture.md: `python -m docs.rooms_picture`, from the root.

Boxes are the folders of the four packages, arrows the imports between them as `tests.house` reads
them. Who is imported stands below. What an arrow reaches by way of others has no arrow of its own.
"""

import argparse
import ast
import textwrap
from collections.abc import Sequence
from pathlib import Path

import networkx
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tests.house.import_graph import ImportGraph, read_import_graph
from tests.house.measures import PACKAGES
from tests.house.source_file import SourceFile, When

FOLDER = Path(__file__).parent / "images"
ROOT = Path(__file__).resolve().parents[1]
_COMMANDS = "python -m …"
_COLOURS = {
    "models": "#4C72B0",
    "trainer": "#55A868",
    "pipelines": "#DD8452",
    "cluster": "#8172B3",
    _COMMANDS: "0.45",
}
_MEANINGS = {
    _COMMANDS: "the few lines that each command needs",
    "trainer": "what its rooms share: clock, random numbers, the run's state, errors, log lines",
}
"""Of what has no docstring, or has one for all that lies below it."""
_COLUMNS = ("models", _COMMANDS, "trainer", "cluster", "pipelines")
"""From left to right."""
_WIDTH, _HEIGHT = 0.92, 0.58
_WRAPPED = 36
_PASSES = 8


def rooms() -> Figure:
    """Draw the folders of the packages on the floors that their imports give them."""
    graph = read_import_graph(ROOT, PACKAGES)
    imports = _imports(graph)
    floors = _floors(imports)
    places = {
        room: (place - (len(floor) - 1) / 2, float(height))
        for height, floor in enumerate(floors)
        for place, room in enumerate(floor)
    }
    figure = Figure(figsize=(13, 1.18 * len(floors)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    widest = max(map(len, floors))
    axes.set_xlim(-widest / 2, widest / 2)
    axes.set_ylim(-0.5, len(floors) - 0.5)
    axes.axis("off")
    for importer, imported in sorted(networkx.transitive_reduction(imports).edges):
        _draw_arrow(axes, places[importer], places[imported], _colour(importer))
    for room, place in places.items():
        _draw_box(axes, room, place)
    return figure


def _imports(graph: ImportGraph) -> networkx.DiGraph:
    """Which folder imports which when the program runs; all commands are one."""
    imports = networkx.DiGraph()
    for names, when in graph.edges.items():
        importer, imported = (_room(graph.files[name]) for name in names)
        if when is not When.TYPING and importer != imported:
            imports.add_edge(importer, imported)
    return imports


def _room(file: SourceFile) -> str:
    return _COMMANDS if file.is_command else file.folder


def _floors(imports: networkx.DiGraph) -> list[list[str]]:
    """Put each folder right above the highest that it imports, and near those it belongs to."""
    floors = [sorted(each) for each in networkx.topological_generations(imports.reverse())]
    near = networkx.transitive_reduction(imports).to_undirected()
    middle = {room: float(_COLUMNS.index(_package(room))) for floor in floors for room in floor}
    for _ in range(_PASSES):
        for floor in floors:
            floor.sort(key=lambda room: (_mean([middle[each] for each in near[room]]), room))
            for place, room in enumerate(floor):
                middle[room] = place - (len(floor) - 1) / 2
    return floors


def _package(room: str) -> str:
    return room.partition("/")[0]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _colour(room: str) -> str:
    return _COLOURS[_package(room)]


def _draw_arrow(
    axes: Axes, above: tuple[float, float], below: tuple[float, float], colour: str
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            (above[0], above[1] - _HEIGHT / 2),
            (below[0], below[1] + _HEIGHT / 2),
            arrowstyle="-|>",
            mutation_scale=9,
            color=colour,
            linewidth=0.9,
            alpha=0.75,
            shrinkA=0,
            shrinkB=0,
            zorder=1,
        )
    )


def _draw_box(axes: Axes, room: str, place: tuple[float, float]) -> None:
    across, up = place
    corner = (across - _WIDTH / 2, up - _HEIGHT / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner,
            _WIDTH,
            _HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.05",
            facecolor="white",
            edgecolor=_colour(room),
            linewidth=1.4,
            zorder=2,
        )
    )
    axes.text(
        *(across, up + 0.16),
        room,
        ha="center",
        va="center",
        fontsize=8.5,
        weight="bold",
        color=_colour(room),
        zorder=3,
    )
    text = textwrap.fill(_meaning(room), width=_WRAPPED, max_lines=3, placeholder=" …")
    axes.text(across, up - 0.08, text, ha="center", va="center", fontsize=7, zorder=3)


def _meaning(room: str) -> str:
    """What a folder says of itself, without its full stop."""
    if room in _MEANINGS:
        return _MEANINGS[room]
    said = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())) or ""
    return said.partition("\n")[0].rstrip(".")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"folder, default {FOLDER}")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    # Without the program's version and date the same picture is the same file.
    rooms().savefig(options.output / "rooms.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
