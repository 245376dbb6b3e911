"""The batch script for Slurm with real Ray: two nodes, each at a loopback address of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.manifests.deployment import Deployment
from cluster.manifests.slurm import Slurm, batch_script
from tests.support.job import ROOT
from tests.support.ports import free_port

pytestmark = pytest.mark.slow

# Stand for Slurm's commands alone.
STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo node-a; echo node-b; else echo "scontrol $*"; fi',
    "srun": """
        for word; do case $word in
            --nodelist=*) export STUB_NODE=${word#*=};;
            -*) ;;
            *) break;;
        esac; shift; done
        exec "$@"
    """,
    "hostname": "case $STUB_NODE in node-a) echo 127.0.0.2;; *) echo 127.0.0.3;; esac",
    # On one machine both nodes want the same port for their agents, and all of its memory.
    "ray": """
        case "$*" in *--head*) port=PORT-A;; *) port=PORT-B;; esac
        exec RAY "$@" --dashboard-agent-listen-port=$port --object-store-memory=200000000
    """,
}
DRIVES = """
import signal, sys, threading, time
import ray
from cluster.contract import ClusterConfig
from cluster.launcher import run

def work(context, payload):
    node = ray.util.get_node_ip_address()
    context.report({"rank": context.rank, "node": node, "world": context.world_size})
    while payload["waits"] and not context.stop_requested():
        time.sleep(0.05)

if __name__ == "__main__":
    import drives
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    address = sys.argv[-1].removeprefix("cluster.address=")
    outcome = run(
        ClusterConfig(workers=2, gpus_per_worker=0, address=address),
        drives.work,
        {"waits": sys.argv[1] == "waits"},
        on_message=lambda message: print("message", message, flush=True),
        report=lambda line: print(line, flush=True),
        stop=stop,
    )
    sys.exit(143 if outcome.status == "stopped" else 0)
"""


def running_in_session(leader: int) -> list[str]:
    """What a session still runs, but for what is dead and waits to be taken notice of."""
    states = subprocess.run(
        ["ps", "-s", str(leader), "-o", "stat=,args="], capture_output=True, text=True, check=False
    )
    return [line for line in states.stdout.splitlines() if not line.startswith("Z")]


@pytest.mark.parametrize(("how", "code"), [("ends", 0), ("waits", 143)])
def test_ray_runs_on_all_nodes_and_ends_with_the_script(
    tmp_path: Path, how: str, code: int
) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    names = {
        "RAY": str(Path(sys.executable).with_name("ray")),
        "PORT-A": str(free_port()),
        "PORT-B": str(free_port()),
    }
    for name, text in STUBS.items():
        filled = re.sub("RAY|PORT-[AB]", lambda found: names[found[0]], text)
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{filled}\n")
        (bin_folder / name).chmod(0o755)
    (tmp_path / "drives.py").write_text(DRIVES)
    job = Deployment(
        run="slurm",
        command=("python", "drives.py", how),
        nodes=2,
        workers=2,
        cpus_per_worker=1,
        gpus_per_worker=0,
        memory_gib=None,
        stop_grace_s=5,
        ray="",
    )
    (tmp_path / "job.sh").write_text(batch_script(job, Slurm(activate=":")))
    environment = os.environ | {
        "PATH": os.pathsep.join(
            [str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        # Ray puts sockets below it, whose paths may have 107 characters.
        "SLURM_TMPDIR": "/tmp",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "LAPFLOW_HOME": str(tmp_path / "home"),
    }
    with subprocess.Popen(
        ["bash", "job.sh"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if how == "waits" and sum(each.startswith("message") for each in lines) == 2:
                process.send_signal(signal.SIGTERM)
                how = "stopped"
    said = "".join(lines)
    assert process.returncode == code, said
    nodes = set(re.findall(r"'node': '([\d.]+)', 'world': 2", said))
    assert nodes == {"127.0.0.2", "127.0.0.3"}
    assert ("scontrol requeue" in said) == (code == 143)
    # Nothing of it goes on running, and nothing of it lies about.
    while running_in_session(process.pid):
        time.sleep(0.1)
    assert not Path(f"/tmp/lapflow-{os.getpid()}").exists()
    assert list(tmp_path.glob(".lapflow-token*")) == []
