"""Server-sent events, to readers that may be slow or leave."""

import asyncio
import math
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .alarm import Alarm

Result = TypeVar("Result")
SLOW = 30.0
"""seconds after which a reader that takes nothing is given up"""
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class EventStream(Response):
    """Pieces as they come. The first has been made before anything is sent, so that it may still refuse.

    Args:
        pieces: closed when the reader leaves.
    """

    def __init__(self, pieces: AsyncIterator[bytes]):
        super().__init__(b"", headers=HEADERS)
        del self.headers["content-length"]
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        slow = Alarm(lambda: task.cancel())
        task = asyncio.create_task(self._send(send, slow))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            slow.stop()
            for each in (task, gone):
                each.cancel()
                with suppress(asyncio.CancelledError, OSError):
                    await each

    async def _send(self, send: Send, slow: Alarm) -> None:
        async with aclosing(self._pieces) as pieces:  # type: ignore[type-var]
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in pieces:
                if piece:
                    slow.set(SLOW)
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    slow.set(math.inf)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def begun(pieces: AsyncIterator[bytes]) -> EventStream:
    """A stream whose first piece is there; raises what making it raises."""
    first = await anext(pieces)
    return EventStream(_after(first, pieces))


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What some work returns, or None, the work being cancelled, if the client has left before."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _after(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(pieces):  # type: ignore[type-var]
        yield first
        async for piece in pieces:
            yield piece


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
