"""Saving to and restoring from an S3 server, against boto3's own transfer of the same bytes.

The server is OpenStack Swift on loopback, which shares the machine's cores, or the one that
--store names, with the usual credentials. A save is timed from its call until it is committed:
snapshot, hashes, upload in parts, manifest. A restore is
timed from the look for the newest checkpoint to the last verified value in place. The baselines are
`upload_fileobj` and `download_fileobj` with boto3's defaults, from and to memory.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch

from benchmarks import command
from benchmarks.checkpoints.state import MIB, RUN, RankState, Saves, add_state, rank_state
from benchmarks.interleaved import interleave
from trainer.checkpoint.reader import CheckpointReader
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("checkpoints transfer", description=__doc__ or "", rounds=4)
    add_state(parser, size="S/2")
    parser.add_argument("--store", help="s3://BUCKET/PREFIX instead of a server started here")
    options = parser.parse_args(arguments)
    setting = command.setting("checkpoints transfer", options)
    state = rank_state(options, setting.device)
    with place(options) as uri:
        _measure(state, uri, rounds=options.rounds, setting=setting)
    setting.deliver()
    return 0


def _measure(state: RankState, uri: str, *, rounds: int, setting: command.Setting) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=os.environ.get("S3_ENDPOINT_URL"),
        config=Config(s3={"addressing_style": "path"}),
    )
    bucket, key = urlsplit(uri).netloc, f"{urlsplit(uri).path.strip('/')}/plain".lstrip("/")
    store = open_store(uri, StoreConfig())
    saves = Saves(state, store)
    plain = torch.cat([flat.cpu() for flat in state.flats.values()]).numpy().tobytes()

    def save() -> None:
        saves.begin()
        saves.until_committed()

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        taken = time.perf_counter() - began
        saves.saver.finish()
        return taken

    def restore() -> None:
        reader = CheckpointReader(store, run=RUN)
        manifest = reader.newest_valid()
        assert manifest is not None
        reader.restore(manifest, state.fragments)

    works = {
        "up": {
            "boto3": lambda: client.upload_fileobj(io.BytesIO(plain), bucket, key),
            "save": save,
        },
        "down": {
            "boto3": lambda: client.download_fileobj(bucket, key, io.BytesIO()),
            "restore": restore,
        },
    }
    for direction, candidates in works.items():
        timings = interleave(candidates, rounds=rounds, stopwatch=seconds)
        for timing in timings:
            setting.report.add(
                direction=direction,
                what=timing.name,
                mib=state.size_bytes / MIB,
                minimum_s=timing.minimum,
                spread=timing.spread,
                mib_per_s=state.size_bytes / MIB / timing.minimum,
                rate_ratio=1 / timing.ratio,
            )


@contextmanager
def place(options: argparse.Namespace) -> Iterator[str]:
    """A URI to write to, with what boto3 needs for it in the environment."""
    if options.store is not None:
        yield options.store
        return
    from tests.support.s3_server import s3_server

    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as server:
        os.environ.update(server.environment)
        try:
            yield server.make_bucket("benchmark")
        finally:
            os.environ.clear()
            os.environ.update(before)
