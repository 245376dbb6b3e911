"""What is written for Kubernetes, Slurm and AWS: it holds what the job needs, and is taken."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.manifests.deployment import Deployment
from tests.house.measures import PACKAGES
from tests.support.job import ROOT
from tests.support.kuberay import (
    IMAGE,
    JOBS,
    OPTIONS,
    STORED,
    all_manifests,
    check,
    check_template,
    strict,
    written,
)
from trainer.cli.manifests import main

KUBERAY = ("kuberay", "--image", IMAGE)
CLAIMED = (*KUBERAY, "--claim", "shared")
AWS = (
    *("aws", "--image", IMAGE, "--region", "us-east-1", "--instance", "p5.48xlarge"),
    *("--ami", "ami-0123456789", "--profile", "lapflow"),
)
EIGHT_NODES = (*JOBS[0], *STORED)


@pytest.mark.slow
def test_every_manifest_has_fields_that_kuberay_takes():
    seen = [check(manifest) for _, manifest in all_manifests()]
    assert len(seen) == 2 * len(JOBS) == 2 * len(OPTIONS)


def test_a_field_that_does_not_exist_is_noticed():
    """By the strict model, and by a CRD's schema made strict."""
    manifest = yaml.safe_load(written(*KUBERAY, *EIGHT_NODES))
    manifest["spec"]["rayClusterSpec"]["authOption"] = {"mode": "token"}
    with pytest.raises(jsonschema.ValidationError, match="authOption"):
        check(manifest)
    loose = {"type": "object", "properties": {"a": {"properties": {"b": {"type": "string"}}}}}
    wrong = {"a": {"b": "c", "d": 1}}
    jsonschema.validate(wrong, loose)
    with pytest.raises(jsonschema.ValidationError, match="'d'"):
        jsonschema.validate(wrong, strict(loose))


@pytest.mark.parametrize(
    ("place", "field", "value"),
    [
        ("spec", "terminationGracePeriod", 30),
        ("spec", "terminationGracePeriodSeconds", "30"),
        ("container", "imagePullPolicies", "Always"),
        ("container", "env", [{"name": 3, "value": "x"}]),
        ("volume", "persistentVolumeClaim", {"name": "shared"}),
    ],
)
def test_what_kubernetes_would_not_take_is_noticed(place, field, value):
    """By its own schemas, without our model of the fields."""
    cluster = yaml.safe_load(written(*CLAIMED, *EIGHT_NODES))["spec"]["rayClusterSpec"]
    template = cluster["headGroupSpec"]["template"]
    check_template(template)
    pod = template["spec"]
    {"spec": pod, "container": pod["containers"][0], "volume": pod["volumes"][-1]}[place][field] = (
        value
    )
    with pytest.raises(kubernetes_validate.ValidationError):
        check_template(template)


def test_what_the_operator_refuses_is_noticed():
    manifest = yaml.safe_load(written(*KUBERAY, *EIGHT_NODES))
    check(manifest)
    for change in (
        {"shutdownAfterJobFinishes": True},
        {"suspend": True},
        {"runtimeEnvYAML": "env_vars: 3"},
    ):
        changed = copy.deepcopy(manifest)
        changed["spec"].update(change)
        with pytest.raises(AssertionError):
            check(changed)


