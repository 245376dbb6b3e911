"""Nothing that lies in the folder of a Hugging Face dataset is executed or unpickled."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.ingest.__main__ import main
from tests.support.hostile_files import Payload
from tests.unit.pipelines.test_huggingface import IMAGES, contents, hub_dataset, repository, saved
from tests.unit.pipelines.test_huggingface_hostile import readme


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@dataclass(frozen=True)
class Trap:
    """A folder to be ingested, and what makes another one when it is executed."""

    copy: Path
    canary: Path

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(Payload(str(self.canary)))

    @property
    def script(self) -> str:
        return f"import os\nos.mkdir({str(self.canary)!r})\n"


def lay_scripts(trap: Trap) -> None:
    """Names that some version of the library has run, or Python does."""
    repository(hub_dataset(), trap.copy)
    for name in (f"{trap.copy.name}.py", "dataset.py", "__init__.py", "conftest.py", "data.py"):
        (trap.copy / name).write_text(trap.script)


def lay_pickles_beside_images(trap: Trap) -> None:
    for number, name in enumerate(("ant", "bee")):
        (trap.copy / name).mkdir(parents=True)
        (trap.copy / name / "1.png").write_bytes(IMAGES[number])
        for suffix in ("pkl", "pickle", "pt", "pth", "npy", "joblib"):
            (trap.copy / name / f"1.{suffix}").write_bytes(trap.pickled)


def lay_pickles_alone(trap: Trap) -> None:
    trap.copy.mkdir()
    for name in ("train.pkl", "train.pickle"):
        (trap.copy / name).write_bytes(trap.pickled)


def name_pickles_in_readme(trap: Trap) -> None:
    lay_pickles_alone(trap)
    (trap.copy / "README.md").write_text(readme("train.pkl"))


def name_a_reader_of_pickles(trap: Trap) -> None:
    lay_pickles_alone(trap)
    configs = "- config_name: default\n  builder_name: pandas\n  data_files: train.pkl\n"
    (trap.copy / "README.md").write_text(f"---\nbuilder_name: pandas\nconfigs:\n{configs}---\n")


def make_objects_in_yaml(trap: Trap) -> None:
    repository(hub_dataset(), trap.copy)
    text = f"!!python/object/apply:os.mkdir ['{trap.canary}']"
    (trap.copy / "README.md").write_text(f"---\ndataset_info: {text}\n---\n")
    (trap.copy / ".huggingface.yaml").write_text(f"dataset_info: {text}\n")


def pack_pickles_beside_images(trap: Trap, *suffixes: str) -> None:
    trap.copy.mkdir()
    with tarfile.open(trap.copy / "train.tar", "w") as archive:
        for number in range(2):
            files = {"png": IMAGES[number], "cls": b"0"} | dict.fromkeys(suffixes, trap.pickled)
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def pack_pickles(trap: Trap) -> None:
    pack_pickles_beside_images(trap, "pkl", "pickle", "pyd")


def pack_arrays(trap: Trap) -> None:
    pack_pickles_beside_images(trap, "npy")


def pack_weights(trap: Trap) -> None:
    pack_pickles_beside_images(trap, "pth")


def pack_other_objects(trap: Trap) -> None:
    pack_pickles_beside_images(trap, "cbor", "mp", "ten")


def extend_arrow(trap: Trap) -> None:
    """A type that older pyarrow makes by unpickling what the table's schema says."""
    saved(hub_dataset(), trap.copy)
    (file,) = trap.copy.glob("*.arrow")
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    told = {"ARROW:extension:name": "arrow.py_extension_type"}
    field = table.schema.field("label").with_metadata(
        {**told, "ARROW:extension:metadata": trap.pickled}
    )
    schema = table.schema.set(table.schema.get_field_index("label"), field)
    with pa.ipc.new_stream(str(file), schema) as writer:
        writer.write_table(pa.Table.from_arrays(table.columns, schema=schema))


def pickle_the_format(trap: Trap) -> None:
    saved(hub_dataset(), trap.copy)
    state = json.loads((trap.copy / "state.json").read_text())
    state |= {"_format_type": "python", "_format_kwargs": {"py/reduce": trap.pickled.hex()}}
    (trap.copy / "state.json").write_text(json.dumps(state))
    for name in ("indices.pkl", "cache-0.pkl", "dataset.pickle"):
        (trap.copy / name).write_bytes(trap.pickled)


TRAPS = [lay_scripts, lay_pickles_beside_images, lay_pickles_alone, name_pickles_in_readme]
TRAPS += [name_a_reader_of_pickles, make_objects_in_yaml, pack_pickles, pack_arrays, pack_weights]
TRAPS += [pack_other_objects, extend_arrow, pickle_the_format]


@pytest.mark.parametrize("lay", TRAPS)
def test_nothing_in_a_folder_is_executed(
    lay: Callable[[Trap], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trap = Trap(tmp_path / "copy", tmp_path / "executed")
    lay(trap)
    out = tmp_path / "out"
    words = ["huggingface", str(trap.copy), str(out), "--workers", "1"]
    for columns in ([], ["--image-column", "png", "--label-column", "cls"]):
        code = main([*words, *columns])
        assert code in (0, 2), capsys.readouterr().err
        if code == 0:
            assert {data for data, _ in contents(out / "train")} <= {*IMAGES}
    assert not trap.canary.exists()


def test_what_would_be_executed_is_a_trap(tmp_path: Path) -> None:
    """Without this, the folders above could be harmless by mistake."""
    trap = Trap(tmp_path / "copy", tmp_path / "executed")
    pickle.loads(trap.pickled)
    assert trap.canary.is_dir()
    trap.canary.rmdir()
    exec(compile(trap.script, "script", "exec"))
    assert trap.canary.is_dir()
