"""Everything that reads what a run has left, and when what it reads is right."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipelines.console import say
from pipelines.ingest.__main__ import main as ingest
from pipelines.ingest.about import read_about
from pipelines.shards import ShardedDataset
from tests.fuzz.material import RUN, data_of, evaluate_arguments, launch_arguments, run_of
from tests.fuzz.watched import Watched, commanded, watched
from tests.support.forked import ranks_by_fork
from tests.support.job import final_state
from trainer.checkpoint.reader import CheckpointReader
from trainer.cli.checkpoints import main as checkpoints
from trainer.cli.ending import final_report
from trainer.cli.evaluate import main as evaluate
from trainer.cli.launch import main as launch
from trainer.config.composition import compose_job
from trainer.config.job import JobConfig, science
from trainer.config.reading import to_dict
from trainer.data.splits import open_split, with_classes
from trainer.evaluation.model_record import own_eval
from trainer.evaluation.reports import read_scores
from trainer.host_group import HostGroup
from trainer.metrics.buffer import MetricBuffer
from trainer.page.page import make_page
from trainer.page.story import read_story
from trainer.storage.errors import CheckpointError
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig
from trainer.training.assembly import build_run_engine
from trainer.training.resume import restore

DAMAGED = "damaged"
"""In the place of a checkpoint's state."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Reader:
    """One way to read a home.

    Attributes:
        read: Reads the home; scratch is an empty folder to write into. What it returns as `value`
            is equal only where everything that was read is equal.
        roles: Roles of the files that it reads; it is asked now and then about others too.
        share: How often it is asked about those, less for one that takes longer.
        tidies: Whether it puts aside what it cannot believe, which others must find in place.
    """

    read: Callable[[Path, Path], Watched]
    roles: Sequence[str]
    share: float = 1.0
    tidies: bool = False


def job_of(home: Path) -> JobConfig:
    """Compose the run's configuration as one process has it."""
    return with_classes(_composed(home))


@cache
def _composed(home: Path) -> JobConfig:
    return compose_job(launch_arguments(home, workers=1))


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return SHA-256 over names, shapes, types and bits."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


@dataclass
class _Told:
    """What a collective call tells the driver, for the user."""

    lines: list[str] = field(default_factory=list)

    def __call__(self, message: dict[str, Any]) -> None:
        if "text" in message:
            self.lines.append(f"{message['kind']}: {message['text']}")


def restored(home: Path, *, before: int | None = None) -> dict[str, Any]:
    """Restore the newest checkpoint as a launch does; `before` leaves newer ones out."""
    job = job_of(home)
    images = open_split(job, "train")
    told = _Told()
    engine = build_run_engine(job, world_size=1, device=CPU)
    reader = CheckpointReader(open_store(str(run_of(home).parent), StoreConfig()), run=RUN)
    if before is not None:
        last, newest = before, reader.newest_valid
        reader.newest_valid = lambda before=None: newest(before=before or last)  # type: ignore
    found = restore(
        job,
        science(job, data_digest=images.digest, codec_digest=None),
        engine=engine,
        metrics=MetricBuffer(CPU),
        checkpoints=reader,
        ranks=HostGroup(alone=True),
        report=told,
    )
    for line in told.lines:
        say(line)
    state = {f"{f.name}/{k}": t for f in engine.fragments() for k, t in f.tensors.items()}
    return {"images": found.position, "state": digest(state), "counters": found.state.to_dict()}


def _restored(home: Path, _scratch: Path) -> Watched:
    return watched(partial(restored, home))


def _listed(home: Path, _scratch: Path) -> Watched:
    done = commanded(checkpoints, ["list", str(run_of(home)), "--json"])
    if done.raw or done.refusal:
        return done
    values = json.loads(done.out)
    for each in values["checkpoints"]:
        each["uri"] = each["uri"].replace(str(home), "")
    values["run"] = ""
    values["resume_from"] = (values["resume_from"] or "").replace(str(home), "")
    return done.with_value(values)


def _verified(home: Path, _scratch: Path) -> Watched:
    done = commanded(checkpoints, ["verify", str(run_of(home))], codes=(0, 1))
    states = [line.split() for line in done.out.splitlines() if line.startswith("  ")]
    found = {words[0]: words[1] for words in states if len(words) == 2}
    return done.with_value([done.value, {k: v for k, v in found.items() if v in _STATES}])


_STATES = ("whole", "DAMAGED")


def exported(home: Path, scratch: Path, *more: str) -> Watched:
    """Export the newest checkpoint as the command does."""
    target = scratch / "weights.safetensors"
    words = ["export", str(run_of(home)), f"output={target}", "file=safetensors", *more]
    done = commanded(checkpoints, words)
    if done.raw or done.refusal:
        return done
    return done.with_value(digest(load_file(target)))


def _samples(home: Path, _scratch: Path) -> Watched:
    def read() -> str:
        whole = hashlib.sha256()
        for split in ("train", "test"):
            dataset = ShardedDataset(str(data_of(home) / split))
            for number in range(len(dataset)):
                sample = dataset.read(number)
                whole.update(f"{len(sample.data)} {sample.label} ".encode() + sample.data)
        return whole.hexdigest()

    return watched(read)


def _about(home: Path, _scratch: Path) -> Watched:
    def read() -> list[Any]:
        found = [read_about(str(data_of(home) / split)) for split in ("train", "test")]
        return [None if about is None else asdict(about) for about in found]

    return watched(read)