def test_counts_and_times_follow_from_the_job():
    manifest = yaml.safe_load(written(*KUBERAY, *EIGHT_NODES, "checkpoint.grace_s=300"))
    spec = manifest["spec"]
    assert spec["entrypoint"].startswith(
        "python -m trainer.launch +exp=imagenet_xl cluster=h100_8x8"
    )
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["rayStartParams"]) == (8, {"num-cpus": "96", "num-gpus": "8"})
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container["resources"]["limits"]["memory"] == "1674Gi"  # nine tenths of the host's
    variables = {each["name"]: each["value"] for each in container["env"]}
    drain = int(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 300 < drain == int(variables["RAY_JOB_STOP_WAIT_TIME_S"])
    assert pod["terminationGracePeriodSeconds"] > drain
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == {
        "RAY_JOB_STOP_WAIT_TIME_S": str(drain)
    }


def test_queues_are_labels():
    kueue = yaml.safe_load(written(*KUBERAY, *OPTIONS[1], *EIGHT_NODES))
    assert kueue["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    assert kueue["spec"]["suspend"] is True
    volcano = yaml.safe_load(written(*KUBERAY, *OPTIONS[2], *EIGHT_NODES))
    assert volcano["metadata"]["labels"] == {
        "ray.io/scheduler-name": "volcano",
        "volcano.sh/queue-name": "research",
    }
    assert "suspend" not in volcano["spec"]


@pytest.mark.parametrize(
    ("workers", "nodes", "per_node"), [(1, 1, 1), (8, 1, 8), (9, 2, 5), (64, 8, 8)]
)
def test_ranks_of_a_node(workers, nodes, per_node):
    job = Deployment(
        run="Run/1",
        command=("true",),
        nodes=nodes,
        workers=workers,
        cpus_per_worker=3,
        gpus_per_worker=1,
        memory_gib=None,
        stop_grace_s=1,
        ray="2.60.0",
    )
    assert job.workers_per_node == per_node
    assert (job.cpus_per_node, job.gpus_per_node) == (3 * per_node, per_node)
    assert job.name == "run-1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*KUBERAY, *JOBS[0]), "store.uri is None, which lies on one node"),
        ((*KUBERAY, *JOBS[0], "store.uri=/shared/a", STORED[1]), "store.uri is /shared/a"),
        ((*KUBERAY, *JOBS[0], STORED[0]), "tracking.uri is None"),
        ((*CLAIMED, *JOBS[0], "store.uri=/shared-more/a", STORED[1]), "store.uri is /shared-m"),
        ((*CLAIMED, *JOBS[0], "store.uri=/shared/../a", STORED[1]), "store.uri is /a, which"),
        ((*KUBERAY, *EIGHT_NODES, "--queue", "slurm:a"), "kueue:NAME or volcano:NAME"),
        ((*KUBERAY, *EIGHT_NODES, "--redis-secret", "a"), "--redis HOST:PORT"),
        ((*KUBERAY, *EIGHT_NODES, "--secret", "a b"), "--secret is 'a b'"),
        (("kuberay", "--image", "https://a/b", *EIGHT_NODES), "which is no image"),
        (("slurm", *EIGHT_NODES, "--time", "a day"), "--time is 'a day'"),
        (("slurm", *EIGHT_NODES, "--activate", "a\nb"), "one line"),
        (("slurm", "+exp=digits", "train.total_images=-1"), "train.total_images=-1"),
        (("container", "+exp=digits"), "container takes no settings"),
    ],
)
def test_what_cannot_run_there_is_refused(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("memory", ["nan", "-3", "0", "inf"])
def test_memory_of_a_node_is_a_number(memory, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*KUBERAY, f"--memory={memory}", *EIGHT_NODES])
    assert f"{memory} is no memory of a node" in capsys.readouterr().err


def test_a_folder_that_all_pods_mount_is_a_store():
    shared = ("store.uri=/shared/store", "tracking.uri=http://mlflow:5000")
    manifest = yaml.safe_load(written(*KUBERAY, "--claim", "shared", *JOBS[0], *shared))
    check(manifest)
    pod = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "shared", "mountPath": "/shared"} in pod["containers"][0]["volumeMounts"]


@pytest.mark.slow
@pytest.mark.parametrize(("job", "more"), [(JOBS[0], ("--spot",)), (JOBS[2], ()), (JOBS[3], ())])
def test_ray_and_aws_take_the_cluster_file(job, more):
    """Ray's own check of it, and AWS's own model of what a node is started with."""
    import botocore.session
    from botocore.validate import ParamValidator
    from ray.autoscaler._private.util import prepare_config, validate_config

    values = yaml.safe_load(written(*AWS, *more, *job, *STORED))
    validate_config(prepare_config(copy.deepcopy(values)))
    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    for kind in values["available_node_types"].values():
        node = {"MinCount": 1, "MaxCount": 1, **kind["node_config"]}
        assert ParamValidator().validate(node, shape).generate_report() == ""
    worker = values["available_node_types"]["worker"]
    assert worker["min_workers"] == worker["max_workers"] == values["max_workers"]
    assert ("InstanceMarketOptions" in worker["node_config"]) == bool(more)
    head, worker = values["head_start_ray_commands"], values["worker_start_ray_commands"]
    starts = [*head[1:], *worker[1:]]
    assert all("RAY_AUTH_MODE=token" in start for start in starts)
    assert "0.0.0.0" not in " ".join(starts)
    watches = [each for each in starts if "-m cluster.spot_notice" in each]
    assert len(watches) == bool(more)
    # Nothing that looks as if SIGTERM were heard in a container of Ray's launcher.
    assert "DRAIN" not in " ".join(starts)
    assert "stop-timeout" not in " ".join(values["docker"]["run_options"])


