"""The face of cryoSPARC 5: a REST server on the loopback interface; requests and answers are validated."""

from __future__ import annotations

import json
import socket
import struct
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from cryosparc.constants import API_SUFFIX
from cryosparc.dataset import Dataset
from cryosparc.json_util import api_default, api_object_hook
from pydantic import TypeAdapter, ValidationError

from standin.contract import MISSING, Function, is_stream, openapi, published_functions
from standin.operations import OPERATIONS
from standin.state import RefusalError, State

LOOPBACK = "127.0.0.1"
OPEN_TO_ALL = ("health", "login")


class BrokenError(Exception):
    """The connection is to break now, without an answer."""


class Handler(BaseHTTPRequestHandler):
    """What the faces of both versions share: bodies, answers, ordered faults."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: two would wait for each other's acknowledgement
    disable_nagle_algorithm = True
    state: State

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, code: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def break_connection(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)

    def misbehave(self, fault: Any, name: str, stored_half: Path | None, raw: bytes) -> None:
        """Carry out an ordered fault, but for `lost_reply`, which comes after the work."""
        if callable(fault):
            fault()
        elif fault == "drop":
            if stored_half is not None:
                stored_half.write_bytes(raw[: len(raw) // 2])
            raise BrokenError
        elif fault == "error":
            raise RefusalError(500, f"ordered failure of {name}")
        elif fault == "expire":
            self.state.tokens.clear()
            raise RefusalError(401, "token has expired")


def serve(state: State) -> tuple[ThreadingHTTPServer, str]:
    """Start serving on a free port; the server, and the URL for the client."""
    document = openapi(state.version)
    routes = {("/" + f.name.replace(".", "/"), f.method): f for f in published_functions().values()}

    class Face(Handler):
        def handle_request(self) -> None:
            if urlsplit(self.path).path == f"{API_SUFFIX}/openapi.json":
                return self.answer(200, document)
            name = "?"
            raw = self.body()
            try:
                function, arguments = self.routed()
                name = function.name
                self.authorize(name)
                if name not in OPERATIONS:
                    raise RefusalError(501, f"the stand-in does not implement api.{name}")
                fault = state.fault_at(name)
                query = parse_qs(raw.decode() if name == "login" else self.query, keep_blank_values=True)
                half = (
                    state.inside(arguments[0], query["path"][0]) if name == "projects.upload_file" else None
                )
                self.misbehave(fault, name, half, raw)
                positional, named = _parsed(function, arguments, query, raw)
                with state.lock:
                    result = OPERATIONS[name](state, *positional, **named)
                state.calls.append((name, 200))
                if fault == "lost_reply":
                    raise BrokenError
                self.deliver(function, result)
            except BrokenError:
                state.calls.append((name, 0))
                self.break_connection()
            except (RefusalError, ValidationError, ValueError, TypeError) as error:
                code = error.code if isinstance(error, RefusalError) else 422
                state.calls.append((name, code))
                self.answer(code, json.dumps({"detail": str(error)}).encode())
            except Exception:
                state.calls.append((name, 500))
                self.answer(500, json.dumps({"detail": traceback.format_exc()}).encode())

        do_GET = do_POST = handle_request  # noqa: N815

        def routed(self) -> tuple[Function, list[str]]:
            parts = urlsplit(self.path)
            self.query = parts.query
            words = parts.path.removeprefix(API_SUFFIX).strip("/").split("/")
            for length in (2, 1):
                function = routes.get(("/" + "/".join(words[:length]), self.command.lower()))
                if function is not None and len(words) - length == len(function.path_parameters):
                    return function, [unquote(word) for word in words[length:]]
            raise RefusalError(404, f"no route {self.command} {parts.path}")

        def authorize(self, name: str) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if name not in OPEN_TO_ALL and token not in state.tokens:
                raise RefusalError(401, "not authenticated, or the token has expired")

        def deliver(self, function: Function, result: Any) -> None:
            if isinstance(result, Dataset):
                stream = b"".join(result.stream(compression="lz4"))
                return self.answer(200, stream, Dataset.media_type)
            if isinstance(result, bytes):
                return self.answer(200, result, "application/octet-stream")
            content = json.dumps(result, default=_as_json).encode()
            if function.returns not in (None, Any):  # our own answers must fit the client's models as well
                TypeAdapter(function.returns).validate_python(
                    json.loads(content, object_hook=api_object_hook)
                )
            return self.answer(200, content)

    Face.state = state
    server = start(LOOPBACK, 0, Face)
    return server, f"http://{LOOPBACK}:{server.server_address[1]}"


def start(host: str, port: int, handler: type[Handler]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer((host, port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@contextmanager
def served(state: State) -> Iterator[str]:
    """Serve within a block; gives the URL."""
    server, url = serve(state)
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()


def _parsed(
    function: Function, arguments: list[str], query: dict[str, list[str]], raw: bytes
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, each validated by the published type."""
    positional = [
        _validated(parameter.type, [value])
        for parameter, value in zip(function.path_parameters, arguments, strict=True)
    ]
    named = {}
    for parameter in function.query:
        if parameter.name in query:
            named[parameter.name] = _validated(parameter.type, query[parameter.name])
        elif parameter.default is MISSING:
            raise RefusalError(422, f"{function.name}: no query parameter {parameter.name}")
    body = function.body
    if body is not None and (raw or body.default is MISSING):
        if body.type is Dataset:
            positional.append(Dataset.load(BytesIO(raw)))
        elif is_stream(body.type):
            positional.append(raw)
        else:
            content = json.loads(raw, object_hook=api_object_hook)
            positional.append(TypeAdapter(body.type).validate_python(content))
    return positional, named


def _validated(kind: Any, values: list[str]) -> Any:
    """One value, its JSON, or all values: the first that the type accepts."""
    tries: list[Any] = [values]
    if len(values) == 1:
        tries.insert(0, values[0])
        with suppress(ValueError):
            tries.insert(1, json.loads(values[0]))
    for value in tries[:-1]:
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError:
            continue
    return TypeAdapter(kind).validate_python(tries[-1])


def _as_json(value: Any) -> Any:
    return (
        value.model_dump(mode="json", by_alias=True) if hasattr(value, "model_dump") else api_default(value)
    )
