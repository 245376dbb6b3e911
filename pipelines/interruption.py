"""How a command ends by what nobody catches: Ctrl-C, as in other programs, and what is a bug.

Ctrl-C leaves no traceback, and the exit code 130. Other tracebacks are said without credentials.
Whatever the end, the process does not take a last look for garbage.

A module of its own that imports next to nothing: what is imported before it is not yet covered.
"""

from __future__ import annotations

import atexit
import gc
import signal
import sys
from types import TracebackType

EXIT_CODE = 128 + signal.SIGINT
_SCRIPT = "lapflow"


def end_quietly_when_interrupted() -> None:
    """Have an interrupt that nobody catches end the command that this process is.

    A package calls it when it is imported, so that it also holds while a command's other imports
    are under way. Only `python -m` imports a package with "-m" in the program's place, and the
    console script has a name of its own: programs that use the package for something else keep
    their own ways.
    """
    program = sys.argv[0].rpartition("/")[2] if sys.argv else ""
    if program not in ("-m", _SCRIPT) or sys.excepthook is not sys.__excepthook__:
        return
    sys.excepthook = _end
    # Of all that torch and MLflow have made, that look takes a second, and then all of it goes.
    atexit.register(gc.freeze)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(EXIT_CODE)
    import traceback

    from pipelines.console import write

    lines = traceback.format_exception(kind, error, trace)
    write("".join(lines).removesuffix("\n"), sys.stderr)
