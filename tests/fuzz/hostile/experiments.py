"""Experiment files of others: YAML with edits, bombs, odd types and ways into the environment."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

import cluster.launcher
import trainer.config.composition
import trainer.config.groups
from cluster.contract import ClusterUnavailable
from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.hostile.judging import judged
from tests.fuzz.hostile.settings import numbers_in
from tests.fuzz.material import copied_home, data_of
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import Watched, commanded
from tests.support.commands import leaves
from trainer.cli.launch import main as launch
from trainer.config.job import JobConfig
from trainer.config.renamed import RENAMED

_LAUNCHED = "store.retries=1"
_HEAD = "# @package _global_\n"
_REFERENCES = (
    "0.0${oc.env:FUZZ_PIN}",
    "${oc.env:FUZZ_PIN}",
    "${oc.decode:${oc.env:FUZZ_PIN}}",
    "${oc.env:AWS_SECRET_ACCESS_KEY}",
    "x-${oc.env:AWS_SECRET_ACCESS_KEY}",
    "${oc.dict.keys:${oc.create:{'${oc.env:AWS_SECRET_ACCESS_KEY}': 1}}}",
    "${run}",
    "${train}",
    "${.seed}",
    "${..home}",
    "${hydra:runtime.cwd}",
    "${nothing.of.this}",
    "${",
)
_HYDRA: tuple[Any, ...] = (
    None,
    {},
    [],
    "x",
    {"job": {"env_copy": ["AWS_SECRET_ACCESS_KEY"]}},
    {"job": {"env_copy": ["NOT_THERE"]}},
    {"job": {"env_set": {"LAPFLOW_HOME": "/nowhere"}}},
    {"job": None},
    {"searchpath": ["file:///tmp", "pkg://os"]},
    {"run": {"dir": "${oc.env:AWS_SECRET_ACCESS_KEY}"}},
    {"callbacks": {"x": {"_target_": "os.system", "command": "touch canary"}}},
    {"launcher": {"_target_": "os.mkdir", "path": "canary"}},
    {"sweeper": 5},
)
_DEFAULTS: tuple[Any, ...] = (
    [{5: 6}],
    [5],
    [None],
    [[]],
    [{}],
    "digits",
    {"override /model": "digits"},
    [{"override /model": "${oc.env:AWS_SECRET_ACCESS_KEY}"}],
    [{"/model": "${oc.env:AWS_SECRET_ACCESS_KEY}"}],
    ["${oc.env:AWS_SECRET_ACCESS_KEY}"],
    [{"override /model": None}],
    [{"override /model": ["s_2", "digits"]}],
    [{"override /nothing": "x"}],
    [{"override hydra/launcher": "joblib"}],
    [{"optional /model@data": "digits"}],
    ["/exp/theirs"],
    ["_self_", "_self_"],
    ["../../outside/private"],
    [{"/exp": "../../../outside/private"}],
    [{"override /model": "../../outside/private"}],
    ["\x1b[31m"],
    [f"/exp/{'x' * 5000}"],
)


def experiments(attempt: Try) -> Seen:
    """Launch an experiment that somebody else has written: show it, or have its cost told."""
    chance = attempt.chance
    folder = Path(
        shutil.copytree(trainer.config.groups.CONFIG_FOLDER, attempt.sandbox.inside / "c")
    )
    for module in (trainer.config.groups, trainer.config.composition):
        module.CONFIG_FOLDER = folder  # type: ignore[attr-defined]
    group = chance.choice(("exp", "exp", "exp", "model", "data", "flow", "engine", "optim"))
    name = chance.choice(sorted(trainer.config.groups.members(group)))
    attack = _write(folder / group / f"{name}.yaml", folder / group / "theirs.yaml", attempt)
    # MLflow makes a database of its own in ten seconds.
    home = copied_home(attempt.material, attempt.sandbox.inside / "home")
    words = [
        *(["+exp=theirs"] if group == "exp" else ["+exp=digits", f"{group}=theirs"]),
        f"data.prefix={data_of(home)}",
        "cluster.backend=local",
        "cluster.workers=1",
    ]
    how = chance.choice((["--cfg", "job"], ["dry_run=true"], [_LAUNCHED]))
    if how == [_LAUNCHED] or chance.random() < 0.5:
        words.append(f"home={home}")
    attack = f"{how[0]} {group}={name}: {attack}"
    announce("hostile: experiments", attack)
    # Nothing is trained: what checks an experiment comes before, and its places are looked at.
    cluster.launcher.run = _no_cluster  # type: ignore[assignment]
    os.environ["S3_ENDPOINT_URL"] = "http://127.0.0.1:9"
    done = commanded(launch, [*how, *words], refusals=(1, 2))
    shown = how != [_LAUNCHED]
    return judged(attempt, "experiments", attack, done, lambda: _complaint(done) if shown else None)


def _no_cluster(*_arguments: Any, **_settings: Any) -> NoReturn:
    raise ClusterUnavailable("there are no workers in this try")


def _complaint(done: Watched) -> str | None:
    bad = [number for number in numbers_in(yaml.safe_load(done.out)) if not math.isfinite(number)]
    return f"numbers that are not finite were taken: {bad}" if bad else None


def _write(valid: Path, theirs: Path, attempt: Try) -> str:
    chance = attempt.chance
    whole = valid.read_bytes()
    if chance.random() < 0.08:
        return _replace(theirs, attempt)
    if chance.random() < 0.3:
        done, text = chance.choice(_TEXTS)
        theirs.write_bytes(text(whole, chance))
        return done
    if chance.random() < 0.1:
        data, done = mutation.edited_bytes(whole, chance)
        theirs.write_bytes(data)
        return f"bytes {done}"
    values = yaml.safe_load(whole)
    group = "" if b"_global_" in whole else f"{theirs.parent.name}."
    done = "; ".join(_edit(values, group, chance) for _ in range(chance.choice((1, 1, 2))))
    text_of = yaml.safe_dump(values, allow_unicode=chance.random() < 0.5)
    theirs.write_bytes((text_of if group else _HEAD + text_of).encode())
    return done


def _edit(values: dict[str, Any], group: str, chance: random.Random) -> str:
    """Set a setting, a group or what Hydra reads itself to something that nobody expects."""
    what = chance.choice(("value", "value", "value", "reference", "group", "defaults", "hydra"))
    if what == "defaults":
        values["defaults"] = made = chance.choice(_DEFAULTS)
        return f"defaults {made!r:.60}"
    if what == "hydra":
        values["hydra"] = made = chance.choice(_HYDRA)
        return f"hydra {made!r:.60}"
    if what == "group":
        groups = sorted({each.key.partition(".")[0] for each in leaves(JobConfig)})
        name = chance.choice(groups)
        values[name] = made = chance.choice((None, "x", [], [1], 5, {}, {5: 6}, {None: 1}, True))
        return f"{name} {made!r}"
    keys = [*(each.key for each in leaves(JobConfig)), *(_OLD * 10)]
    key = chance.choice([key.removeprefix(group) for key in keys if key.startswith(group)])
    made = chance.choice(_REFERENCES) if what == "reference" else _value(chance)
    *way, last = key.split(".")
    holder = values
    for part in way:
        inner = holder.get(part)
        holder[part] = inner if isinstance(inner, dict) else {}
        holder = holder[part]
    holder[last] = made
    return f"{key} {made!r:.60}"


_OLD = tuple(RENAMED)
_CONTROLS = ("\0", "\x1b", "\x9b", "\u202e", "\r\n", " ", "?")


def _value(chance: random.Random) -> Any:
    # A surrogate is written as an escape, which YAML has.
    return chance.choice(
        (
            lambda: mutation.value(chance),
            lambda: f"a{chance.choice(_CONTROLS)}b",
            lambda: f"s3://bucket/{chance.choice(_CONTROLS)}/x",
            lambda: 10 ** chance.choice((9, 12, 40, 400)),
            lambda: [{}] * 3,
        )
    )()


def _bomb(_whole: bytes, chance: random.Random) -> bytes:
    """A few lines that are billions of values, each list holding the one before many times."""
    levels, width = chance.choice(((9, 9), (7, 8), (30, 2)))
    lines = ["a0: &a0 [1, 1, 1]"]
    for number in range(1, levels):
        lines.append(f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * width)}]")
    inside = chance.choice(("", "  "))
    head = "train:\n" if inside else ""
    return (_HEAD + head + "\n".join(inside + line for line in lines)).encode()


def _merged(_whole: bytes, _chance: random.Random) -> bytes:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)]
    return (_HEAD + "\n".join(lines)).encode()


def _appended(text: str) -> Callable[[bytes, random.Random], bytes]:
    return lambda whole, _: whole + b"\n" + text.encode(errors="surrogatepass")


def _instead(text: str) -> Callable[[bytes, random.Random], bytes]:
    return lambda whole, _: _HEAD.encode() + text.encode(errors="surrogatepass")


_TEXTS: tuple[tuple[str, Callable[[bytes, random.Random], bytes]], ...] = (
    ("aliases of aliases", _bomb),
    ("merged aliases", _merged),
    ("aliases of aliases", _bomb),
    ("a list in itself", _appended("loader: &a\n  workers: *a")),
    ("nested deep", _instead("train:\n  seed: " + "[" * 3000 + "]" * 3000)),
    ("nested", _instead("train:\n  seed: " + "[" * 60 + "]" * 60)),
    ("groups nested deep", _instead("\n".join(" " * n + "a:" for n in range(800)))),
    ("a long number", _instead("train:\n  seed: " + "9" * 5000)),
    ("a number in base 60", _instead("train:\n  seed: " + "1:" * 300 + "1.5")),
    ("a whole number in base 60", _instead("train:\n  seed: " + "9:" * 3000 + "1")),
    ("a number of 16 MB", _instead("train:\n  seed: " + "1" * (1 << 24))),
    ("an object of Python", _instead("run: !!python/object/apply:os.mkdir [canary]")),
    ("a name of Python", _instead("run: !!python/name:os.mkdir")),
    ("a set", _instead("train:\n  seed: !!set {1}")),
    ("bytes", _instead("run: !!binary aGVsbG8=")),
    ("a date", _instead("run: 2026-11-30")),
    ("no date", _instead("run: 2026-99-99")),
    ("no int", _instead("train:\n  seed: !!int x")),
    ("no float", _instead("train:\n  seed: !!float x")),
    ("pairs", _instead("train: !!omap [seed: 1]")),
    ("a key that is a list", _instead("? [1, 2]\n: 3")),
    ("a key that is nothing", _instead("? \n: 3")),
    ("a key twice", _instead("run: a\nrun: b")),
    ("a number alone", _instead("5")),
    ("a text alone", _instead("text")),
    ("a list alone", _instead("[1, 2]")),
    ("nothing", _instead("")),
    ("two documents", _instead("run: a\n---\nrun: b")),
    ("a directive", _instead("%YAML 9.9\n---\nrun: a")),
    ("a lone surrogate", _instead('home: "/x/\\ud800"')),
    ("a NUL in a place", _instead('store:\n  uri: "/x/\\0"')),
    ("a NUL in a place", _instead('data:\n  prefix: "/x/\\0y"')),
    ("an escape sequence", _instead('run: "\\x1b[31m"')),
    ("no UTF-8", lambda whole, _: whole + b"\nrun: \xff\xfe"),
    ("UTF-16", lambda whole, _: whole.decode().encode("utf-16")),
    ("another package", lambda whole, _: b"# @package ../x\n" + whole),
    ("a comment with an @", _instead("# of mine\n# @todo tune the rate\ntrain: {seed: 7}")),
    ("an @ in the header", _instead("# @todo tune the rate\ntrain: {seed: 7}")),
    ("a later package", _instead("train: {seed: 7}\n# @package hydra.job")),
    ("two packages", _instead("\r\n\u2028# @package hydra.job\nname: x")),
    ("a package of Hydra", lambda whole, _: b"# @package hydra.job\nname: x\n"),
)


def _replace(theirs: Path, attempt: Try) -> str:
    """Put something in the file's place that is none."""
    done = attempt.chance.choice(("pipe", "endless", "folder", "link", "sparse", "loop"))
    if done == "pipe":
        os.mkfifo(theirs)
    elif done == "folder":
        theirs.mkdir()
    elif done == "sparse":
        with theirs.open("wb") as file:
            os.truncate(file.fileno(), attempt.chance.choice((1 << 28, 1 << 40)))
    else:
        to = {"endless": "/dev/zero", "link": "nowhere.yaml", "loop": theirs.name}[done]
        theirs.symlink_to(to)
    return f"it is a {done}"
