"""A command that runs two workers as forks of a warmed process, and tells what they were."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time

from cluster.contract import ClusterConfig, Message, Payload, WorkerContext
from cluster.failure import WorkerFailed
from cluster.launcher import prepare, run


def warm_up() -> None:
    """Import something that no worker imports, and tell who did."""
    import tabnanny  # of the standard library, and used by nobody

    import numpy as np

    np.random.seed(7)
    random.seed(7)
    tabnanny.imported_by = os.getpid()  # type: ignore[attr-defined]


def import_for_long() -> None:
    """Tell that it has begun, and take longer than any test waits."""
    _say({"importing": os.getpid()})
    time.sleep(3000)


def tell(context: WorkerContext, payload: Payload) -> None:
    """Report what a fork has of the process that it comes from, and of its caller."""
    import numpy as np

    tabnanny = sys.modules.get("tabnanny")
    context.report(
        {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "imported_by": getattr(tabnanny, "imported_by", None),
            "late": os.environ.get("SET_LATE"),
            "folder": os.getcwd(),
            "variables": [n for n in ("LAPFLOW_WARM_UP", "SET_EARLY") if n in os.environ],
            "threads": os.environ["OMP_NUM_THREADS"],
            "draws": [random.random(), float(np.random.random())],
        }
    )
    if payload["what"] == "kill" and context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 300
    while payload["what"] != "tell" and not context.stop_requested():
        if time.monotonic() > deadline:
            raise AssertionError("nobody has asked for a stop")
        time.sleep(0.01)


def main(what: str, folder: str) -> int:
    """Run them.

    Args:
        what: "tell"; "kill", which one of them does to itself; "wait" for a stop; or "refuse" to
            start them, once imports have begun.
        folder: Where to be once the server has started.
    """
    config = ClusterConfig(backend="local", workers=2, gpus_per_worker=0)
    if what == "refuse":
        prepare(config, import_for_long)
        sys.stdin.read(1)
        return 2
    os.environ["SET_EARLY"] = "1"
    prepare(config, warm_up)
    del os.environ["SET_EARLY"]
    os.environ["SET_LATE"] = "2"
    os.chdir(folder)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        outcome = run(
            config,
            tell,
            {"what": what},
            on_message=_say,
            stop=stop,
            warm_up=warm_up,
        )
    except WorkerFailed as error:
        _say({"failed": str(error)})
        return 1
    _say({"outcome": outcome.status})
    return 0


def _say(message: Message) -> None:
    sys.stdout.write(f"{json.dumps(message)}\n")
    sys.stdout.flush()
