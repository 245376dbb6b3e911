"""What a store, a network and a node can do to a run that reads from them.

A real S3 server behind a proxy that fails on command, and real processes that are killed. Whatever
happens, the batches are bit-equal to those of an undisturbed run, or an error says what to do.
"""

import logging
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.cache import default_cache_dir
from pipelines.errors import StoreUnreachableError
from pipelines.ingest.write import LabelledImage, write_dataset
from pipelines.shards import ShardsConfig
from tests.support.clock import Clock
from tests.support.faulty_proxy import FaultyProxy, Request, faulty_proxy
from tests.support.http_faults import Answer, Cut, Drip, Flip, Silence
from tests.support.s3_server import S3Server
from tests.support.shard_reader import IMAGE_SIZE, Reader, Reading
from tests.unit.pipelines import pictures

pytestmark = pytest.mark.slow

SAMPLES = 96
BATCHES = 20  # almost two epochs
SHARD_BYTES = 8000


@dataclass(frozen=True)
class Stored:
    """A dataset in the store, and the digests of its batches when nothing goes wrong."""

    s3: S3Server
    prefix: str
    undisturbed: list[str]
    shard_names: list[str]


@pytest.fixture(scope="module")
def stored(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    images = [
        LabelledImage(pictures.png(IMAGE_SIZE, IMAGE_SIZE, seed=seed), seed % 5)
        for seed in range(SAMPLES)
    ]
    folder = tmp_path_factory.mktemp("undisturbed")
    prefix = f"{s3.make_bucket('faults')}/train"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        for target in (str(folder), prefix):
            write_dataset(images, target, shard_bytes=SHARD_BYTES)
    local = Reading(prefix=str(folder), shards=ShardsConfig(), environment={}, batches=BATCHES)
    names = sorted(path.name for path in folder.glob("*.mds"))
    assert len(names) > 8
    return Stored(s3, prefix, list(local.digests()), names)


@dataclass(frozen=True)
class Outage:
    """What a run met whose store was away for a minute: its batches, waits and warnings."""

    digests: list[str]
    waits_s: list[float]
    lines: list[str]
    is_over: bool


def log_to(file: Path) -> None:
    logging.basicConfig(filename=file, level=logging.WARNING, format="%(message)s")


@pytest.fixture(scope="module", autouse=True)
def outage(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Outage]]:
    """Begin a run of a process of its own: the other tests take place while it waits."""
    folder = tmp_path_factory.mktemp("outage")
    log = folder / "log"
    with faulty_proxy(stored.s3.endpoint_url) as proxy, ThreadPoolExecutor() as pool:
        # So slowly that the store goes before all is there.
        proxy.inject(Drip(bytes_per_s=4 * SHARD_BYTES), when=is_shard)
        shards = ShardsConfig(cache_dir=str(folder / "cache"), download_threads=1)
        environment = replace(stored.s3, endpoint_url=proxy.endpoint_url).environment
        reading = Reading(
            prefix=stored.prefix, shards=shards, environment=environment, batches=BATCHES
        )
        reader = Reader(reading, before=partial(log_to, log))

        def watch() -> Outage:
            digests = reader.digests()
            got = [next(digests) for _ in range(3)]
            away = proxy.down_for(60)
            waits_s = []
            for _ in range(BATCHES - 3):
                asked_s = time.monotonic()
                got.append(next(digests))
                waits_s.append(time.monotonic() - asked_s)
            return Outage(got, waits_s, log.read_text().splitlines(), not away.is_alive())

        try:
            yield pool.submit(watch)
        finally:
            reader.kill()


