"""What a private Ray cluster runs in the place of Ray's agent: a process that offers nothing.

Ray's own collects metrics, serves profiles and runs jobs for a dashboard, none of which a private
cluster has, and takes seconds of a processor to start. The raylet cannot do without a process in
its place: it reads the ports from files that the process writes, where -1 is the word for "not
offered", and ends itself with it.

`cluster.ray_private` has the raylet run this file, which imports nothing of Ray or of ours.
"""

import os
import sys
import time
from pathlib import Path

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
_LOOK_S = 1.0


def main(session: str, node: str) -> None:
    """Says that nothing is offered, and waits for the raylet's end.

    Args:
        session: The folder of Ray's session.
        node: The node's id.
    """
    raylet = os.getppid()
    for port in PORTS:
        file = Path(session, f"{port}_{node}")
        half = file.with_name(f"{file.name}.half")
        half.write_text("-1")
        half.rename(file)
    while os.getppid() == raylet:
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