def test_the_watch_for_a_spot_notice_outlives_the_terminal_that_starts_it(tmp_path):
    """By the shell of Ray's launcher, which closes once the command has returned; and it is one."""
    from ray.autoscaler._private.command_runner import _with_interactive

    from cluster.manifests.aws import _WATCH

    log, lock = tmp_path / "log", tmp_path / "lock"
    (python := tmp_path / "python").write_text('#!/bin/sh\necho "$$ $PWD $@"\nexec sleep 600\n')
    python.chmod(0o755)
    command = _WATCH.replace("/opt/lapflow", str(tmp_path))
    command = command.replace("/tmp/spot_notice.lock", str(lock))
    command = command.replace("/tmp/spot_notice.log", str(log))
    # Its own profile would have it find another Python.
    words = " ".join(_with_interactive(command)).replace("--login", "--norc")
    terminal = f"import pty; pty.spawn(['sh', '-c', {words!r}])"
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment["HOME"] = str(tmp_path)
    (tmp_path / ".bashrc").touch()
    begin = [sys.executable, "-c", terminal]
    for _ in range(2):
        subprocess.run(begin, env=environment, check=True, capture_output=True, timeout=60)
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ((pid, *said),) = map(str.split, log.read_text().splitlines())
    try:
        assert said == [str(tmp_path), "-m", "cluster.spot_notice"]
        assert os.getsid(int(pid)) != os.getsid(0)
        os.kill(int(pid), 0)
    finally:
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("named", ["", "/mine.tar"])
def test_every_change_is_held_against_kuberays_schemas_that_are_named(tmp_path, named):
    """By `.ci/run`, of which all that takes long is stood in for."""
    project, said = tmp_path / "project", tmp_path / "said"
    (project / ".ci").mkdir(parents=True)
    (project / ".ci/run").write_text((ROOT / ".ci/run").read_text())
    python, make = project / ".venv/bin/python", tmp_path / "bin/make"
    for command in (python, make):
        command.parent.mkdir(parents=True)
        command.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
        command.chmod(0o755)
    environment = {"PATH": f"{make.parent}{os.pathsep}{os.environ['PATH']}"}
    if named:
        environment["KUBERAY_CRDS"] = named
    subprocess.run(["bash", project / ".ci/run"], env=environment, check=True)
    assert said.read_text().splitlines() == [
        "check",
        f"-m tests.support.kuberay {named}",
        "test",
    ]


def test_the_container_file_is_for_this_project():
    text = written("container")
    python = re.search(r"FROM python:(3\.\d+)", text)
    assert python is not None
    assert f"CPython {python[1]}" in (ROOT / "constraints.txt").read_text()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in names)
    assert {*PACKAGES, "configs", "install", "install.sh", "pyproject.toml"} <= names
    assert re.search(r"^USER 1000$", text, re.MULTILINE)
    assert "RAY_AUTH_MODE=token" in text


