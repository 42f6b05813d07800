"""What stands in front of the page: bounded requests, three kinds of upload, and headers for browsers."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mmattn_demos.limits import FILES, UPLOAD_BYTES
from mmattn_demos.uploads import SUFFIXES

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

log = logging.getLogger("mmattn.demos")

BODY_BYTES = 256 * 1024
"""Of a request that is no upload: text fields and file names."""

# The page loads nothing from elsewhere, and says so. Gradio's own scripts are inline, and it builds
# functions from text for the `js` of events.
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "no-referrer",
}
_NAME = re.compile(rb'filename\*?="?([^"\r\n;]*)', re.IGNORECASE)


class Guard:
    """ASGI middleware.

    Requests with more than 256 KiB are refused, uploads with more than the allowed bytes or with a file
    that is not called .png, .jpg, .jpeg or .webp too. What such a file contains is checked when it is
    used (`uploads.read_picture`). Requests that the page's framework fails on are answered with 400.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = False

        async def with_headers(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                present = {name.lower() for name, _ in headers}
                for name, value in HEADERS.items():
                    if name.encode() not in present:
                        headers.append((name.encode(), value.encode()))
                message = {**message, "headers": headers}
            await send(message)

        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._answer(scope, receive, with_headers, lambda: begun)
            return
        upload = scope["path"].rstrip("/").endswith("/upload")
        most = FILES * UPLOAD_BYTES + BODY_BYTES if upload else BODY_BYTES
        body = await _body(receive, most)
        if body is None:
            await _refuse(with_headers, 413, f"The request is larger than {most // 1024} KiB.")
            return
        if upload and not _allowed(body):
            await _refuse(
                with_headers, 415, "Only .png, .jpg and .webp pictures can be uploaded here."
            )
            return
        await self._answer(scope, _replay(body, receive), with_headers, lambda: begun)

    async def _answer(
        self, scope: Message, receive: Receive, send: Send, begun: Callable[[], bool]
    ) -> None:
        """Pass on; what the page's framework stumbles over is the request's fault, and no news for it."""
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            if begun():
                raise
            log.warning("%s %s: %s", scope["method"], scope["path"], type(error).__name__)
            await _refuse(send, 400, "This request cannot be answered.")


async def _body(receive: Receive, most: int) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            return None
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def _allowed(body: bytes) -> bool:
    names = [name.strip().lower() for name in _NAME.findall(body)]
    return bool(names) and all(name.endswith(tuple(s.encode() for s in SUFFIXES)) for name in names)


def _replay(body: bytes, receive: Receive) -> Receive:
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
