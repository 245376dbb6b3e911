"""Folders of Hugging Face datasets that somebody has made: what they name, and what they claim."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.ingest.__main__ import main as ingest
from tests.fuzz import mutation
from tests.fuzz.attempt import Try, announce
from tests.fuzz.hostile.datasets import LEFT_OUT, stored
from tests.fuzz.hostile.judging import judged
from tests.fuzz.sandbox import BAIT
from tests.fuzz.verdict import Seen, Verdict
from tests.fuzz.watched import commanded
from tests.support.hostile_files import Payload
from tests.unit.pipelines import pictures
from tests.unit.pipelines.pages import tell_less

_NAMES = ["ant", "bee"]
_FILE_BYTES = 128 << 20
"""More than what any file of such a small dataset holds."""

_NO_MORE = (OSError, ValueError, TypeError, LookupError, AttributeError, StopIteration)


def folders(attempt: Try) -> Seen:
    """Ingest a copy of a dataset, beside which lies another one that is nobody's business."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Of the three that the library reads, each has other files that name others.
    form = attempt.chance.choice(("saved", "splits", "repository", "images", "parquet"))
    source = attempt.sandbox.inside / "source"
    given = [pictures.png(8, 8, seed=number) for number in range(6)]
    _private(attempt)
    _make(form, source, given)
    split = "train"
    attacks = []
    for _ in range(attempt.chance.choice((1, 1, 2))):
        try:
            done, other = _ATTACKS[form](source, attempt)
        except _NO_MORE:
            if not attacks:
                raise
            break  # what the first has left is nothing that this one could change
        attacks.append(done)
        split = other or split
    attack = f"{form}: {'; '.join(attacks)}"
    announce("hostile: Hugging Face folders", attack)
    name = source / "train.parquet" if form == "parquet" else source
    words = [str(name), str(attempt.sandbox.inside / "out"), "--split", split, "--workers", "1"]
    # What is a bomb must not fill the disk of who tries it. The library hides why it fails then.
    exceeded: list[int] = []
    signal.signal(signal.SIGXFSZ, lambda number, _: exceeded.append(number))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    done_ = commanded(ingest, ["huggingface", *words, "--max-skipped-fraction", "1"])
    if exceeded:
        said = f"a file of more than {_FILE_BYTES} bytes was written\n{done_.said[-1500:]}"
        target = "hostile: Hugging Face folders"
        return Seen(verdict=Verdict.WRONG, target=target, attack=attack, said=said)
    out = attempt.sandbox.inside / "out"
    return judged(
        attempt,
        "Hugging Face folders",
        attack,
        done_,
        lambda: _complaint(out, split, given),
        told=LEFT_OUT,
    )


def _complaint(out: Path, split: str, given: list[bytes]) -> str | None:
    samples = stored(out, split)
    if any(BAIT in data for data, _ in samples):
        return "an image of a folder that nobody has named was taken"
    return None if {data for data, _ in samples} <= {*given} else "another image was taken"


def _dataset(images: list[bytes], paths: list[str | None] | None = None) -> Any:
    import datasets

    paths = paths or [None] * len(images)
    values = {
        "image": [{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)],
        "label": [number % 2 for number in range(len(images))],
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=_NAMES)}
    return datasets.Dataset.from_dict(values, features=datasets.Features(kinds))


def _make(form: str, folder: Path, images: list[bytes]) -> None:
    import datasets

    if form == "images":
        for number, data in enumerate(images):
            path = folder / "train" / _NAMES[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return
    dataset = _dataset(images)
    if form == "saved":
        dataset.save_to_disk(str(folder))
    elif form == "splits":
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0, 1])}).save_to_disk(
            str(folder)
        )
    else:
        folder.mkdir()
        dataset.to_parquet(str(folder / "train.parquet"))


def _private(attempt: Try) -> None:
    """A whole dataset beside the one that is named, whose every image holds bait."""
    images = [pictures.png(8, 8, seed=100 + number) + BAIT for number in range(4)]
    made = attempt.sandbox.inside / "private"
    _make("saved", made, images)
    _dataset(images).to_parquet(str(made / "train.parquet"))
    attempt.sandbox.hide(made)


def _outside(attempt: Try, name: str) -> str:
    """Name a file of the private folder: from the root, or from the dataset's folder."""
    whole = attempt.sandbox.outside / "private" / name
    return attempt.chance.choice(
        (
            str(whole),
            f"../../outside/private/{name}",
            f"./x/../../../outside/private/{name}",
            f"file://{whole}",
        )
    )


