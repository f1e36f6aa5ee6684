"""A real HTTP server over a folder that fails by a seeded schedule: drops, stalls, refuses, cuts short, alters.

In: a folder, a seed, the share of requests that fail and how.
Out: its URL; how often each file was asked for and delivered whole, and which faults were injected.
"""

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import xxhash

FAULTS = (
    "drop",  # reset in mid-body
    "stall",  # silence in mid-body
    "late",  # silence before the headers
    "refuse",  # closed without a response
    "503",
    "429",
    "announced",  # a body cut short, with a Content-Length that says so
    "unannounced",  # a body cut short, without a Content-Length: it looks complete
    "longer",  # a body cut short, with the whole one's Content-Length, closed in order
    "altered",  # one bit of the body flipped
)


class FaultyServer:
    """Serves a folder at `url`, with folder listings, until the `with` block ends.

    Which requests of a file fail, how and where is a function of (seed, path, number of the request for that path).

    Args:
        folder: what is served.
        seed: of the schedule.
        rate: share of the requests that fail.
        faults: those that occur; all are equally frequent.
        in_a_row: most failures of one path before one request is answered as it should be.
        stall: seconds of silence; longer than the reader's timeout.
    """

    def __init__(
        self,
        folder: Path,
        seed: int = 0,
        rate: float = 0.0,
        faults: tuple[str, ...] = FAULTS,
        in_a_row: int = 3,
        stall: float = 30.0,
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.rate = rate
        self.faults = faults
        self.in_a_row = in_a_row
        self.stall = stall
        self.requests: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.always: dict[str, int] = {}
        """Statuses with which paths are answered always, such as {"/a.tar": 403, "HEAD /b.tar": 405}."""
        self.stopping = threading.Event()
        self._row: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> "FaultyServer":
        owner = self

        class Handler(_Handler):
            server_of = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def next_fault(self, path: str) -> tuple[str, float] | None:
        """Counts a request and draws its fault and how far into the body it comes, 0 .. 1; None for none."""
        with self._lock:
            number = self.requests[path]
            self.requests[path] += 1
            fails, which, where = (self._draw(path, number, what) for what in ("fails", "which", "where"))
            if fails >= self.rate or self._row[path] >= self.in_a_row:
                self._row[path] = 0
                return None
            self._row[path] += 1
            fault = self.faults[int(which * len(self.faults))]
            self.injected[fault] += 1
            return fault, where

    def _draw(self, path: str, number: int, what: str) -> float:
        return xxhash.xxh3_64_intdigest(f"{self.seed} {path} {number} {what}".encode()) / 2**64


class _Handler(SimpleHTTPRequestHandler):
    server_of: FaultyServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, directory=str(self.server_of.folder))

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        if not self._refused(self.server_of.next_fault("HEAD " + self.path)):
            super().do_HEAD()

    def do_GET(self) -> None:
        drawn = self.server_of.next_fault(self.path)
        if self._refused(drawn):
            return
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            super().do_GET()
            return
        body = file.read_bytes()
        fault, where = drawn or ("", 0.0)
        cut = int(where * len(body))
        if fault == "altered" and body:
            body = body[:cut] + bytes([body[cut] ^ 1 << int(where * 1e6) % 8]) + body[cut + 1 :]
        self.send_response(200)
        self.send_header("Content-Type", "application/x-tar")
        if fault == "unannounced":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(cut if fault == "announced" else len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body if fault in ("", "altered") else body[:cut])
            self.wfile.flush()
            if fault == "stall":
                self._be_silent()
            elif fault == "drop":
                self._reset()
            elif fault in ("longer", "unannounced"):
                self.close_connection = True
            elif fault == "":
                self.server_of.delivered[self.path] += 1

    def _refused(self, drawn: tuple[str, float] | None) -> bool:
        """Answers a request that gets no body, and tells whether it was one."""
        fault = drawn[0] if drawn else ""
        always = self.server_of.always
        if status := always.get(self.path, always.get(f"{self.command} {self.path}")):
            self.send_error(status)
        elif fault in ("503", "429"):
            self.send_error(int(fault))
        elif fault == "late":
            self._be_silent()
        elif fault == "refuse" or (fault and self.command == "HEAD"):
            self._reset()
        else:
            return False
        return True

    def _be_silent(self) -> None:
        end = time.monotonic() + self.server_of.stall
        while time.monotonic() < end and not self.server_of.stopping.wait(0.05):
            pass
        self.close_connection = True

    def _reset(self) -> None:
        """Closes at once: the reader's next read fails with a reset connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.connection.close()
