"""Nodes that cannot train together are named, each with its reason; what is scarce is told."""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from cluster.node_check import Judgement, NodeCheck, NodePlace, Sight
from tests.support.ports import free_port
from tests.support.worker_runs import TINY
from trainer.config.composition import compose_job
from trainer.storage.lease import hold_lease
from trainer.storage.local import LocalStore
from trainer.training import builds
from trainer.training import nodes as module
from trainer.training.builds import Build, digest_code
from trainer.training.nodes import (
    NodeReport,
    find_shortages,
    free_scratch,
    judge_nodes,
    look_at_node,
    node_check,
)

GIB = 1 << 30
PLACE = NodePlace(address="10.0.0.1", workers=8, gpus=8)
FIRST = NodeReport(
    host="gpu-1",
    device="8 x NVIDIA H100",
    memory_bytes=500 * GIB,
    shared_bytes=64 * GIB,
    cache_bytes=900 * GIB,
    scratch_bytes=90 * GIB,
    interface="eth0",
    name_s=0.0,
    code="a" * 64,
    versions={"python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0"},
)
SECOND = replace(FIRST, host="gpu-2")
LAUNCH = Build(code=FIRST.code, versions=FIRST.versions)


def judge(*reports: NodeReport | Sight, launch: Build = LAUNCH) -> Judgement:
    """Judge what nodes 0, 1, … tell; each is to reach the one before."""
    return judge_nodes(
        [
            one
            if isinstance(one, Sight)
            else Sight(
                node=str(number), place=PLACE, report=asdict(one), peer=str(max(0, number - 1))
            )
            for number, one in enumerate(reports)
        ],
        launch=launch,
    )


def shortages(report: NodeReport, *, ahead_s: float = 0.0, **place: int) -> list[str]:
    place_ = replace(PLACE, **place)
    return find_shortages(report, Sight(node="0", place=place_, report=None, ahead_s=ahead_s))


def test_equal_nodes_have_no_faults_and_lack_nothing() -> None:
    judgement = judge(FIRST, SECOND)
    assert judgement.unfit == {}
    assert judgement.warnings == {"0": (), "1": ()}


def test_every_node_is_named_with_every_reason() -> None:
    unfit = judge(
        FIRST,
        replace(SECOND, code="b" * 64),
        replace(FIRST, host="gpu-3", versions={"python": "3.11.9", "torch": "2.12.1"}),
        replace(FIRST, host="gpu-4", faults=("the cache folder /c cannot be made",)),
        Sight(node="4", place=replace(PLACE, address="10.0.0.5"), report=None, error="it is mute"),
    ).unfit
    assert set(unfit) == {"1", "2", "3", "4"}
    (code,) = unfit["1"]
    assert code.startswith("gpu-2: its code is another than that of the launch")
    (versions,) = unfit["2"]
    assert versions.startswith(
        "gpu-3: it has ray missing (not 2.60.0), torch 2.12.1 (not 2.13.0) as the launch has"
    )
    assert unfit["3"] == ("gpu-4: the cache folder /c cannot be made",)
    assert unfit["4"] == ("10.0.0.5: it is mute",)


def test_nodes_are_held_against_the_launch_and_not_against_whichever_of_them_is_first() -> None:
    odd = replace(FIRST, host="odd", code="b" * 64, versions={**FIRST.versions, "torch": "2.12.1"})
    judgement = judge(odd, SECOND, replace(FIRST, host="gpu-3"))
    assert set(judgement.unfit) == {"0"}
    code, versions = judgement.unfit["0"]
    assert code.startswith("odd: its code is another than that of the launch")
    assert versions.startswith("odd: it has torch 2.12.1 (not 2.13.0) as the launch has")
    newer = Build(code="c" * 64, versions=FIRST.versions)
    assert set(judge(FIRST, SECOND, launch=newer).unfit) == {"0", "1"}


def test_in_packages_that_the_launch_does_without_nodes_agree_with_each_other() -> None:
    """As a head without GPUs does without DALI."""
    dali = {**FIRST.versions, "nvidia-dali-cuda130": "2.0"}
    with_dali = replace(FIRST, versions=dali)
    assert judge(with_dali, replace(with_dali, host="gpu-2")).unfit == {}
    (other,) = judge(with_dali, SECOND).unfit["1"]
    assert other.startswith("gpu-2: it has nvidia-dali-cuda130 missing (not 2.0) as gpu-1 has")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("change", ["more", "less"])
