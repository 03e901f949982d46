"""What MLflow's server trusts requests with though it should not, refused before they get there.

    python -m dashboards.guard server ...    # MLflow's own command line; its app is behind the guard

Artifact paths go on to an S3 store that takes some of them for the whole bucket, locations of artifacts are read by the
server itself, and what MLflow does not expect ends in its database or in an error without an explanation.
"""

import base64
import json
import re
import sys
import urllib.parse
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST = 4 * 2**20  # bytes of a JSON body; MLflow's largest, a batch of metrics, has 1 MB
DEEPEST = 50  # levels of a JSON body
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
ENDS = re.compile("[#?;]")  # where a URI's path ends, as MLflow reads it
ARTIFACTS = "/mlflow-artifacts/"
UPLOADS = (f"{ARTIFACTS}artifacts/", "/mlflow/upload-artifact")  # their bodies are files, whatever their type
SERVER_INFO = "/mlflow/server-info"  # MLflow asks no password for it


class Refused(Exception):
    """Why a request goes no further."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status

    def answer(self) -> JSONResponse:
        code = {401: "UNAUTHENTICATED", 413: "REQUEST_LIMIT_EXCEEDED"}.get(self.status, "INVALID_PARAMETER_VALUE")
        headers = {"WWW-Authenticate": 'Basic realm="mlflow"'} if self.status == 401 else None
        return JSONResponse({"error_code": code, "message": str(self)}, self.status, headers)


class Disconnected(Exception):
    """Nobody waits for an answer."""


class Guard:
    """ASGI middleware; what it does not refuse passes unchanged, and bodies of artifacts as they come.

    Args:
        app: MLflow's.
        authenticate: who has sent a request, or none; it may take a while.
    """

    def __init__(self, app: ASGIApp, authenticate: Callable[[Request], object | None]) -> None:
        self.app = app
        self.authenticate = authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = Body(receive)
        try:
            try:
                await self._check(scope, body)
            except Refused as refused:
                await body.skip()  # who is still sending does not read an answer
                await refused.answer()(scope, receive, send)
                return
        except Disconnected:
            return
        await self.app(scope, body.receive, send)

    async def _check(self, scope: Scope, body: "Body") -> None:
        path = scope["path"]
        check_credentials([value for name, value in scope["headers"] if name == b"authorization"])
        asked = path.rstrip("/").endswith(SERVER_INFO)
        if asked and await run_in_threadpool(self.authenticate, Request(scope)) is None:
            raise Refused("You are not authenticated", 401)
        check_path(path)
        if ARTIFACTS in path:
            check_artifact(path.partition(ARTIFACTS)[2])
        check_query(scope["query_string"])
        kind = b" ".join(value for name, value in scope["headers"] if name == b"content-type").lower()
        if b"json" in kind and not any(part in path for part in UPLOADS):
            check_json(await body.read())


class Body:
    """What a client sends after its headers; what was looked at can be received again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = False
        self._read: list[Message] = []

    async def receive(self) -> Message:
        return self._read.pop() if self._read else await self._receive()

    async def read(self) -> bytes:
        """All of it, unless it is too long."""
        chunks: list[bytes] = []
        length = 0
        while not self._ended:
            chunks.append(await self._next())
            length += len(chunks[-1])
            if length > LARGEST:
                raise Refused(f"the body has more than {LARGEST} bytes", 413)
        whole = b"".join(chunks)
        self._read = [{"type": "http.request", "body": whole, "more_body": False}]
        return whole

    async def skip(self) -> None:
        while not self._ended:
            await self._next()

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        self._ended = not message.get("more_body", False)
        return bytes(message.get("body", b""))


def check_credentials(values: list[bytes]) -> None:
    """Nothing but a name and a password: MLflow has no answer to anything else."""
    if not values:
        return  # what needs a password says so itself
    scheme, _, encoded = values[0].partition(b" ")
    try:
        decoded = base64.b64decode(encoded.strip(), validate=True).decode()
    except ValueError:
        decoded = ""
    if len(values) > 1 or scheme.lower() != b"basic" or ":" not in decoded or CONTROL.search(decoded):
        raise Refused("You are not authenticated: the header Authorization must be Basic, a name and a password", 401)


def check_path(path: str) -> None:
    """A path that stays where it is; it may be decoded a second time further on."""
    for form in (path, urllib.parse.unquote(path)):
        if CONTROL.search(form):
            raise Refused(f"the path {path!r} holds a control character")
        if "\\" in form:
            raise Refused(f"the path {path!r} holds a backslash")
        if any(part.strip() == ".." for part in form.split("/")):
            raise Refused(f"the path {path!r} leads out of its folder")


def check_artifact(path: str) -> None:
    """A path that stands for itself as a part of a URI: the S3 store is given one, and forgives a lot."""
    check_path(path)
    for form in (path, urllib.parse.unquote(path)):
        if any(part.strip() in ("", ".") or part != part.strip() for part in form.split("/")):
            raise Refused(f"the artifact path {path!r} has a part without a name, or with blanks around it")
        if ENDS.search(form):
            raise Refused(f"the artifact path {path!r} holds #, ? or ;")


def check_query(query: bytes) -> None:
    """No control characters, and a path where there should be one: filters and names may hold all else."""
    for name, value in urllib.parse.parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if CONTROL.search(name) or CONTROL.search(value):
            raise Refused(f"the parameter {name!r} holds a control character")
        if "path" in name.lower():
            check_path(value)
            if value and not value.strip():
                raise Refused(f"the parameter {name!r} is blank")
            if ENDS.search(value):
                raise Refused(f"the parameter {name!r} holds #, ? or ;")


def check_json(body: bytes) -> None:
    """An object that is neither too deep nor holds what a database cannot."""
    if not body:
        return
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON") from None
    if not isinstance(value, dict):
        raise Refused("the body is not a JSON object")
    left: list[tuple[Any, int]] = [(value, 1)]
    while left:
        one, depth = left.pop()
        if depth > DEEPEST:
            raise Refused(f"the body has more than {DEEPEST} levels")
        if isinstance(one, str) and "\0" in one:
            raise Refused("the body holds a NUL character")
        if isinstance(one, dict):
            left += [(key, depth) for key in one]
        if isinstance(one, dict | list):
            left += [(part, depth + 1) for part in (one.values() if isinstance(one, dict) else one)]
    for name in ("artifact_location", "artifactLocation"):  # protobuf knows both
        check_location(value.get(name))


def check_location(location: object) -> None:
    """Where an experiment may keep its artifacts: where MLflow keeps all of them."""
    if not isinstance(location, str) or not location:
        return  # its default, or of no type that MLflow takes
    scheme, _, path = location.partition(":/")
    if scheme != "mlflow-artifacts":
        raise Refused(f"artifact_location {location[:200]!r} does not start with mlflow-artifacts:/")
    check_artifact(path)


def create_app() -> Guard:
    """MLflow's app with passwords, for uvicorn."""
    from mlflow.server import auth  # only a server's process may import it: it opens the database

    return Guard(auth.create_app(), auth._authenticate_fastapi_request)


def main() -> None:
    from mlflow import server
    from mlflow.cli import cli

    if not hasattr(server, "_find_app"):
        sys.exit("error: this version of MLflow names its app in another way, the guard cannot be put in front of it")
    # `--app-name` finds installed packages' apps only, and makes the first user only where it is basic-auth
    server._find_app = lambda app_name: "dashboards.guard:create_app"
    cli()


if __name__ == "__main__":
    main()