Done = tuple[str, str | None]
"""What was done, and the split to ask for if it is another one."""


def _saved(source: Path, attempt: Try) -> Done:
    chance = attempt.chance
    folder = source if (source / "state.json").exists() else source / "train"
    state = json.loads((folder / "state.json").read_bytes())
    done = chance.choice(("file", "file", "format", "link", "edit", "edit", "arrow"))
    if done == "file":
        named = _outside(attempt, "data-00000-of-00001.arrow")
        state["_data_files"] = [{"filename": named}]
        (folder / "state.json").write_text(json.dumps(state))
        return f"state.json names {named[-50:]}", None
    if done == "format":
        state["_format_type"] = kind = chance.choice(("pandas", "numpy", "torch", "x", 5, None))
        (folder / "state.json").write_text(json.dumps(state))
        return f"_format_type {kind}", None
    arrow = next(folder.glob("*.arrow"))
    if done == "link":
        _link(arrow, attempt, "data-00000-of-00001.arrow")
        return "the arrow file is a link", None
    if done == "arrow" and chance.random() < 0.3:
        return _with_footer(arrow, folder, chance), None
    if done == "arrow":
        data, what = mutation.edited_bytes(arrow.read_bytes(), chance)
        arrow.write_bytes(data)
        return f"arrow {what}", None
    name = chance.choice(("state.json", "dataset_info.json"))
    return f"{name} {_edited(folder / name, chance)}", None


def _with_footer(arrow: Path, folder: Path, chance: random.Random) -> str:
    """Write the table as a file of Arrow's other format, which the library reads in some places."""
    import pyarrow as pa

    table = pa.ipc.open_stream(arrow.read_bytes()).read_all()
    compression = chance.choice((None, "zstd"))
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(arrow), table.schema, options=options) as writer:
        writer.write_table(table)
    if chance.random() < 0.5:
        (folder / "state.json").unlink()
    return f"arrow with a footer, compressed by {compression}"


def _splits(source: Path, attempt: Try) -> Done:
    if attempt.chance.random() < 0.5:
        return _saved(source, attempt)
    name = source / "dataset_dict.json"
    if attempt.chance.random() < 0.5:
        return f"dataset_dict.json {_edited(name, attempt.chance)}", None
    split = _outside(attempt, "")[:-1]
    name.write_text(json.dumps({"splits": ["train", split]}))
    return f"a split {split[-40:]}", attempt.chance.choice(("train", split))


def _repository(source: Path, attempt: Try) -> Done:
    chance = attempt.chance
    done = chance.choice(("readme", "readme", "link", "edit", "bomb", "row", "script", "pickle"))
    if done == "link":
        _link(source / "train.parquet", attempt, "train.parquet")
        return "the parquet file is a link", None
    if done == "bomb":
        return _bomb(source / "train.parquet", chance), None
    if done == "row":
        return _row(source, attempt), None
    if done == "pickle":
        return _pickle(source, attempt), None
    if done == "script":
        code = f"import os\nos.mkdir({str(attempt.sandbox.canary)!r})\n"
        (source / f"{source.name}.py").write_text(code)
        return "a loading script", None
    named = _outside(attempt, "*.parquet")
    if chance.random() < 0.3:
        named = chance.choice(("http://127.0.0.1:9/x.parquet", f"zip://x::{named}", "/dev/zero", 5))
    card: dict[str, Any] = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": named}]}]
    }
    if done == "edit":
        card["dataset_info"] = mutation.value(chance)
        if chance.random() < 0.5:
            card["configs"] = mutation.value(chance)
    # JSON is YAML, as far as these values go.
    text = json.dumps(card)
    (source / "README.md").write_text(f"---\n{text}\n---\n", errors="replace")
    return f"README.md {text[:90]}", None