def _data_verified(home: Path, scratch: Path) -> Watched:
    values, last = [], None
    for split in ("train", "test"):
        file = scratch / f"{split}.json"
        words = ["verify", str(data_of(home) / split), "--workers", "1", "--report", str(file)]
        last = commanded(ingest, words, codes=(0, 1))
        if last.raw or last.refusal:
            return last
        report = json.loads(file.read_text())
        values.append([last.value, {k: v for k, v in report.items() if k not in ("prefix",)}])
    assert last is not None
    return last.with_value(values)


def _reported(home: Path, _scratch: Path) -> Watched:
    def read() -> Any:
        report = final_report(job_of(home))
        return None if report is None else asdict(report)

    return watched(read)


def _scored(home: Path, _scratch: Path) -> Watched:
    store = partial(open_store, str(run_of(home).parent), StoreConfig())
    return watched(lambda: read_scores(store(), RUN))


def _page(home: Path, _scratch: Path) -> Watched:
    def read() -> Any:
        story = read_story(open_store(str(run_of(home).parent), StoreConfig()), RUN)
        assert make_page([story]).endswith("</html>\n")
        measured = {
            f"{images} {each.distance.features} {each.measurement.name}": each.distance.frechet
            for images, distances in story.distances.items()
            for each in distances
        }
        newest = None if story.newest is None else story.newest.images
        return {"newest": newest, "measured": measured, "curves": story.curves}

    return watched(read)


def _own_settings(home: Path, _scratch: Path) -> Watched:
    def read() -> Any:
        store = open_store(str(run_of(home).parent), StoreConfig())
        manifest = CheckpointReader(store, run=RUN).newest_valid()
        own = manifest and own_eval(store, manifest)
        return own and [manifest.images, to_dict(own)]

    return watched(read)


def _figures(run: Path) -> list[Any]:
    found = []
    for path in sorted(run.glob("evaluation/*/*/report.json")):
        values = json.loads(path.read_text())
        distances = [[d["features"], d["frechet"]] for d in values["distances"]]
        found.append([values["images"], distances])
    return found


def _evaluated(home: Path, _scratch: Path, *more: str) -> Watched:
    # Code 1 is that of figures that were printed and cannot be written.
    done = commanded(evaluate, [*evaluate_arguments(home), *more], refusals=(1, 2))
    if done.raw or done.refusal:
        return done
    return done.with_value(done.out.splitlines()[-3:])


def _measured_anew(home: Path, scratch: Path, *more: str) -> Watched:
    words = [*evaluate_arguments(home), f"output={scratch / 'results'}", *more]
    done = commanded(evaluate, words)
    if done.raw or done.refusal:
        return done
    return done.with_value(_figures(scratch / "results" / RUN))


def launched(home: Path, _scratch: Path) -> Watched:
    """Start the same command again, which says that the run is complete, or makes it so."""
    with ranks_by_fork():
        done = commanded(launch, launch_arguments(home), refusals=(1, 2, 3))
    if done.raw or done.refusal:
        return done
    return done.with_value(final_result(home))


def final_result(home: Path) -> dict[str, Any]:
    """Read the state of the last checkpoint and the figures, past everything that is tested."""
    report = run_of(home) / "evaluation"
    (newest,) = sorted(report.glob("*/report.json"))[-1:]
    values = json.loads(newest.read_text())
    try:
        state = digest(final_state(str(home / "store"), RUN))
    except CheckpointError:
        state = DAMAGED
    return {
        "state": state,
        "frechet": [values["frechet"], values["frechet_untrained"]],
    }


def at_position(images: int) -> dict[str, Callable[[Path, Path], Watched]]:
    """Return readers of an older checkpoint: what they give where all newer ones are damaged."""
    uri = f"checkpoints/{images:012d}"

    def own(home: Path, scratch: Path) -> Watched:
        for newer in run_of(home).glob("checkpoints/*"):
            if int(newer.name) > images:
                shutil.rmtree(newer)
        return _own_settings(home, scratch)

    def measured(read: Callable[..., Watched]) -> Callable[[Path, Path], Watched]:
        return lambda home, scratch: read(home, scratch, f"checkpoint={run_of(home) / uri}")

    return {
        "restore": lambda home, _: watched(partial(restored, home, before=images + 1)),
        "checkpoints export": lambda home, scratch: exported(home, scratch, f"choose={images}"),
        "evaluate": measured(_evaluated),
        "evaluate anew": measured(_measured_anew),
        "own settings": own,
    }


_RUNS = ("manifest", "checkpoint object")
_REPORTS = ("report of the run", "report of evaluate")
_DATA = ("index of shards", "shard")
_MEASURED = (*_RUNS, *_REPORTS, *_DATA, "ingest.json", "learned features")

READERS = {
    "restore": Reader(_restored, (*_RUNS, "index of shards", "ingest.json")),
    "checkpoints list": Reader(_listed, (*_RUNS, *_REPORTS)),
    "checkpoints verify": Reader(_verified, _RUNS),
    "checkpoints export": Reader(exported, _RUNS),
    "read the data": Reader(_samples, _DATA),
    "names of classes": Reader(_about, ("ingest.json",)),
    "ingest verify": Reader(_data_verified, (*_DATA, "ingest.json")),
    "final report": Reader(_reported, (*_RUNS, *_REPORTS, *_DATA), tidies=True),
    "scores for keep_best": Reader(_scored, (*_RUNS, *_REPORTS)),
    "page": Reader(_page, (*_RUNS, *_REPORTS, "history of the run"), tidies=True),
    "own settings": Reader(_own_settings, (*_RUNS, *_REPORTS)),
    "evaluate": Reader(_evaluated, _MEASURED, tidies=True),
    "evaluate anew": Reader(_measured_anew, _MEASURED, share=0.5, tidies=True),
    "launch": Reader(launched, (*_MEASURED, "MLflow's database"), share=0.2, tidies=True),
}
