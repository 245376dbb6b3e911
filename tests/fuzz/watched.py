"""A call of the program in this process: what it gave, what it said, and whether it may."""

from __future__ import annotations

import io
import logging
import re
import traceback
from collections.abc import Callable, Collection
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from tests.fuzz.verdict import TRACEBACK, is_ours
from trainer.log_lines import show_logs

# argparse names the program first.
_WORDS = r"^(error: |[\w. -]+: error: )"


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a call did.

    Attributes:
        value: What it returned; for a command its exit code. None if it raised.
        out: Standard output.
        err: Standard error, warnings that were logged among it.
        refusal: The message of an error of ours, or that of a command that refused.
        raw: What must not be: a foreign exception's traceback, or one that was printed.
    """

    value: Any
    out: str
    err: str
    refusal: str = ""
    raw: str = ""

    @property
    def said(self) -> str:
        """All that a person could read."""
        return f"{self.out}{self.err}{self.refusal}{self.raw}"

    def with_value(self, value: Any) -> Watched:
        """Return the same with what the call gave in another form."""
        return replace(self, value=value)


def watched(call: Callable[[], Any], *, logs: bool = True) -> Watched:
    """Call a function as a command does, which catches what is ours.

    Args:
        call: What to call.
        logs: Whether the logs are shown here, as most commands do by themselves.
    """
    value: Any = None
    refusal = raw = ""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            with show_logs() if logs else nullcontext():
                value = call()
        except SystemExit as end:  # of argparse
            value = end.code
        except Exception as error:
            if is_ours(error):
                refusal = str(error)
            else:
                raw = traceback.format_exc()
    _forget_streams()
    printed = TRACEBACK in out.getvalue() + err.getvalue()
    return Watched(
        value=value,
        out=out.getvalue(),
        err=err.getvalue(),
        refusal=refusal,
        raw=raw or (out.getvalue() + err.getvalue() if printed else ""),
    )


def commanded(
    main: Callable[[list[str]], int],
    arguments: list[str],
    *,
    codes: Collection[int] = (0,),
    refusals: Collection[int] = (2,),
) -> Watched:
    """Call a command's `main`, and hold its exit code and last words to what is documented.

    Args:
        main: The command.
        arguments: Its words.
        codes: Exit codes with which it gives a result.
        refusals: Exit codes with which it says in a paragraph why there is none.
    """
    done = watched(lambda: main(arguments), logs=False)
    if done.raw or done.refusal:
        # What is ours must not leave a command either: its `main` turns it into an exit code.
        return Watched(value=None, out=done.out, err=done.err, raw=done.raw or done.refusal)
    if done.value in codes:
        return done
    words = done.err.strip()
    if done.value in refusals and re.search(_WORDS, words, re.M):
        return Watched(value=done.value, out=done.out, err=done.err, refusal=words)
    return Watched(
        value=done.value, out=done.out, err=done.err, raw=f"exit code {done.value}: {words}"
    )


def _forget_streams() -> None:
    """Take away handlers that write to streams which are gone."""
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, logging.StreamHandler)]:
        root.removeHandler(handler)
