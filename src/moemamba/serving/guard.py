"""Who may ask, and how much: the name by which a server is called, pages of other sites, the key, sizes."""

import hmac
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusal import Refusal

LOOPBACK = ("localhost", "127.0.0.1", "::1")
FREE = ("/", "/health", "/page")
"""paths that need no key"""
SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """Lets requests through that may come, to an app that raises `Refusal` for what it refuses.

    Args:
        hosts: names by which the server may be called; any if None. A page of another site cannot reach a server of
            this machine by a name of its own then (DNS rebinding).
        key: that clients must send; none if None.
        origins: other sites whose pages may ask.
        most: bytes of a body.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None, key: str | None, origins: Sequence[str], most: int):
        self._app, self._hosts, self._key, self._origins, self._most = app, hosts, key, origins, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False
        extra: dict[str, str] = dict(SAFE)

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                own = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in extra.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        try:
            headers = Headers(scope=scope)
            extra |= self._admitted(headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _answer(sending, 204, b"", {})
                return
            self._check_key(scope["path"], headers)
            await self._app(scope, self._bounded(headers, receive), sending)
        except Refusal as error:
            if begun:
                raise
            headers_of = {"content-type": "application/json", **error.headers}
            await _answer(sending, error.status, json.dumps(error.body).encode(), headers_of)

    def _admitted(self, headers: Headers) -> dict[str, str]:
        """Headers for a page that may ask; raises Refusal for a name or a page that may not."""
        host = _host(f"//{headers.get('host', '')}")
        if self._hosts is not None and host not in self._hosts:
            raise Refusal(
                421,
                f"this server is not called {host!r:.80}; its names are {', '.join(self._hosts)} "
                "(--allow-host adds one)",
                code="wrong_host",
            )
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            allowed = {
                "access-control-allow-origin": origin or "",
                "access-control-allow-headers": "authorization, content-type",
                "access-control-allow-methods": "GET, POST, PUT, DELETE",
                "vary": "origin",
            }
            return allowed if origin else {}
        if urlsplit(origin).netloc != headers.get("host"):
            raise Refusal(
                403,
                f"pages of {origin!r:.80} may not use this server (--allow-origin allows one)",
                "permission_error",
                code="wrong_origin",
            )
        return {}

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path in FREE or path.startswith("/page/"):
            return
        given = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            raise Refusal(
                401,
                "this server needs its key; send it as Authorization: Bearer KEY",
                "authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        """Receives no more bytes than a body may have."""
        refusal = Refusal(
            413, f"the body has more than the {self._most:,} bytes that one may have here", code="body_too_large"
        )
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._most:
            raise refusal
        got = 0

        async def bounded() -> Any:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self._most:
                raise refusal
            return message

        return bounded


def _host(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
