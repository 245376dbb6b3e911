"""Credentials where a place is asked for: of every command, written well and not so well."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from pipelines.ingest.__main__ import main as ingest
from pipelines.shards import ShardsConfig
from pipelines.source import SourceConfig
from tests.fuzz.attempt import Try, announce
from tests.fuzz.hostile.judging import judged
from tests.fuzz.material import SETTINGS, data_of
from tests.fuzz.sandbox import SECRETS
from tests.fuzz.verdict import Seen
from tests.fuzz.watched import Watched, commanded
from trainer.cli.checkpoints import main as checkpoints
from trainer.cli.compare_losses import main as compare_losses
from trainer.cli.evaluate import main as evaluate
from trainer.cli.lapflow import main as lapflow
from trainer.cli.latents import main as latents
from trainer.cli.launch import main as launch
from trainer.cli.sample import main as sample
from trainer.cli.ui import main as ui

_SECRET = SECRETS["AWS_SECRET_ACCESS_KEY"]
_URLS = (
    f"s3://user:{_SECRET}@bucket/runs/x",
    f"s3://{_SECRET}@bucket/runs/x",
    f"http://user:{_SECRET}@127.0.0.1:9/x",
    f"https://127.0.0.1:9/x?token={_SECRET}",
    f"http://127.0.0.1:9/x#access_token={_SECRET}",
    f"postgresql://user:{_SECRET}@127.0.0.1:9/x",
    f"s3://bucket/runs/x?X-Amz-Signature={_SECRET}",
    f"S3://user:{_SECRET}@bucket/runs/x",
    f"file://user:{_SECRET}@host/x/y",
    f"http://127.0.0.1:9/%40x?password={_SECRET}",
    f"ray://user:{_SECRET}@127.0.0.1:9",
    f"S3://bucket:{_SECRET}/x",
    f"s3://AKIAXX:{_SECRET}/{_SECRET}@bucket/x",
    f"s3://bucket/x#token={_SECRET}",
    f"https://127.0.0.1:9/x?X-Amz-Date=1&X-Amz-Signature={_SECRET}",
    f"u:{_SECRET}@127.0.0.1/x",
    f"org/name?token={_SECRET}",
)
_KEYS = (
    *("store.uri", "tracking.uri", "data.prefix", "resume", "store.endpoint_url"),
    *("codec.source", "home", "eval.features.inception_weights", "cluster.address"),
    *("model", "exp", "+exp", "optim", "shards.cache_dir"),
)
_NOWHERE = ("store.endpoint_url=http://127.0.0.1:9", "store.retries=1", "store.connect_timeout_s=1")


def places(attempt: Try) -> Seen:
    """Give credentials where a place is asked for, which must be refused and not be told."""
    chance = attempt.chance
    url = chance.choice(_URLS)
    scheme, colon, rest = url.partition(":")
    if colon and chance.random() < 0.2:
        url = f"{scheme.upper()}:{rest}"
    if chance.random() < 0.3 and scheme != "file":  # which would name a folder
        url = url.replace("://", chance.choice((":/", ":/", ":", ":///")), 1)
    which = chance.choice([*(["launch"] * 6), *_COMMANDS])
    words: list[str] = []
    if which == "launch":
        key = chance.choice((*_KEYS, "data.streams"))
        how = chance.choice((["dry_run=true"], ["--cfg", "job"]))
        value = f"[{{prefix: {url}}}]" if key == "data.streams" else url
        words = [*how, f"{key}={value}"]
    attack = f"{which} {' '.join(words) or url}".replace(_SECRET, "SECRET")
    announce("hostile: places", attack)
    if which == "launch":
        given = [s for s in SETTINGS if s != "data.classes=0"]
        done = commanded(launch, [*given, f"home={attempt.sandbox.inside / 'home'}", *words])
    else:
        done = _COMMANDS[which](attempt, url)
    return judged(attempt, "places", attack, done, lambda: "credentials in a place were taken")


def _verify(_attempt: Try, url: str) -> Watched:
    return commanded(ingest, ["verify", url, "--workers", "1"], codes=(0, 1))


def _ingest_to(attempt: Try, url: str) -> Watched:
    return commanded(ingest, ["image-folder", str(attempt.material.images), url, "--workers", "1"])


def _ingest_from(_attempt: Try, url: str) -> Watched:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return commanded(ingest, ["huggingface", url, "out", "--workers", "1"])


def _by_option(attempt: Try, url: str) -> Watched:
    """Give it to an option that takes a file, a number or a choice."""
    pictures = str(attempt.material.images)
    main, words = attempt.chance.choice(
        (
            (ingest, ["image-folder", pictures, "out", "--labels", url]),
            (ingest, ["image-folder", pictures, "out", "--classes", url]),
            (ingest, ["image-folder", pictures, "out", "--workers", url]),
            (ingest, ["verify", pictures, "--report", url]),
            (ingest, ["verify", pictures, url]),
            (latents, [pictures, "out", "--autoencoder", "a", "--arrays", url]),
            (latents, [url, "out", "--autoencoder", "a", "--arrays", "latents"]),
            (lapflow, [url]),
        )
    )
    return commanded(main, words)


def _autoencoder(attempt: Try, url: str) -> Watched:
    words = [str(attempt.material.images), "out", "--autoencoder", url, "--image-size", "8"]
    return commanded(latents, [*words, "--workers", "1"])


def _encode(attempt: Try, url: str) -> Watched:
    words = ["--autoencoder", str(attempt.material.autoencoder), "--image-size", "8"]
    return commanded(latents, [url, "out", *words, "--workers", "1"])


def _by_environment(_attempt: Try, url: str) -> Watched:
    os.environ |= {"S3_ENDPOINT_URL": url, "AWS_ENDPOINT_URL": url}
    # It would ask for two minutes.
    for kind in (SourceConfig, ShardsConfig):
        kind.__init__.__kwdefaults__["download_patience_s"] = 0.5
    return commanded(ingest, ["verify", "s3://bucket/x", "--workers", "1"], codes=(0, 1))


def _trained_by_environment(attempt: Try, url: str) -> Watched:
    os.environ["S3_ENDPOINT_URL"] = url
    words = [f"data.prefix={data_of(attempt.material.home)}", *_NOWHERE[1:]]
    home = f"home={attempt.sandbox.inside / 'home'}"
    return commanded(launch, [*SETTINGS, home, "store.uri=s3://bucket/x", *words])


_COMMANDS: Mapping[str, Callable[[Try, str], Watched]] = {
    "list": lambda _, url: commanded(checkpoints, ["list", url, *_NOWHERE]),
    "export": lambda _, url: commanded(checkpoints, ["export", url, "output=weights", *_NOWHERE]),
    "evaluate": lambda _, url: commanded(evaluate, [f"checkpoint={url}", "home=h", *_NOWHERE]),
    "sample": lambda _, url: commanded(sample, [f"checkpoint={url}", "output=g.png", *_NOWHERE]),
    "ui": lambda _, url: commanded(ui, [f"uri={url}", "home=h"]),
    "ingest verify": _verify,
    "ingest into": _ingest_to,
    "ingest huggingface": _ingest_from,
    "ingest image-folder": lambda _, url: commanded(ingest, ["image-folder", url, "out"]),
    "an option": _by_option,
    "compare_losses": lambda _, url: commanded(compare_losses, [url, f"run:a@{url}"]),
    "compare_losses with": lambda _, url: commanded(compare_losses, [f"run:a@{url}", "run:a"]),
    "latents --autoencoder": _autoencoder,
    "latents of": _encode,
    "S3_ENDPOINT_URL": _by_environment,
    "S3_ENDPOINT_URL of a launch": _trained_by_environment,
}
"""What is done with a place, by the command that is given it."""