def test_a_node_whose_code_tells_other_things_of_itself_has_other_code(
    place: int, change: str
) -> None:
    told = {**asdict(replace(FIRST, host="gpu-3")), "colour": "red"}
    if change == "less":
        del told["colour"], told["name_s"]
    other = Sight(node=str(place), place=PLACE, report=told)
    known: list[NodeReport | Sight] = [FIRST, SECOND]
    judgement = judge(*known[:place], other, *known[place:])
    assert set(judgement.unfit) == {str(place)}
    (code,) = judgement.unfit[str(place)]
    assert code.startswith("gpu-3: its code is another than that of the launch; bring both to the")
    assert "gpu-3" not in judgement.table


def test_who_does_not_reach_another_is_unfit_unless_that_one_is_mute() -> None:
    cut_off = replace(SECOND, reaches_peer=False)
    (fault,) = judge(FIRST, cut_off).unfit["1"]
    assert fault.startswith("gpu-2: it does not reach gpu-1 at ")
    mute = Sight(node="0", place=PLACE, report=None, error="it is mute")
    assert set(judge(mute, cut_off).unfit) == {"0"}


def test_a_node_without_the_folder_of_temporary_files_has_its_own(tmp_path: Path) -> None:
    assert free_scratch(str(tmp_path)) > 0
    assert free_scratch(str(tmp_path / "of the driver alone")) > 0
    assert free_scratch(None) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory_bytes": 7 * GIB}, "gpu-1 has only 896 MiB left of its memory for each worker"),
        ({"cache_bytes": 5}, "gpu-1 has only 5 B left of its disk of the cache"),
        ({"scratch_bytes": 5}, "gpu-1 has only 5 B left of its disk of temporary files"),
        ({"shared_bytes": 64 << 20}, "gpu-1 has only 64.0 MiB left of its /dev/shm"),
        ({"warnings": ("it is slow",)}, "gpu-1: it is slow"),
        ({"name_s": 5.0}, "gpu-1 takes 5.0 s to look its own name up; put it into /etc/hosts"),
    ],
)
def test_what_is_scarce_is_told(change: dict[str, Any], words: str) -> None:
    assert shortages(replace(FIRST, **change)) == [words]
    assert judge(SECOND, replace(FIRST, **change)).warnings == {"0": (), "1": (words,)}


def test_workers_on_processors_need_no_shared_memory() -> None:
    assert shortages(replace(FIRST, shared_bytes=0), gpus=0) == []
    assert shortages(replace(FIRST, shared_bytes=0), gpus=1, workers=1) == []


def test_a_clock_that_is_far_off_is_told() -> None:
    (text,) = shortages(SECOND, ahead_s=-100)
    assert text.startswith("the clock of gpu-2 is -100 s from that of the launch")
    assert shortages(SECOND, ahead_s=3) == []


def test_the_table_has_a_line_for_each_node_that_answered() -> None:
    late = Sight(node="1", place=PLACE, report=asdict(replace(SECOND, interface="")), ahead_s=2.04)
    mute = Sight(node="2", place=PLACE, report=None, error="it is mute")
    head, first, second = judge(FIRST, late, mute).table.splitlines()
    assert head.split()[:3] == ["node", "room", "device"]
    shown = " ".join(first.split())
    assert shown == "gpu-1 8 8 x NVIDIA H100 500 GiB 64.0 GiB 900 GiB 90.0 GiB eth0 +0.0 s"
    assert second.split()[-3:] == ["-", "+2.0", "s"]