@pytest.fixture
def proxy(stored: Stored) -> Iterator[FaultyProxy]:
    with faulty_proxy(stored.s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def reading(
    stored: Stored, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Reading:
    """A run behind the proxy with a cold cache, in this process or another."""
    environment = replace(stored.s3, endpoint_url=proxy.endpoint_url).environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tmp").mkdir()
    return Reading(
        prefix=stored.prefix,
        shards=ShardsConfig(cache_dir=str(tmp_path / "cache")),
        environment=environment | {"TMPDIR": str(tmp_path / "tmp")},
        batches=BATCHES,
    )


def with_shards(reading: Reading, **config: Any) -> Reading:
    return replace(reading, shards=replace(reading.shards, **config))


def is_shard(request: Request) -> bool:
    return request.method == "GET" and request.path.endswith(".mds")


def test_a_store_gone_for_good_ends_the_run_when_patience_does(
    stored: Stored, proxy: FaultyProxy, reading: Reading, source_clock: Clock
) -> None:
    patience_s, longest_s = 20, 17
    patient = with_shards(reading, download_patience_s=patience_s, download_threads=1)
    digests = patient.digests()
    got = [next(digests) for _ in range(2)]
    with (
        proxy.down(),
        pytest.raises(StoreUnreachableError, match=r"shard\.\d+\.mds could not .*Check that"),
    ):
        got.extend(digests)
    # The pause in which patience ends is the last.
    assert 0 < sum(source_clock.waits) < patience_s + longest_s
    assert got == stored.undisturbed[: len(got)]  # what was made before came first


def test_refused_credentials_end_the_run_at_once(
    stored: Stored, proxy: FaultyProxy, reading: Reading, source_clock: Clock
) -> None:
    digests = reading.digests()
    next(digests)
    proxy.inject(Answer(status=403, code="AccessDenied"))
    with pytest.raises(StoreUnreachableError, match=r"refused to give .*credentials"):
        list(digests)
    assert source_clock.waits == []


@pytest.mark.usefixtures("source_clock")
@pytest.mark.parametrize(
    "answer",
    [Answer(status=500, code="InternalError"), Answer(status=503, code="SlowDown")],
    ids=["500", "slow down"],
)
def test_errors_for_half_of_the_requests(
    stored: Stored, proxy: FaultyProxy, reading: Reading, answer: Answer
) -> None:
    proxy.inject(answer, share=0.5)
    assert list(reading.digests()) == stored.undisturbed


@pytest.mark.usefixtures("source_clock")
def test_bodies_that_break_off(stored: Stored, proxy: FaultyProxy, reading: Reading) -> None:
    proxy.inject(Cut(after_bytes=3000), share=0.5, when=is_shard)
    assert list(reading.digests()) == stored.undisturbed
    assert proxy.count("GET").total() > len(stored.shard_names) + 1


def test_bodies_that_come_slowly(stored: Stored, proxy: FaultyProxy, reading: Reading) -> None:
    """Slower than the time limit for silence: what counts is that something comes."""
    proxy.inject(Drip(bytes_per_s=SHARD_BYTES // 3), when=is_shard, times=3)
    assert list(with_shards(reading, download_timeout_s=2).digests()) == stored.undisturbed


def test_a_bit_that_flips_on_the_way_is_fetched_again(
    stored: Stored, proxy: FaultyProxy, reading: Reading, caplog: pytest.LogCaptureFixture
) -> None:
    struck: set[str] = set()

    def is_new(request: Request) -> bool:
        if not is_shard(request) or request.path in struck:
            return False
        struck.add(request.path)
        return True

    proxy.inject(Flip(at_byte=1000), when=is_new)
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        assert list(reading.digests()) == stored.undisturbed
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(stored.shard_names)
    assert all("does not have the sha256 hash" in line for line in lines)


def test_a_black_hole_is_left_after_the_time_limit(
    stored: Stored, proxy: FaultyProxy, reading: Reading, caplog: pytest.LogCaptureFixture
) -> None:
    impatient = with_shards(reading, download_timeout_s=1, download_threads=1)
    proxy.inject(Silence(), times=3, when=lambda request: request.path.endswith("00001.mds"))
    with caplog.at_level(logging.WARNING, logger="pipelines"):
        assert list(impatient.digests()) == stored.undisturbed
    failed = [line for line in caplog.messages if "shard.00001.mds failed" in line]
    assert "imeout" in failed[0]


def test_a_black_hole_for_good_is_an_error(
    stored: Stored, proxy: FaultyProxy, reading: Reading
) -> None:
    proxy.inject(Silence())
    with pytest.raises(StoreUnreachableError, match=r"index\.json could not .*imeout"):
        next(with_shards(reading, download_timeout_s=0.5, download_patience_s=3).digests())
    # A try is up to three requests of half a second; the pauses between tries are 1 and 2 s.
    assert len(proxy.requests) <= 3 * 3


def test_the_processes_of_a_node_fetch_each_shard_once(
    stored: Stored, proxy: FaultyProxy, reading: Reading
) -> None:
    proxy.inject(Drip(bytes_per_s=10 * SHARD_BYTES), when=is_shard)  # so that they meet
    readers = [Reader(reading) for _ in range(4)]
    for reader in readers:
        assert list(reader.digests()) == stored.undisturbed
    fetched = {path: n for path, n in proxy.count("GET").items() if path.endswith(".mds")}
    assert fetched == {f"/faults/train/{name}": 1 for name in stored.shard_names}


def test_a_small_cache_under_several_processes(
    stored: Stored, proxy: FaultyProxy, reading: Reading
) -> None:
    """They remove each other's shards all the time, and read the right ones all the same."""
    small = with_shards(reading, cache_limit_gib=3 * SHARD_BYTES / 2**30)
    readers = [Reader(small) for _ in range(3)]
    for reader in readers:
        assert list(reader.digests()) == stored.undisturbed


def test_kills_at_any_moment_leave_nothing_behind(
    stored: Stored, proxy: FaultyProxy, reading: Reading, tmp_path: Path
) -> None:
    # A shard takes as long as the longest life, so that no reader is done before it is killed.
    proxy.inject(Drip(bytes_per_s=SHARD_BYTES // 2), when=lambda request: request.method == "GET")
    moments = random.Random(0)
    left = []
    for life in range(16):
        reader = Reader(reading)
        # A busy machine may take longer to start a reader than some live: half of them live on
        # from their first shards.
        while life % 2 and len(in_transit(tmp_path)) < 2:
            assert reader.process.is_alive()
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 2.0))
        # What a process does not share it cannot leave; other programs have files there too.
        maps = Path(f"/proc/{reader.process.pid}/maps").read_text()
        assert "/dev/shm" not in maps
        reader.kill()
        left.append(len(in_transit(tmp_path)))
    # Four threads and the index: what one process can leave, not what many can.
    assert 1 < max(left) <= 5
    proxy.heal()
    log = tmp_path / "log"
    assert list(Reader(reading, before=partial(log_to, log)).digests()) == stored.undisturbed
    assert "waiting for another process" not in log.read_text()
    assert in_transit(tmp_path) == []


def in_transit(folder: Path) -> list[Path]:
    """What is on its way into the cache or into memory."""
    kept = {default_cache_dir().name, "scratch"}
    temporary = (folder / "tmp").rglob("*")
    scratch = [path for path in temporary if path.suffix != ".lock" and path.name not in kept]
    return [*(folder / "cache").glob("*/.partial/*"), *scratch]


def test_a_killed_job_does_not_touch_another_of_the_same_cache(
    stored: Stored, proxy: FaultyProxy, reading: Reading
) -> None:
    proxy.inject(Drip(bytes_per_s=4 * SHARD_BYTES), when=is_shard)
    lives, dies = Reader(reading), Reader(reading)
    digests = lives.digests()
    got = [next(digests)]
    dies.kill()
    got.extend(digests)
    assert got == stored.undisturbed


def test_a_store_away_for_a_minute_costs_a_pause_and_log_lines(
    stored: Stored, outage: Future[Outage]
) -> None:
    """The last test here, so that the minute has passed meanwhile."""
    seen = outage.result()
    assert seen.digests == stored.undisturbed
    assert max(seen.waits_s) > 40
    assert seen.is_over
    assert len(seen.lines) >= 4
    for line in seen.lines:
        assert f"{stored.prefix}/shard." in line
        assert "trying again in" in line
