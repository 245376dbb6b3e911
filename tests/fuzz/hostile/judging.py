"""How a try of hostile input is judged."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.fuzz.attempt import Try
from tests.fuzz.verdict import Seen, Verdict
from tests.fuzz.watched import Watched

# A terminal would obey all but tab and line break; the last of them turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_BARS = re.compile(r"\rGenerating train split: [^\r\n]*")  # of the library `datasets`


def judged(
    attempt: Try,
    target: str,
    attack: str,
    done: Watched,
    complaint: Callable[[], str | None] = lambda: None,
    *,
    told: str = "WARNING|warning:",
) -> Seen:
    """Judge what a command made of hostile input.

    Args:
        attempt: The try.
        target: What was attacked.
        attack: How.
        done: What the command did.
        complaint: Where it took the input: looks in another way whether what came of it is right,
            and says what is not.
        told: Pattern of what is said of input that was left out.
    """
    verdict, said = _judged(attempt, done, complaint)
    if verdict is Verdict.HARMLESS and re.search(told, done.said):
        verdict = Verdict.DETECTED
    return Seen(verdict=verdict, target=f"hostile: {target}", attack=attack, said=said)


def _judged(
    attempt: Try, done: Watched, complaint: Callable[[], str | None]
) -> tuple[Verdict, str]:
    if done.raw:
        return Verdict.RAW, done.raw[-3000:]
    if problems := attempt.sandbox.problems(done.said):
        return Verdict.WRONG, "\n".join(problems)[:3000]
    spoken = _BARS.sub("", done.out + done.err)
    if found := _CONTROLS.search(spoken):
        around = spoken[max(0, found.start() - 80) : found.end() + 80]
        return Verdict.WRONG, f"a control character is said: {around!r}"
    if done.refusal:
        return Verdict.DETECTED, done.refusal[:2000]
    if text := complaint():
        return Verdict.WRONG, f"{text}\nsaid: {done.out[-1500:]}{done.err[-1500:]}"
    return Verdict.HARMLESS, (done.out + done.err)[-1000:]
