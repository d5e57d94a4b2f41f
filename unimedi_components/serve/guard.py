# SPDX-License-Identifier: Apache-2.0
"""What stands before every request: whose page may ask, how much it may send, and what browsers are told."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unimedi_components.serve.faults import Limits, UploadError, megabytes, too_large

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

_SMALL_BODY = 2**16
_UPLOADS = "/api/analyse"
# A client that hears nothing until it has sent all would see a broken connection instead of the answer.
_DISCARDED = 2**31
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware of a server without a login.

    A request must name the server by one of `hosts`, or a page of another site that has its name resolved to this
    machine could read it (DNS rebinding). One that changes or computes something must come from the server's own page,
    or from no page. Bodies are cut off at their limit while they arrive.

    Args:
        hosts: names of this server, without port; empty allows all.
    """

    def __init__(self, app: ASGIApp, limits: Limits, hosts: Sequence[str] = LOOPBACK) -> None:
        self.app, self.limits, self.hosts = app, limits, tuple(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, guarded = Headers(scope=scope), _with_headers(send)
        limit = self.limits.upload_bytes if scope["path"] == _UPLOADS else _SMALL_BODY
        fault = self._stranger(scope["method"], headers)
        if fault is None:
            length = headers.get("content-length", "")
            if length.isdigit() and int(length) > limit:
                fault = _too_many_bytes(limit)
                if "100-continue" not in headers.get("expect", "").lower():
                    await _discard(receive)
        if fault is not None:
            answer = JSONResponse({"error": str(fault)}, fault.status)
            await answer(scope, receive, guarded)
            return
        await self.app(scope, _limited(receive, limit), guarded)

    def _stranger(self, method: str, headers: Headers) -> UploadError | None:
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts and name not in self.hosts:
            return UploadError(400, f"the host {name[:80]!r} is not this server's. Open it as http://{self.hosts[0]}.")
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and urlsplit(origin).netloc.lower() != host:
            return UploadError(403, "the request comes from another site's page. Use this server's own page.")
        return None


def _too_many_bytes(limit: int) -> UploadError:
    return too_large(
        f"the upload is larger than {megabytes(limit)}. Drop a smaller file, or start the server with a larger "
        "--max_upload_mb."
    )


def _limited(receive: Receive, limit: int) -> Receive:
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limit:
            if message.get("more_body"):
                await _discard(receive)
            raise _too_many_bytes(limit)
        return message

    return counted


async def _discard(receive: Receive) -> None:
    left = _DISCARDED
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return


def _with_headers(send: Send) -> Send:
    async def guarded(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
        await send(message)

    return guarded
