"""The life of a server: its socket, its model, its end."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn

from ..inference import Request
from .app import Server, make_app
from .config import Limits
from .guard import LOOPBACK
from .service import Service

Say = Callable[[str], None]
Until = Callable[[asyncio.Event], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Place:
    """Where a server answers, and whom."""

    host: str
    port: int
    """0 for any that is free"""
    key: str | None
    hosts: tuple[str, ...]
    """names by which it may be called besides its own"""
    origins: tuple[str, ...]
    """sites whose pages may ask"""
    drain: float
    """seconds that answers under way get once the server has to stop"""

    @property
    def alone(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK

    @property
    def names(self) -> Sequence[str] | None:
        """Names by which it may be called; any where the network reaches it and none are given."""
        return [*LOOPBACK, *self.hosts] if self.alone else list(self.hosts) or None


class _Uvicorn(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address.

    Raises:
        OSError: it is in use, or there is no such address; the message says what would help.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(f"{host}:{port} cannot be used ({reason}); choose another with --port, or 0 for any") from error


@contextlib.contextmanager
def signals(stop: asyncio.Event) -> Iterator[None]:
    """While entered, SIGTERM and SIGINT set the event; a second one ends the process as it would have."""
    loop = asyncio.get_running_loop()
    before: dict[int, Any] = {}

    def receive(number: int, _: object) -> None:
        restore()
        loop.call_soon_threadsafe(stop.set)

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        restore()


def serve(
    place: Place, limits: Limits, load: Callable[[Say], dict[str, Any]], say: Say, until: Until = signals
) -> None:
    """Answer until it is to stop; what is under way then is answered first.

    Args:
        load: makes the arguments of `Service`, and says what it does meanwhile.
        say: shows a line.
        until: while entered, sets the event once the server has to stop.
    Raises:
        OSError, ValueError: what `listen` and `load` raise.
    """
    with listen(place.host, place.port) as bound:
        asyncio.run(_serve(bound, place, limits, load, say, until))


async def _serve(
    bound: socket.socket,
    place: Place,
    limits: Limits,
    load: Callable[[Say], dict[str, Any]],
    say: Say,
    until: Until,
) -> None:
    server = Server()
    app = make_app(server, hosts=place.names, key=place.key, origins=place.origins, most=limits.max_body)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    web = _Uvicorn(config)
    answering = asyncio.create_task(web.serve([bound]))
    stop = asyncio.Event()
    with until(stop):
        try:
            await _begin(server, limits, load, say, stop, place, bound.getsockname()[1])
            if server.service is not None:
                await asyncio.wait({asyncio.ensure_future(stop.wait()), answering}, return_when=asyncio.FIRST_COMPLETED)
                await _end(server.service, place.drain, say)
        finally:
            web.should_exit = True
            await answering


async def _begin(
    server: Server,
    limits: Limits,
    load: Callable[[Say], dict[str, Any]],
    say: Say,
    stop: asyncio.Event,
    place: Place,
    port: int,
) -> None:
    """Load the model, while the server already says that it does."""
    began = time.monotonic()

    def tell(text: str) -> None:
        server.progress = text
        say(text)

    loading = asyncio.create_task(_in_thread(load, tell))
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({loading, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        return
    service = Service(limits=limits, **loading.result())
    tell("preparing kernels")
    await service.read([Request([service.tokenizer.end_of_text] * 2, 0)])
    with service.follow([Request([service.tokenizer.end_of_text], 2)]) as following:
        while following.left:
            await following.some()
    server.service = service
    host = f"[{place.host}]" if ":" in place.host else place.host
    took = time.monotonic() - began
    say(f"{service.name} answers at http://{host}:{port}, API at http://{host}:{port}/v1 ({took:.1f} s)")
    if place.key is None and not place.alone:
        say("anybody who reaches this address may use it; --api-key asks for a key")


async def _end(service: Service, seconds: float, say: Say) -> None:
    count = service.worker.pending
    if count:
        say(f"stopping; {count} answers under way get {seconds:g} seconds")
    if not await service.drain(seconds):
        say("some answers were not finished")
    service.close()


async def _in_thread(load: Callable[[Say], dict[str, Any]], tell: Say) -> dict[str, Any]:
    """What a function returns, in a thread that does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[dict[str, Any]] = loop.create_future()

    def settle(values: dict[str, Any] | None, error: BaseException | None) -> None:
        if not found.done():
            if error is not None:
                found.set_exception(error)
            elif values is not None:
                found.set_result(values)

    def tell_soon(text: str) -> None:
        loop.call_soon_threadsafe(tell, text)

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            try:
                values = load(tell_soon)
            except Exception as error:
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, values, None)

    threading.Thread(target=work, daemon=True, name="load").start()
    return await found