@pytest.fixture
def check(tmp_path: Path) -> Iterator[NodeCheck]:
    """What is looked for on the nodes of a run whose home is tmp_path/home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/mlflow.db").touch()
    job = compose_job([*TINY, f"home={tmp_path / 'home'}", "run=night-1"])
    store = LocalStore(tmp_path / "home/store/runs")
    with hold_lease(store, "night-1", report=print, on_lost=print) as lease:
        yield node_check(job, lease)


def look(check: NodeCheck, place: NodePlace | None = None, **payload: Any) -> NodeReport:
    place = place or NodePlace(address="127.0.0.1", workers=1, gpus=0)
    return NodeReport(**look_at_node(place, {**check.payload, **payload}))


def test_a_node_that_sees_all_is_fit_and_leaves_nothing(check: NodeCheck, tmp_path: Path) -> None:
    before = sorted((tmp_path / "home/store").rglob("*"))
    report = look(check)
    assert (report.faults, report.warnings, report.device) == ((), (), "cpu")
    assert min(report.memory_bytes, report.cache_bytes, report.scratch_bytes) > 0
    assert report.interface == "lo"
    assert report.versions["torch"]
    assert sorted((tmp_path / "home/store").rglob("*")) == before


def test_a_node_that_sees_another_store_says_so(check: NodeCheck, tmp_path: Path) -> None:
    (fault,) = look(check, runs=str(tmp_path / "another")).faults
    assert "holds no trace of this launch of run=night-1" in fault
    assert fault.endswith("Give all nodes the same store.uri, on S3 or in a shared folder")


def test_a_store_that_does_not_answer_is_named_soon(check: NodeCheck) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    store = {**check.payload["store"], "endpoint_url": url, "anonymous": True}
    (fault,) = look(check, store=store, runs="s3://bucket/runs").faults
    assert url in fault


@pytest.mark.parametrize("is_there", [False, True])
def test_a_tracker_in_a_file_of_another_machine_is_a_fault(
    check: NodeCheck, tmp_path: Path, is_there: bool
) -> None:
    file = tmp_path / "home/mlflow.db"
    if is_there:  # beside the first, whose number it could get otherwise
        file.with_name("other.db").touch()
        file.with_name("other.db").rename(file)
    else:
        file.unlink()
    (fault,) = look(check).faults
    assert f"MLflow's file sqlite:///{file} is one of the machine where the run" in fault
    assert f"{'another' if is_there else 'not there'} here: give an MLflow server" in fault


def test_a_tracking_server_that_is_away_is_a_fault_if_it_is_required(check: NodeCheck) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    tracking = {**check.payload["tracking"], "uri": uri}
    (fault,) = look(check, tracking=tracking, tracker_file=None).faults
    assert fault.startswith(f"MLflow at tracking.uri={uri} is not reached (")
    tolerant = look(check, tracking={**tracking, "required": False}, tracker_file=None)
    assert tolerant.faults == ()
    assert tolerant.warnings[0].startswith(f"MLflow at tracking.uri={uri} is not reached (")


@contextmanager
def answering(*statuses: int, certificate: Path | None = None) -> Iterator[str]:
    """Answer one request after the other so, the rest as the last; gives the address.

    By TLS if there is a certificate.
    """
    left = list(statuses)

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(left.pop(0) if len(left) > 1 else left[0])
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"{'http' if certificate is None else 'https'}://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a certificate that nobody knows, for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    file.write_bytes(
        made.public_bytes(Encoding.PEM)
        + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return file


def faults_of_tracker(check: NodeCheck, uri: str) -> tuple[str, ...]:
    """What is amiss with the server of a run that does not go without one."""
    tracking = {**check.payload["tracking"], "uri": uri, "required": True}
    report = look(check, tracking=tracking, tracker_file=None)
    assert report.warnings == ()
    return report.faults


@pytest.mark.parametrize("status", [200, 401, 404, 500])
def test_a_tracking_server_is_there_whatever_it_answers(check: NodeCheck, status: int) -> None:
    with answering(status) as uri:
        assert faults_of_tracker(check, uri) == ()


@pytest.mark.parametrize("status", [407, 502, 503, 504])
def test_a_proxy_that_finds_no_tracking_server_is_none(
    check: NodeCheck, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TRY_AGAIN_S", 0.0)
    with answering(status) as uri:
        (fault,) = faults_of_tracker(check, uri)
    assert fault.startswith(f"MLflow at tracking.uri={uri} is not reached ({status} ")


def test_a_tracking_server_that_starts_again_behind_its_proxy_is_there(
    check: NodeCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TRY_AGAIN_S", 0.0)
    with answering(502, 503, 200) as uri:
        assert faults_of_tracker(check, uri) == ()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("REQUESTS_CA_BUNDLE", "{certificate}"),
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", "{certificate}"),
        ("MLFLOW_TRACKING_INSECURE_TLS", "true"),
        ("MLFLOW_TRACKING_INSECURE_TLS", "false"),
    ],
)
@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_tracking_server_is_trusted_as_by_mlflows_client(
    check: NodeCheck,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
) -> None:
    monkeypatch.setenv(variable, value.format(certificate=certificate))
    with answering(200, certificate=certificate) as uri:
        faults = faults_of_tracker(check, uri)
    assert ["CERTIFICATE_VERIFY_FAILED" in fault for fault in faults] == [True] * (value == "false")


def test_a_cache_that_cannot_be_made_is_a_fault(check: NodeCheck, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = look(check, cache=str(tmp_path / "file/cache"))
    (fault,) = report.faults
    assert fault.startswith(f"the cache folder {tmp_path}/file/cache cannot be made: ")
    assert report.cache_bytes == 0


@pytest.mark.parametrize(
    ("variable", "value", "is_fault"),
    [
        ("GLOO_SOCKET_IFNAME", "eth77", True),
        ("GLOO_SOCKET_IFNAME", "l", True),
        ("GLOO_SOCKET_IFNAME", "lo", False),
        ("NCCL_SOCKET_IFNAME", "l", False),
        ("NCCL_SOCKET_IFNAME", "eth77,lo", False),
        ("NCCL_SOCKET_IFNAME", "=l", True),
        ("NCCL_SOCKET_IFNAME", "^lo", False),
    ],
)
def test_an_interface_that_is_not_there_is_a_fault(
    check: NodeCheck, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, is_fault: bool
) -> None:
    monkeypatch.setenv(variable, value)
    faults = look(check).faults
    assert bool(faults) == is_fault
    if is_fault:
        assert faults[0].startswith(f"{variable}={value} names no network interface that it has (")


@pytest.mark.parametrize(
    ("script", "device", "fault"),
    [
        ("echo NVIDIA H100; echo NVIDIA H100", "2 x NVIDIA H100", None),
        ("echo NVIDIA H100", "1 x NVIDIA H100", "2 GPUs are wanted there, and its driver shows 1:"),
        ("echo it failed; exit 9", "no GPU", "its driver shows 0 (it failed): look at nvidia-smi"),
        (None, "2 GPUs", None),
    ],
)
def test_the_gpus_are_counted_where_there_is_nvidia_smi(
    check: NodeCheck,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str | None,
    device: str,
    fault: str | None,
) -> None:
    (tmp_path / "bin").mkdir()
    if script is not None:
        program = tmp_path / "bin/nvidia-smi"
        program.write_text(f"#!{shutil.which('sh')}\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    report = look(check, NodePlace(address="127.0.0.1", workers=2, gpus=2))
    assert report.device == device
    assert len(report.faults) == (fault is not None)
    assert fault is None or fault in report.faults[0]


def test_what_answers_late_on_a_node_is_asked_at_once(
    check: NodeCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow answers once the driver is being asked, and the driver once MLflow is."""
    driver_asked, mlflow_asked = tmp_path / "driver", tmp_path / "mlflow"

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mlflow_asked.touch()
            while not driver_asked.exists():
                time.sleep(0.05)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/nvidia-smi"
    script = f"touch {driver_asked}; until [ -e {mlflow_asked} ]; do sleep 0.05; done; echo A GPU"
    program.write_text(f"#!{shutil.which('sh')}\nPATH={os.environ['PATH']}\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(module, "_ANSWER_S", 60.0)
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        tracking = {**check.payload["tracking"], "uri": uri, "required": True}
        place = NodePlace(address="127.0.0.1", workers=1, gpus=1)
        report = look(check, place, tracking=tracking, tracker_file=None)
        server.shutdown()
    assert (report.device, report.faults) == ("1 x A GPU", ())


def test_a_door_that_is_closed_is_not_reached(check: NodeCheck) -> None:
    closed = NodePlace(address="127.0.0.1", workers=1, gpus=0, peer=f"127.0.0.1:{free_port()}")
    assert not look(check, closed).reaches_peer


def test_a_node_looks_without_torch() -> None:
    """It would take longer to load than all else."""
    words = "import sys, trainer.training.nodes; print({'torch', 'mlflow', 'ray'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", words],
        cwd=Path(module.__file__).parents[2],
        env={**os.environ},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"


def test_the_digest_is_that_of_the_code_and_of_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(builds.__file__).parents[2]
    for package in ("cluster", "models", "pipelines", "trainer"):
        shutil.copytree(root / package, tmp_path / package)
    monkeypatch.setattr(builds, "__file__", str(tmp_path / "trainer/training/builds.py"))
    before = digest_code()
    assert len(before) == hashlib.sha256().digest_size * 2
    (tmp_path / "trainer/__pycache__").mkdir(exist_ok=True)
    (tmp_path / "trainer/__pycache__/rng.pyc").write_bytes(b"compiled")
    assert digest_code() == before
    (tmp_path / "models/axes.py").write_text("'''other'''\n")
    changed = digest_code()
    assert changed != before
    (tmp_path / "models/axes.py").rename(tmp_path / "models/axis.py")
    assert digest_code() not in (before, changed)
