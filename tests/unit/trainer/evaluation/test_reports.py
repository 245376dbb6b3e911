"""Reports of measured checkpoints: read again where they can be believed, and made again else."""

import dataclasses
import json
import logging
import resource
import signal

import pytest

from tests.unit.trainer.evaluation.small_run import OWN, config, quiet, report_of
from trainer.cli.evaluate import main
from trainer.config.job import FeatureConfig
from trainer.evaluation.checkpoints import evaluate_checkpoints
from trainer.evaluation.choice import choose_checkpoints
from trainer.evaluation.model_record import own_eval
from trainer.evaluation.reports import CheckpointReport, evaluation_key
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig


def test_a_report_of_the_run_tells_its_own_settings_before_its_checkpoint(place, caplog):
    (manifest,) = choose_checkpoints(
        f"{place}/runs/small", which="newest", config=StoreConfig()
    ).manifests
    store = open_store(f"{place}/elsewhere", StoreConfig())
    assert own_eval(store, manifest) == OWN
    again = dataclasses.replace(OWN, samples=30)
    key = evaluation_key("small", 200, "report.json")
    whole = report_of(again)
    store.put(key, whole.to_json())
    assert own_eval(store, manifest) == again
    # Who can write to the store could have this machine read any of its files.
    elsewhere = FeatureConfig(name="inception", inception_weights="/dev/zero")
    store.put(key, report_of(dataclasses.replace(again, features=elsewhere)).to_json())
    of_machine = own_eval(store, manifest)
    assert of_machine is not None
    assert of_machine.features == FeatureConfig(name="inception")
    # Or import what it likes.
    code = FeatureConfig(name="module", module="this:that", module_weights="s3://bucket/weights")
    store.put(key, report_of(dataclasses.replace(again, features=code)).to_json())
    caplog.clear()
    assert own_eval(store, manifest) == dataclasses.replace(again, features=FeatureConfig())
    assert "the code of this:that, which is not run on a store's word" in caplog.text
    damaged = [dataclasses.replace(whole, settings={"samples": "x"}).to_json(), b"[]", b"{"]
    damaged.append(whole.to_json().replace(b'"samples": 30', b'"samples": 31'))
    for data in damaged:
        store.put(key, data)
        caplog.clear()
        assert own_eval(store, manifest) == OWN
        assert store.uri(key) in caplog.text
    older = dataclasses.replace(manifest, science={})
    assert own_eval(store, older) is None


@pytest.mark.slow
def test_what_is_measured_is_read_and_not_measured_again(place, tmp_path):
    said: list[str] = []
    (report,) = evaluate_checkpoints(config(place, output=str(tmp_path)), report=said.append)
    (file,) = tmp_path.rglob("report.json")
    assert str(file) in said[0]
    assert (file.parent / "grid.png").is_file()
    other = dataclasses.replace(report, network_evaluations=-1.0)
    file.write_bytes(other.to_json())
    assert evaluate_checkpoints(config(place, output=str(tmp_path)), report=quiet) == [other]
    other = evaluate_checkpoints(config(place, output=str(tmp_path), seed=2), report=quiet)
    assert other[0].distances != report.distances
    assert CheckpointReport.from_json(report.to_json()) == report


@pytest.mark.slow
def test_a_report_that_cannot_be_believed_is_put_aside_and_measured_again(place, tmp_path, caplog):
    (report,) = evaluate_checkpoints(config(place, output=str(tmp_path)), report=quiet)
    (file,) = tmp_path.rglob("report.json")
    whole = file.read_bytes()
    distance = f'"frechet": {report.distances[0].frechet}'.encode()
    without_checksum = {k: v for k, v in json.loads(whole).items() if k != "sha256"}
    elsewhere = dataclasses.replace(report, images=100)
    damaged = (
        whole.replace(distance, b'"frechet": 0.0001'),
        whole[:-5],
        b"[" * 100_000,
        json.dumps(without_checksum).encode(),
        elsewhere.to_json(),
    )
    for number, data in enumerate(damaged):
        assert data != whole
        file.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = evaluate_checkpoints(config(place, output=str(tmp_path)), report=quiet)
        assert again == [report]
        assert file.read_bytes() == whole
        # Trackers of other tests may still be trying, in threads of their own.
        own = [record for record in caplog.records if record.threadName == "MainThread"]
        (line,) = (record.getMessage() for record in own)
        assert line.startswith(f"{file} cannot be believed: ")
        aside = file.with_name(f"report.json.damaged-{number}" if number else "report.json.damaged")
        assert aside.read_bytes() == data
        assert line.endswith(f"it is kept as {aside.name} and made again")


@pytest.mark.slow
def test_figures_that_cannot_be_written_are_shown(place, tmp_path, capsys):
    words = [f"checkpoint={place}/runs/small", f"home={place}/home", "device=cpu"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        code = main([*words, f"output={tmp_path}/full", "seed=77"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    written = capsys.readouterr()
    assert code == 1
    assert "Traceback" not in written.err
    assert f"could not be written: Cannot write {tmp_path}/full/small/evaluation" in written.err
    assert "output=FOLDER writes reports elsewhere" in written.err
    shown = written.out.splitlines()[-1].split()
    (again,) = evaluate_checkpoints(
        config(place, output=str(tmp_path / "results"), seed=77), report=quiet
    )
    assert f"{again.distances[0].frechet:.4f}" in shown
