"""A run that counts: workers save what they counted, and do to themselves what they are told."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.contract import (
    ClusterConfig,
    Line,
    LostWorkers,
    Message,
    Outcome,
    Payload,
    WorkerContext,
)
from cluster.launcher import run
from tests.support.ray_cluster import RayCluster

BATCH, INTERVAL = 10, 50
"""Images of an update, and between two saves."""
LIMIT_S = 540
"""Only what hangs takes so long."""

WARMED: list[None] = []


def warm_up() -> None:
    """What processes do before they get their work."""
    WARMED.append(None)


def count(context: WorkerContext, payload: Payload) -> None:
    """Counts images to the end of the run, or until all ranks know of a wish to stop."""
    import torch
    import torch.distributed as dist

    saved = Path(payload["saved"])
    images = int(saved.read_text()) if saved.exists() else 0
    dist.barrier()
    here = {"pid": os.getpid(), "warmed": len(WARMED)}
    context.report({"attempt": context.attempt, "from": images, "rank": context.rank, **here})

    def save() -> None:
        dist.barrier()
        if context.rank == 0:
            saved.write_text(str(images))
            context.keep(images)

    limit = time.monotonic() + LIMIT_S
    # What is to happen to a run has happened before its last attempt, which need not be slow.
    is_last = context.attempt >= payload.get("last_attempt", math.inf)
    while images < payload["total"]:
        assert time.monotonic() < limit
        time.sleep(0.0 if is_last else payload.get("step_s", 0.0))
        images += BATCH
        context.advance(images)
        if images % INTERVAL == 0:
            save()
        hurt(context, payload, images, limit)
        if "bad" in payload:
            be_bad(context, Path(payload["bad"]), images)
        stop = torch.tensor([float(context.stop_requested())])
        dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        if stop.item():
            context.report({"left": images, "grace_s": context.grace_s()})
            save()
            return


def hurt(context: WorkerContext, payload: Payload, images: int, limit: float) -> None:
    """Does what is to happen after so many images, to rank 1."""
    sys.stdout.write(f"printed {images} in attempt {context.attempt}\n")
    context.log("INFO", f"logged {images} in attempt {context.attempt}")
    now = f"{context.attempt}:{images}"
    if context.rank != 1 or (fault := payload.get("faults", {}).get(now)) is None:
        return
    while "go" in payload and not Path(payload["go"]).with_suffix(f".{context.attempt}").exists():
        assert time.monotonic() < limit
        time.sleep(0.1)
    if fault == "raise":
        raise KeyError("no such colour")
    print("the colour is red", file=sys.stderr)  # noqa: T201 - what users do
    context.log("WARNING", "the end is near")
    if fault == "end":
        context.end(75)
    os.kill(os.getpid(), signal.SIGKILL)


def be_bad(context: WorkerContext, bad: Path, images: int) -> None:
    """Marks rank 1's node as bad, and fails there ever after; for the second time when told."""
    import ray

    here = ray.util.get_node_ip_address()
    if (context.attempt, context.rank) == (0, 1):
        bad.write_text(here)
    if not bad.exists() or here != bad.read_text():
        return
    while context.attempt > 0 and not bad.with_name("bad again").exists():
        time.sleep(0.1)
    raise RuntimeError(f"this node fails after {images} images too")


@dataclass
class Story:
    """What a run told."""

    messages: list[Message] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    lost: list[LostWorkers] = field(default_factory=list)

    def take(self, line: Line) -> None:
        self.lines.append(str(line))

    def lose(self, lost: LostWorkers) -> None:
        self.lost.append(lost)

    def starts(self) -> list[int]:
        """From where each attempt went on."""
        return [one["from"] for one in self.messages if one.get("rank") == 0 and "from" in one]

    def line(self, pattern: str) -> str:
        """The line of that pattern."""
        (found,) = [line for line in self.lines if re.search(pattern, line)]
        return found


def launch(
    cluster: RayCluster,
    story: Story,
    payload: dict[str, Any],
    *,
    watch: Callable[[Message], None] = lambda message: None,
    look: Callable[[str], None] = lambda line: None,
    fewer: dict[int, int] | None = None,
    warm_up: Callable[[], None] | None = None,
    **settings: Any,
) -> Outcome:
    """Run it on a cluster, with two workers.

    Args:
        cluster: The cluster.
        story: Takes what the run tells.
        payload: `saved` is the file of what was counted, `total` ends the run. `step_s` slows each
            update until the attempt `last_attempt`. `faults` names what rank 1 does to itself, by
            attempt and images; if `go` is given, once there is the file of that name with the
            number of the attempt as its suffix. `bad` is a file for the address of a node on which
            it fails.
        watch: Sees each message.
        look: Sees each line for a person.
        fewer: For smaller worlds, see `cluster.launcher.run`.
        warm_up: What spare processes do before they get their work.
        settings: Of the cluster.
    """

    def take(message: Message) -> None:
        story.messages.append(message)
        watch(message)

    def tell(line: str) -> None:
        story.lines.append(line)
        sys.stdout.write(f"{line}\n")
        look(line)

    config = ClusterConfig(workers=2, gpus_per_worker=0, address=cluster.address, **settings)
    stop = threading.Event()
    return run(
        config,
        count,
        payload,
        on_message=take,
        report=tell,
        listener=story,
        stop=stop,
        fewer=fewer or {},
        warm_up=warm_up,
    )
