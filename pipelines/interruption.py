"""How a command ends by what nobody catches: Ctrl-C, as in other programs, and what is a bug.

Ctrl-C leaves no traceback, and the exit code 130. Other tracebacks are said without credentials.
Looking for garbage keeps neither its beginning nor its end.

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
    """Have an interrupt end the command that this process is quietly, and its imports be quick.

    A package calls it when it is imported, so that it also holds while a command's other imports
    are under way. Only `python -m` imports a package with "-m" in the program's place, and the
    console script has a name of its own: programs that use the package for something else keep
    their own ways.
    """
    program = sys.argv[0].rpartition("/")[2] if sys.argv else ""
    if program not in ("-m", _SCRIPT) or sys.excepthook is not sys.__excepthook__:
        return
    sys.excepthook = _end
    # Imports make a million objects and no garbage, but Python would look for it after each 700 of
    # them: a quarter of the time of torch's and MLflow's imports. The last look takes a second.
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(EXIT_CODE)
    import traceback

    from pipelines.console import write

    lines = traceback.format_exception(kind, error, trace)
    write("".join(lines).removesuffix("\n"), sys.stderr)