def test_an_answer_for_programs_has_the_whole_text(capsys):
    assert main(["slurm", "--json", *EIGHT_NODES]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["manifest"].startswith("#!/usr/bin/env bash\n")


# Stands for Slurm and Ray: each says what it was asked for, and does as the real ones would.
STUBS = {
    "scontrol": """
        if [ "$1" = show ]; then echo node-a; echo node-b; else echo "scontrol $*" >> "$SAID"; fi
    """,
    "srun": """
        for word; do case $word in
            --nodelist=*) export STUB_NODE=${word#*=};;
            -*) ;;
            *) break;;
        esac; shift; done
        exec "$@"
    """,
    "hostname": """
        case $STUB_NODE in
            node-a) echo "::1 fe80::1%eth0 127.0.1.1 10.0.0.1 ";;
            *) echo "${ADDRESS_B:-10.0.0.2}";;
        esac
    """,
    "ray": """
        echo "$STUB_NODE ray $* token $(cat $RAY_AUTH_TOKEN_PATH | wc -c)" >> "$SAID"
        trap 'echo "$STUB_NODE ray ended" >> "$SAID"; exit 0' TERM
        while :; do sleep 0.05; done
    """,
    "python": """
        case $1 in
            -c) printf %064d 7;;
            -) cat > /dev/null; echo "waited for $3" >> "$SAID"; sleep 0.2;;
            -m)
                trap 'echo "driver asked to stop" >> "$SAID"; sleep 0.3; exit 143' TERM
                echo "driver $*" >> "$SAID"
                [ -z "$ENDS" ] || exit "$ENDS"
                while :; do sleep 0.05; done;;
        esac
    """,
}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a batch script on two nodes."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (stubs / name).chmod(0o755)
    (tmp_path / "scratch").mkdir()
    return {
        "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}",
        "SAID": str(tmp_path / "said"),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_TMPDIR": str(tmp_path / "scratch"),
        "USER": "me",
        "ENDS": "",
    }


def script(*more: str) -> str:
    return written("slurm", "--activate", ":", *more, *JOBS[0], "cluster.workers=16", *STORED)


def run_script(text: str, environment: dict[str, str], place: Path) -> subprocess.Popen[str]:
    (place / "job.sh").write_text(text)
    subprocess.run(["bash", "-n", "job.sh"], cwd=place, check=True)
    return subprocess.Popen(
        ["bash", "job.sh"], cwd=place, env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("code", [0, 3])
def test_a_batch_script_starts_ray_trains_and_ends_as_training_does(slurm, tmp_path, code):
    with run_script(script(), slurm | {"ENDS": str(code)}, tmp_path) as process:
        out = process.communicate()[0]
    assert process.returncode == code, out
    said = (tmp_path / "said").read_text().splitlines()
    head, worker = (next(line for line in said if line.startswith(f"node-{n} ray s")) for n in "ab")
    assert "--node-ip-address=10.0.0.1" in head
    assert "--head --port=20726" in head
    assert "--include-dashboard=false" in head
    assert "--node-ip-address=10.0.0.2" in worker
    assert "--address=10.0.0.1:20726" in worker
    assert all("--num-cpus=96 --num-gpus=8" in line for line in (head, worker))
    assert all(line.endswith("token 64") for line in (head, worker))
    # One node, then both, then training.
    order = [line for line in said if line.startswith(("waited", "driver"))]
    assert order[:2] == ["waited for 1", "waited for 2"]
    assert order[2].startswith("driver -m trainer.launch +exp=imagenet_xl")
    assert order[2].endswith("cluster.address=10.0.0.1:20726")
    assert {line for line in said if line.endswith("ended")} == {
        "node-a ray ended",
        "node-b ray ended",
    }
    assert not any("scontrol" in line for line in said)
    assert list(tmp_path.glob(".lapflow-token*")) == []
    # Logs stay where something went wrong.
    assert (tmp_path / "scratch" / "lapflow-4242").exists() == bool(code)


def test_a_batch_script_starts_nothing_in_a_folder_that_leads_elsewhere(slurm, tmp_path):
    (tmp_path / "scratch" / "lapflow-4242").symlink_to(tmp_path)
    with run_script(script(), slurm | {"ENDS": "0"}, tmp_path) as process:
        process.communicate()
    assert "ray start" not in (tmp_path / "said").read_text()


def test_a_batch_script_names_a_node_that_others_cannot_reach(slurm, tmp_path, capfd):
    alone = slurm | {"ENDS": "0", "ADDRESS_B": "::1 127.0.0.1"}
    with run_script(script(), alone, tmp_path) as process:
        process.communicate()
    assert process.returncode == 1
    told = "error: node-b names no IPv4 address that other nodes reach, but '::1 127.0.0.1'"
    assert told in capfd.readouterr().err
    said = (tmp_path / "said").read_text()
    assert "node-b ray start" not in said
    assert "node-a ray ended" in said


@pytest.mark.slow
@pytest.mark.parametrize("requeue", [True, False])
def test_a_batch_script_that_is_stopped_has_training_save_and_is_queued_again(
    slurm, tmp_path, requeue
):
    with run_script(script(*([] if requeue else ["--no-requeue"])), slurm, tmp_path) as process:
        said = tmp_path / "said"
        while not said.exists() or "driver -m" not in said.read_text():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 143
    lines = said.read_text().splitlines()
    assert lines.count("driver asked to stop") == 1
    assert lines.index("driver asked to stop") < lines.index("node-a ray ended")
    assert ("scontrol requeue 4242" in lines) == requeue
    head = (tmp_path / "job.sh").read_text().split("#SBATCH")[0]
    assert ("scancel JOBID  " in head) == requeue  # who wants it to end is told how
    if requeue:  # Slurm ends what asks for it, so that it is the last
        assert lines[-1] == "scontrol requeue 4242"


def test_directives_of_slurm_follow_from_the_job():
    text = script("--partition", "gpu", "--time", "04:00:00")
    directives = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert "--nodes=2" in directives
    assert "--gpus-per-node=8" in directives
    assert "--signal=B:TERM@150" in directives
    assert "--partition=gpu" in directives
    # All before the first command, or Slurm passes over them.
    assert text.rindex("#SBATCH") < text.index("set -euo")
