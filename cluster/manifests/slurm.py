"""Slurm: a batch script that starts Ray by srun on the nodes of its job, and trains."""

import re
import shlex
from dataclasses import dataclass

from cluster.manifests.deployment import Deployment, ManifestError, check_name

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED")

_SCRIPT = """\
#!/usr/bin/env bash
# {run}: {nodes} node(s) with {workers} workers, by python -m cluster.manifests.
#   sbatch FILE                               in the project's folder, which all nodes share
#   scancel --batch --signal=TERM JOBID       saves a last checkpoint; plain scancel does not
{end_for_good}{directives}
set -euo pipefail

# Ray of this job alone: a token, ports and folders of its own. Nothing here ends others' Ray.
scratch=${{SLURM_TMPDIR:-/tmp}}/lapflow-$SLURM_JOB_ID
token=$PWD/.lapflow-token-$SLURM_JOB_ID
port=$((20000 + SLURM_JOB_ID % 4000 * 3))
{activate}
trap 'rm -f "$token"' EXIT
(umask 077; python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
{exports}
# Shards that a node has fetched stay for the next job.
export LAPFLOW_HOME=${{LAPFLOW_HOME:-${{SLURM_TMPDIR:-/tmp}}/lapflow-$(id -un)}}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
step=(srun --overlap --ntasks=1 --nodes=1 --kill-on-bad-exit=0)

address_of() {{  # address_of NODE: one of IPv4 that other nodes reach; Ray takes HOST:PORT
    local all
    all=$("${{step[@]}}" --nodelist="$1" hostname --ip-address)
    tr ' ' '\\n' <<< "$all" | grep -m1 -v -e : -e '^127\\.0\\.[01]\\.1$' -e '^$' || {{
        echo "error: $1 names no IPv4 address that other nodes reach, but '$all'" \\
            "(hostname --ip-address); give its name one in DNS or /etc/hosts" >&2
        return 1
    }}
}}

pids=()
finish() {{
    local code=$? pid node
    trap - EXIT
    for pid in "${{pids[@]}}"; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in "${{pids[@]}}"; do wait "$pid" 2>/dev/null || true; done
    rm -f "$token"
    if [ "$code" = 0 ] || [ "$code" = 143 ]; then
        for node in "${{nodes[@]}}"; do
            "${{step[@]}}" --nodelist="$node" rm -rf "$scratch" || true
        done
    else
        echo "Ray's logs are in $scratch of each node"
    fi
{requeue}    exit "$code"
}}
stopped=
trap finish EXIT

# Everybody may make folders in /tmp, also one that this job is about to make.
own_folder='
    mkdir -pm 700 "$1"
    if [ ! -O "$1" ] || [ -L "$1" ]; then echo "error: $1 belongs to another user" >&2; exit 1; fi
    chmod 700 "$1"
    shift
    exec "$@"'
start() {{  # start NODE ROLE…: Ray on one node, as long as this script lives
    local node=$1 address
    address=$(address_of "$node")
    shift
    "${{step[@]}}" --nodelist="$node" --cpus-per-task={cpus}{step_gpus} \\
        bash -c "$own_folder" - "$scratch" \\
        ray start --block --disable-usage-stats --node-ip-address="$address" \\
        --num-cpus={cpus} --num-gpus={gpus} --temp-dir="$scratch/ray" \\
        --dashboard-agent-listen-port="$((port + 1))" "$@" &
    pids+=($!)
}}

wait_for() {{  # wait_for N: until so many nodes are up
    python - "$head:$port" "$1" {start_timeout} <<'PYTHON'
import sys, time
import ray
address, wanted, deadline = sys.argv[1], int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
found, reason = 0, ""
while found < wanted:
    if time.monotonic() > deadline:
        sys.exit(
            f"error: {{found}} of {{wanted}} nodes are up after {{sys.argv[3]}} s: `ray start` has "
            f"said why above; a node too busy to start in 30 s is one reason. {{reason}}"
        )
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        found = sum(node["Alive"] for node in ray.nodes())
    except Exception as error:
        reason = str(error)
    finally:
        ray.shutdown()
    time.sleep(1)
PYTHON
}}

head=$(address_of "${{nodes[0]}}")
start "${{nodes[0]}}" --head --port="$port" --ray-client-server-port="$((port + 2))" \\
    --include-dashboard=false
wait_for 1
for node in "${{nodes[@]:1}}"; do start "$node" --address="$head:$port"; done
wait_for {nodes}

# Slurm's signal before the limit, and scancel's to this script, reach training alone.
stop() {{ stopped=yes; kill -TERM "$driver" 2>/dev/null || true; }}
{command} "cluster.address=$head:$port" &
driver=$!
trap stop TERM
code=0
wait "$driver" || code=$?  # a signal ends the waiting, not the training
while kill -0 "$driver" 2>/dev/null; do code=0; wait "$driver" || code=$?; done
trap - TERM
last=0
wait "$driver" 2>/dev/null || last=$?
[ "$last" = 127 ] || code=$last  # 127: it was told before
echo "exit code $code"
exit "$code"
"""
_END_FOR_GOOD = """\
#   scancel JOBID                             after that, or the job is queued again and goes on
"""
_REQUEUE = """\
    # Stopped with its state saved: it goes on when it is scheduled again.
    if [ -n "$stopped" ] && [ "$code" = 143 ]; then scontrol requeue "$SLURM_JOB_ID" || true; fi
"""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What is known of the Slurm cluster.

    Attributes:
        time: Limit of a job, as Slurm writes it: `1-00:00:00`.
        partition: Name of a partition; None is Slurm's own choice.
        account: Name of an account; None is Slurm's own choice.
        activate: Line of shell that makes `python` and `ray` those of the project.
        requeue: Whether a job that was stopped, by its limit or by `scancel --batch`, is queued
            again.
        exclusive: Whether nodes are taken whole.
        start_timeout_s: How long to wait for Ray on all nodes.
    """

    time: str = "1-00:00:00"
    partition: str | None = None
    account: str | None = None
    activate: str = "source .venv/bin/activate"
    requeue: bool = True
    exclusive: bool = True
    start_timeout_s: int = 600

    def __post_init__(self) -> None:
        if not _TIME.fullmatch(self.time):
            raise ManifestError(f"--time is {self.time!r}; write days-hours:minutes:seconds")
        check_name("--partition", self.partition)
        check_name("--account", self.account)
        if not self.activate.isprintable():
            raise ManifestError(f"--activate is {self.activate!r}; it must be one line of shell")


def batch_script(job: Deployment, place: Slurm) -> str:
    """A script for `sbatch`."""
    # A node that Slurm takes away has no time to drain; one that is done would wait for nothing.
    variables = {**job.environment, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"}
    for unused in ("LAPFLOW_HOME", "RAY_JOB_STOP_WAIT_TIME_S"):  # the script's own; no job server
        del variables[unused]
    exports = "\n".join(f"export {name}={value}" for name, value in variables.items())
    return _SCRIPT.format(
        run=job.name,
        nodes=job.nodes,
        workers=job.workers,
        directives="\n".join(f"#SBATCH {each}" for each in _directives(job, place)),
        activate=place.activate,
        exports=exports,
        step_gpus=f" --gpus-per-node={job.gpus_per_node}" if job.gpus_per_node else "",
        cpus=job.cpus_per_node,
        gpus=job.gpus_per_node,
        start_timeout=place.start_timeout_s,
        command=shlex.join(job.command),
        requeue=_REQUEUE if place.requeue else "",
        end_for_good=_END_FOR_GOOD if place.requeue else "",
    )


def _directives(job: Deployment, place: Slurm) -> list[str]:
    notice = f"TERM@{job.stop_grace_s}"  # as long before the limit as a last checkpoint takes
    directives = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={job.cpus_per_node}",
        f"--time={place.time}",
        f"--signal=B:{notice}",  # to this script alone
        "--open-mode=append",
        "--output=%x-%j.log",
    ]
    if job.gpus_per_node:
        directives.append(f"--gpus-per-node={job.gpus_per_node}")
    if job.memory_gib is not None:
        directives.append(f"--mem={int(job.memory_gib)}G")
    if place.exclusive:
        directives.append("--exclusive")
    if place.requeue:
        directives.append("--requeue")
    if place.partition is not None:
        directives.append(f"--partition={place.partition}")
    if place.account is not None:
        directives.append(f"--account={place.account}")
    return directives
