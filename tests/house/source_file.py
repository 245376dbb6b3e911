"""What one Python file imports and how long it and its functions are, read without running it."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path


class When(Enum):
    """When an import takes place."""

    LOADING = "when the file is loaded"
    CALLED = "within a function"
    TYPING = "under TYPE_CHECKING: for the type checker alone, never when the program runs"


@dataclass(frozen=True, kw_only=True)
class Import:
    """One name that an import statement asks for.

    Attributes:
        module: The module behind `import`, or behind `from`, absolute.
        name: What `from module import` takes from it, maybe a module of its own; None without
            `from`.
        when: When it takes place.
    """

    module: str
    name: str | None
    when: When


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function or method: its name with those around it, its first line, its lines.

    The docstring counts, decorators do not.
    """

    name: str
    line: int
    lines: int


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a package.

    Attributes:
        path: Below the root, with slashes.
        module: The dotted name by which it is imported.
        lines: All lines, blank ones and comments too.
        import_lines: Those that belong to import statements.
        imports: All that it imports, wherever the statement stands.
        functions: All functions and methods, nested ones too.
        is_command: Whether users run it with `python -m`.
        is_empty: Whether it holds nothing but a docstring.
    """

    path: str
    module: str
    lines: int
    import_lines: int
    imports: tuple[Import, ...]
    functions: tuple[Function, ...]
    is_command: bool
    is_empty: bool

    @property
    def package(self) -> str:
        """The folder in which it lies; a command, which nothing imports, is one of its own."""
        return self.path if self.is_command else self.folder

    @property
    def folder(self) -> str:
        """The folder in which it lies."""
        return self.path.rpartition("/")[0]

    @property
    def is_init(self) -> bool:
        """Whether it makes its folder a package."""
        return self.path.endswith("/__init__.py")


def read_source_file(path: Path, *, root: Path) -> SourceFile:
    """Read one file of a package that lies in `root`."""
    text = path.read_text()
    tree = ast.parse(text, str(path))
    below = path.relative_to(root)
    visitor = _Visitor(".".join(below.parent.parts))
    visitor.visit(tree)
    return SourceFile(
        path=below.as_posix(),
        module=".".join(below.with_suffix("").parts).removesuffix(".__init__"),
        lines=len(text.splitlines()),
        import_lines=len(visitor.import_lines),
        imports=tuple(visitor.imports),
        functions=tuple(visitor.functions),
        is_command=path.stem == "__main__" or any(map(_is_main_guard, tree.body)),
        is_empty=not tree.body[ast.get_docstring(tree) is not None :],
    )


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@dataclass
class _Visitor(ast.NodeVisitor):
    package: str
    imports: list[Import] = field(default_factory=list)
    import_lines: set[int] = field(default_factory=set)
    functions: list[Function] = field(default_factory=list)
    _around: tuple[str, ...] = ()
    _when: When = When.LOADING

    def visit_Import(self, node: ast.Import) -> None:
        self._keep(node, {(each.name, None) for each in node.names})

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        # One dot is the file's own package, each further one the package around it.
        above = self.package.split(".")[: -(node.level - 1) or None] if node.level else []
        module = ".".join([*above, *filter(None, [node.module])])
        self._keep(node, {(module, each.name) for each in node.names})

    def _keep(self, node: ast.stmt, names: set[tuple[str, str | None]]) -> None:
        self.import_lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        self.imports += [
            Import(module=m, name=n, when=self._when) for m, n in sorted(names, key=str)
        ]

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)
            return
        self._within(node.body, when=When.TYPING)
        self._within(node.orelse)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._within(node.body, name=node.name)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_function(node)

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        name = ".".join((*self._around, node.name))
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        self.functions.append(Function(name=name, line=node.lineno, lines=lines))
        called = When.CALLED if self._when is When.LOADING else self._when
        self._within(node.body, name=node.name, when=called)

    def _within(
        self, body: list[ast.stmt], *, name: str | None = None, when: When | None = None
    ) -> None:
        outside = self._around, self._when
        self._around += () if name is None else (name,)
        self._when = when or self._when
        for node in body:
            self.visit(node)
        self._around, self._when = outside
