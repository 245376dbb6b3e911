"""An HTTP proxy in front of a real store that fails as stores and networks do, when told to.

It stands for the store's own address: what arrives is passed on byte for byte, the Host header
too, so signatures hold. Bodies are streamed. What goes wrong is set by rules:

    with faulty_proxy(s3.endpoint_url) as proxy:
        proxy.inject(Answer(status=503, code="SlowDown"), share=0.5)
        proxy.inject(Flip(), times=1, when=lambda request: request.path.endswith(".mds"))
        ...
        with proxy.down():
            ...

Whether a rule with a share strikes depends on the seed, the request and how often it was made
before, not on how threads take turns.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from urllib.parse import urlsplit

from tests.support.http_faults import Answer, Fault, Held, Silence
from tests.support.http_message import ClosedError, Head

LATE_S = 1.0  # between the end of an answer and the end of the request it answers


@dataclass(frozen=True)
class Request:
    """What a client asked for.

    Attributes:
        method: E.g. "GET".
        path: With the query, as sent: "/bucket/key?uploads".
        headers: By lower-case name.
    """

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class _Rule:
    fault: Fault
    times: float
    share: float
    when: Callable[[Request], bool]


class FaultyProxy:
    """A running proxy on a free loopback port; see the module's text.

    Args:
        upstream_url: The real store, "http://HOST:PORT".
        seed: Decides which requests a share strikes.
    """

    def __init__(self, upstream_url: str, *, seed: int = 0) -> None:
        upstream = urlsplit(upstream_url)
        assert upstream.hostname
        assert upstream.port
        self._upstream = (upstream.hostname, upstream.port)
        self._seed = seed
        self._lock = threading.Lock()
        self._rules: list[_Rule] = []
        self._requests: list[Request] = []
        self._asked: Counter[tuple[str, str]] = Counter()
        self._sockets: set[socket.socket] = set()
        self._listener = _bound(0)
        self._port = int(self._listener.getsockname()[1])
        self.endpoint_url = f"http://127.0.0.1:{self._port}"
        self._listen()

    @property
    def requests(self) -> list[Request]:
        """All requests so far, those that were struck too, in the order of their arrival."""
        with self._lock:
            return list(self._requests)

    def count(self, method: str) -> Counter[str]:
        """How often each path was asked for with a method."""
        return Counter(request.path for request in self.requests if request.method == method)

    def inject(
        self,
        fault: Fault,
        *,
        times: float = float("inf"),
        share: float = 1.0,
        when: Callable[[Request], bool] = lambda request: True,
    ) -> None:
        """Add a rule; of those that strike a request, the one added first counts.

        Args:
            fault: What goes wrong.
            times: How often at most.
            share: Probability for each request.
            when: Which requests it is about.
        """
        with self._lock:
            self._rules.append(_Rule(fault, times, share, when))

    def heal(self) -> None:
        """Forget all rules. What is already under way stays as it is."""
        with self._lock:
            self._rules.clear()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections, and break those that are open, until the block ends."""
        self._unlisten()
        self._listener = _bound(self._port)  # bound and not listening: it refuses
        self._break_connections()
        try:
            yield
        finally:
            self._listen()

    def down_for(self, seconds: float) -> threading.Thread:
        """Be down for some time, in a thread that ends when the proxy is up again."""
        is_down = threading.Event()

        def work() -> None:
            with self.down():
                is_down.set()
                time.sleep(seconds)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        is_down.wait()
        return thread

    def close(self) -> None:
        """End all connections and stop listening."""
        self._unlisten()
        self._break_connections()

    def _listen(self) -> None:
        self._listener.listen(128)
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def _unlisten(self) -> None:
        with suppress(OSError):  # if it was not listening
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread in accept()
        self._listener.close()

    def _break_connections(self) -> None:
        with self._lock:
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Answer the requests of one connection."""
        with suppress(OSError, ClosedError), self._tracked(client):
            reader = client.makefile("rb")
            while self._answer(client, reader):
                pass

    @contextmanager
    def _tracked(self, each: socket.socket) -> Iterator[socket.socket]:
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._sockets.add(each)
        try:
            yield each
        finally:
            with self._lock:
                self._sockets.discard(each)
            with suppress(OSError):  # close() alone waits for readers made of the socket
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _answer(self, client: socket.socket, reader: BufferedReader) -> bool:
        """Answer one request; say whether the connection can be used further."""
        head = Head.read(reader)
        method, path, _ = head.words
        fault = self._fault_for(Request(method, path, head.headers))
        if isinstance(fault, Held):
            fault.wait()
            fault = None
        if isinstance(fault, Silence):
            while client.recv(1 << 16):  # until one side gives up
                pass
            return False
        if isinstance(fault, Answer):
            if head.has_body(answers=None) and "expect" not in head.headers:
                for _ in head.body(reader):
                    pass
            client.sendall(fault.as_bytes(method=method))
            return False
        with self._tracked(socket.create_connection(self._upstream)) as upstream:
            upstream.sendall(head.raw)
            # Beside the answer: with "Expect: 100-continue" its first part comes before the body.
            body = _Upload(head, reader, upstream)
            answers = upstream.makefile("rb")
            while (answer := Head.read(answers)).words[1].startswith("1"):
                client.sendall(answer.raw)
            client.sendall(answer.raw)
            if answer.has_body(answers=method):
                pieces = answer.body(answers)
                for piece in answer.framed(fault.spoil(pieces) if fault else pieces):
                    client.sendall(piece)
            return body.is_sent() and not head.closes and not answer.closes

    def _fault_for(self, request: Request) -> Fault | None:
        with self._lock:
            self._requests.append(request)
            asked = (request.method, request.path)
            self._asked[asked] += 1
            for number, rule in enumerate(self._rules):
                key = (self._seed, number, *asked, self._asked[asked])
                struck = random.Random(repr(key)).random() < rule.share
                if struck and rule.times > 0 and rule.when(request):
                    rule.times -= 1
                    return rule.fault
        return None


class _Upload:
    """Passes on the body of a request, in a thread if there is one."""

    def __init__(self, head: Head, reader: BufferedReader, upstream: socket.socket) -> None:
        self._sent = threading.Event()
        if not head.has_body(answers=None):
            self._sent.set()
            return

        def work() -> None:
            with suppress(OSError, ClosedError):
                for piece in head.framed(head.body(reader)):
                    upstream.sendall(piece)
                self._sent.set()

        threading.Thread(target=work, daemon=True).start()

    def is_sent(self) -> bool:
        """Say, after the answer, whether all of it was passed on."""
        return self._sent.wait(LATE_S)


def _bound(port: int) -> socket.socket:
    """A socket with a port of the loopback interface that refuses connections as yet."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


@contextmanager
def faulty_proxy(upstream_url: str, *, seed: int = 0) -> Iterator[FaultyProxy]:
    """Run a proxy until the block ends."""
    proxy = FaultyProxy(upstream_url, seed=seed)
    try:
        yield proxy
    finally:
        proxy.close()
