"""An HTTP server on loopback for the length of a `with`: what the small Hubs of the tests share."""

from __future__ import annotations

import http.server
import threading
from types import TracebackType
from typing import Any, ClassVar, Self


class Handler(http.server.BaseHTTPRequestHandler):
    """Knows whose it is by `state`, and says nothing on the terminal."""

    state: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  (its name in the base class)
        """Requests are kept by the server instead."""


class Loopback:
    """`with Server() as server:` then ask `server.url`."""

    handler: ClassVar[type[Handler]]
    url: str

    def __enter__(self) -> Self:
        own = type("OwnHandler", (self.handler,), {"state": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), own)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
