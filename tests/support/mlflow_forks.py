"""The process behind `tests.support.mlflow_server`: MLflow servers as forks of itself.

A server's two processes import for five seconds of a processor what this one imports once. What is
served, and from which settings, is MLflow's: the fork runs `mlflow server`, and where that would
start uvicorn as a command it becomes it.

Each line of the input is a request: the words of a server and the file of its log, or the process
to kill. The answer is a line with the number of the process, once that has begun or is gone.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence

# Which of its parts MLflow makes as it is imported depends on whether it serves.
os.environ["_MLFLOW_SERVER_SERVE_ARTIFACTS"] = "true"

import mlflow.cli
import mlflow.server
import mlflow.server.fastapi_app
import mlflow.store.tracking.sqlalchemy_store
import uvicorn


def serve(words: Sequence[str], log: str) -> None:
    """Becomes a server, in a session of its own that prints into a file."""
    os.setsid()
    with open(os.devnull) as nothing, open(log, "ab") as printed:
        for source, target in ((nothing, 0), (printed, 1), (printed, 2)):
            os.dup2(source.fileno(), target)

    def become(command: Sequence[str], *, extra_env: Mapping[str, str], **_options: object) -> None:
        os.environ.update(extra_env)
        host, port = (command[command.index(name) + 1] for name in ("--host", "--port"))
        uvicorn.run(mlflow.server.fastapi_app.app, host=host, port=int(port))
        os._exit(1)  # an error: it is to serve until it is killed

    mlflow.server._exec_cmd = become
    mlflow.cli.cli(["server", *words], standalone_mode=False)


def main() -> None:
    """Answers requests until there are no more, and kills what is left."""
    running: set[int] = set()

    def kill(server: int) -> None:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        running.remove(server)

    for line in sys.stdin:
        request = json.loads(line)
        if "kill" in request:
            server = request["kill"]
            kill(server)
        elif server := os.fork():
            running.add(server)
        else:
            try:
                serve(**request)
            finally:
                os._exit(1)
        print(server, flush=True)  # noqa: T201
    for server in (*running,):
        kill(server)


if __name__ == "__main__":
    main()
