"""HTTP for the Hub on 127.0.0.1: answers, and connections cut where a fault says so."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from support.hub_records import Fault, Request


class Server(ThreadingHTTPServer):
    """Keeps its connections and threads, so that stopping leaves none behind."""

    request_queue_size = 64

    def __init__(self, hub: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        self.connections: list[tuple[socket.socket, threading.Thread]] = []

    def start(self) -> None:
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        arguments = (request, client_address)
        thread = threading.Thread(target=self.process_request_thread, args=arguments, daemon=True)
        self.connections.append((request, thread))
        thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        for connection, thread in self.connections:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for a request
            thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with kept connections; asks the Hub for every answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every small answer would wait for an acknowledgement
    server: Server
    headers: Message

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        scheme, _, token = headers.pop("authorization", "").partition(" ")
        token = token if scheme.lower() == "bearer" else None
        request = Request(self.command, url.path, parse_qs(url.query), headers, token)
        with hub._lock:
            hub.requests.append(request)
        cut = hub._take("drop request", request)
        whole = self._read_body(request, cut)
        if cut or not whole:
            self._reset()
            return
        response = hub.handle(request)
        content = response.content
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/json" if content is not body else "application/octet-stream"
        cut = hub._take("drop response", request)
        keep = len(body) // 2 if cut and cut.value is None else cut.value if cut else len(body)
        if cut and keep == 0:
            self.close_connection = True
            return
        request.status = response.status
        self.send_response(response.status)
        lengths = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in {**lengths, **response.headers}.items():
            self.send_header(name, " ".join(value.encode("ascii", "replace").decode().split()))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:keep])
        self.close_connection = self.close_connection or cut is not None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self, request: Request, cut: Fault | None) -> bool:
        """Read the body, or only so much of it; false if the client stopped before its end."""
        length = int(self.headers.get("Content-Length", 0))  # the client never sends chunks
        limit = length if cut is None else length // 2 if cut.value is None else cut.value
        request.body = self.rfile.read(min(length, limit))
        return len(request.body) == length and "Transfer-Encoding" not in self.headers

    def _reset(self) -> None:
        """Close at once: without lingering the client gets a reset, not a quiet end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