def _images(source: Path, attempt: Try) -> Done:
    chance = attempt.chance
    folder = source / "train"
    done = chance.choice(("link", "folder", "table", "table", "pickle", "archive"))
    if done == "link":
        (folder / "ant" / "x.png").symlink_to(attempt.sandbox.bait)
        return "a picture is a link", None
    if done == "pickle":
        return _pickle(folder / "ant", attempt), None
    if done == "archive":
        return _archive(folder / "more.zip", chance), None
    if done == "folder":
        (folder / "cow").symlink_to(attempt.sandbox.outside)
        return "a class is a link", None
    named = chance.choice((str(attempt.sandbox.bait), "../../../outside/private.png"))
    rows = [{"file_name": named, "label": 0}, {"file_name": "ant/0.png", "label": 1}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"metadata.jsonl names {named[-40:]}", None


def _parquet(source: Path, attempt: Try) -> Done:
    path = source / "train.parquet"
    done = attempt.chance.choice(("bomb", "bomb", "page", "row", "bytes"))
    if done == "bomb":
        return _bomb(path, attempt.chance), None
    if done == "page":
        return _page(path, attempt.chance), None
    if done == "row":
        return _row(source, attempt), None
    data, what = mutation.edited_bytes(path.read_bytes(), attempt.chance)
    path.write_bytes(data)
    return f"parquet {what}", None


_ATTACKS: dict[str, Callable[[Path, Try], Done]] = {
    "saved": _saved,
    "splits": _splits,
    "repository": _repository,
    "images": _images,
    "parquet": _parquet,
}


def _link(path: Path, attempt: Try, name: str) -> None:
    path.unlink()
    path.symlink_to(attempt.sandbox.outside / "private" / name)


def _edited(path: Path, chance: random.Random) -> str:
    data, done = mutation.edited_json(path.read_bytes(), chance)
    path.write_bytes(data)
    return done


def _row(source: Path, attempt: Try) -> str:
    named = attempt.chance.choice((str(attempt.sandbox.bait), "../../outside/private.png"))
    _dataset([b""], [named]).to_parquet(str(source / "train.parquet"))
    return f"a row names {named[-40:]}"


def _bomb(path: Path, chance: random.Random) -> str:
    """A few kilobytes of parquet whose columns say one long value over and over."""
    import pyarrow as pa
    import pyarrow.parquet

    size, rows = chance.choice(((1 << 20, 150), (1 << 16, 3000), (1 << 12, 60_000)))
    column = chance.choice(("bytes", "path", "label"))
    value = pictures.png(8, 8) + bytes(size)
    images = pa.StructArray.from_arrays(
        [
            pa.DictionaryArray.from_arrays(
                pa.array([0] * rows, pa.int32()), pa.array([value if column == "bytes" else b"x"])
            ).cast(pa.binary()),
            pa.DictionaryArray.from_arrays(
                pa.array([0] * rows, pa.int32()), pa.array(["y" * size if column == "path" else ""])
            ).cast(pa.string()),
        ],
        ["bytes", "path"],
    )
    label = pa.array(["z" * size if column == "label" else "ant"] * rows)
    table = pa.table({"image": images, "label": label})
    compression = chance.choice(("zstd", "gzip", "snappy"))
    pyarrow.parquet.write_table(table, path, compression=compression)
    return f"{rows} rows of {size} bytes in {column} by {compression}, {path.stat().st_size} bytes"


def _page(path: Path, chance: random.Random) -> str:
    """A page of some kilobytes that unpacks to far more than the end of the file says."""
    import pyarrow as pa
    import pyarrow.parquet

    size = chance.choice((70, 100)) << 20
    image = pa.array([{"bytes": pictures.png(8, 8) + bytes(size), "path": ""}])
    with_dictionary = chance.random() < 0.5
    pyarrow.parquet.write_table(
        pa.table({"image": image, "label": ["ant"]}),
        path,
        compression="zstd",
        use_dictionary=with_dictionary,
        dictionary_pagesize_limit=2 * size,
    )
    tell_less(path)
    page = "dictionary" if with_dictionary else "page"
    return f"a {page} of {size} bytes by zstd, {path.stat().st_size} bytes"


def _pickle(folder: Path, attempt: Try) -> str:
    """A file beside the images that makes the canary when it is unpickled."""
    suffix = attempt.chance.choice(("pkl", "pickle", "pt", "pth", "npy"))
    name = f"{attempt.chance.choice(('train', 'x', '0'))}.{suffix}"
    (folder / name).write_bytes(pickle.dumps(Payload(str(attempt.sandbox.canary))))
    return f"{name} is a pickle"


def _archive(path: Path, chance: random.Random) -> str:
    """An archive beside the images, of one that is far larger than the archive."""
    size = chance.choice((1, 100, 200)) << 20
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/ant/x.png", pictures.png(8, 8) + bytes(size))
    return f"{path.name} holds {size} bytes"
