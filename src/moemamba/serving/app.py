"""The server's paths."""

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from .. import __version__
from ..inference import Request as Asked
from .guard import Guard
from .openai.bodies import Body, Chat, Completion, Detokenize, Fork, NewState, Routed, Tokenize, prompts_of, read_body
from .openai.completions import Job, answer, continued, encoded, pieces, routing_shown, spoken
from .refusal import Refusal, failed, invalid, unavailable
from .service import Service
from .states import brought, written
from .stream import begun, while_connected

PAGE = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
IGNORED = "x-moemamba-ignored"
LEFT = 499
"""the status of an answer that nobody waits for, as in nginx"""


class Server:
    """What the paths answer from.

    Attributes:
        service: the model that answers; None while it is loaded.
        progress: what is being loaded.
    """

    def __init__(self) -> None:
        self.service: Service | None = None
        self.progress = "loading"

    @property
    def ready(self) -> Service:
        """The model that answers; raises Refusal while there is none."""
        if self.service is None:
            raise unavailable(f"the model is not ready yet ({self.progress}); try again later", "loading")
        return self.service


def make_app(
    server: Server, *, hosts: Sequence[str] | None, key: str | None, origins: Sequence[str], most: int
) -> ASGIApp:
    """The server as an ASGI app; see `Guard`."""

    def path(name: str, *methods: tuple[str, Callable[[Server, Request], Awaitable[Response]]]) -> Route:
        by_method = dict(methods)

        async def handle(request: Request) -> Response:
            method = "GET" if request.method == "HEAD" else request.method  # the same without its body
            response = await by_method[method](server, request)
            if ignored := getattr(request.state, "ignored", None):
                names = ", ".join(re.sub("[^!-~]", "?", each) for each in ignored)  # a header has no other characters
                response.headers[IGNORED] = names[:1000]
            return response

        return Route(name, handle, methods=list(by_method))

    routes = [
        path("/v1/completions", ("POST", completions)),
        path("/v1/chat/completions", ("POST", chat)),
        path("/v1/embeddings", ("POST", embeddings)),
        path("/v1/models", ("GET", models)),
        path("/v1/models/{name:path}", ("GET", one_model)),
        path("/v1/states", ("GET", states), ("POST", new_state), ("PUT", bring_state)),
        path("/v1/states/{id}", ("GET", one_state), ("DELETE", delete_state)),
        path("/v1/states/{id}/content", ("GET", take_state)),
        path("/v1/states/{id}/fork", ("POST", fork_state)),
        path("/v1/routing", ("POST", routing)),
        path("/tokenize", ("POST", tokenize)),
        path("/detokenize", ("POST", detokenize)),
        path("/tokenizer_info", ("GET", tokenizer_info)),
        path("/health", ("GET", health)),
        path("/metrics", ("GET", metrics)),
        path("/v1/stats", ("GET", stats)),
        path("/", ("GET", page)),
        path("/page/{name}", ("GET", page)),
    ]
    handlers: Any = {HTTPException: not_there, Refusal: refused, ClientDisconnect: left, Exception: broken}
    inner = Starlette(
        routes=routes,
        exception_handlers=handlers,
    )
    return Guard(inner, hosts, key, origins, most)


async def refused(_: Request, error: Refusal) -> Response:
    """One sentence in OpenAI's form."""
    return JSONResponse(error.body, error.status, error.headers)


async def left(_: Request, error: ClientDisconnect) -> Response:
    """The client went before it had sent its body; nobody reads this."""
    return Response(status_code=LEFT)


async def not_there(request: Request, error: HTTPException) -> Response:
    """A path or a method that there is not."""
    message = f"there is nothing at {request.url.path!r:.120}" if error.status_code == 404 else str(error.detail)
    if error.status_code == 405:
        message = f"{request.url.path} does not take {request.method[:20]}"
    return await refused(request, Refusal(error.status_code, message).with_headers(dict(error.headers or {})))


async def broken(request: Request, error: Exception) -> Response:
    """A fault of this program: a sentence for the client, the traceback for the log."""
    return await refused(request, failed(f"the server has a fault ({type(error).__name__}); please report it"))


# Completions


async def completions(server: Server, request: Request) -> Response:
    """`POST /v1/completions`."""
    body = await _read(Completion, request)
    return await _answered(request, await continued(server.ready, body))


async def chat(server: Server, request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    body = await _read(Chat, request)
    return await _answered(request, await spoken(server.ready, body))


async def embeddings(server: Server, _: Request) -> Response:
    """Refused by name: base models give poor ones."""
    raise invalid("embeddings are not supported: this server continues texts", code="not_supported")


async def _answered(request: Request, job: Job) -> Response:
    if job.body.stream:
        return await begun(pieces(job, await job.requests()))
    found = await while_connected(request, answer(job))
    return Response(status_code=LEFT) if found is None else _json(found)


# States and routing


async def states(server: Server, _: Request) -> Response:
    """`GET /v1/states`."""
    service = server.ready
    kept = [service.states.shown(each, service.name, service.fingerprint) for each in service.states.all()]
    return _json({"object": "list", "data": kept, "bytes": service.states.nbytes, "limit": service.states.limit})


async def new_state(server: Server, request: Request) -> Response:
    """`POST /v1/states`: read a text, and keep what it leaves."""
    service, body = server.ready, await _read(NewState, request)
    service.check_model(body.model)
    parent = None if body.from_ is None else service.states.get(body.from_)
    if (body.prompt is None) == (body.tokens is None) and parent is None:
        raise invalid("give the text to read as prompt, or its tokens", "prompt")
    (prompt,) = _single(body.tokens if body.tokens is not None else body.prompt)
    ids = await encoded(service, prompt)
    start = None if parent is None else parent.snapshot
    if not ids and start is None:
        ids = [service.tokenizer.end_of_text]
    service.check_prompt(ids, 0, start)

    async def work() -> Response:
        (reading,) = await service.read([Asked(ids, 0, start=start, keep=True)])
        assert reading.snapshot is not None
        kept = service.states.add(reading.snapshot, None if parent is None else parent.id)
        return _json({**service.states.shown(kept, service.name, service.fingerprint), "cached_tokens": reading.cached})

    return await while_connected(request, work()) or Response(status_code=LEFT)


async def one_state(server: Server, request: Request) -> Response:
    """`GET /v1/states/{id}`."""
    service = server.ready
    kept = service.states.get(request.path_params["id"])
    return _json(service.states.shown(kept, service.name, service.fingerprint))


async def delete_state(server: Server, request: Request) -> Response:
    """`DELETE /v1/states/{id}`."""
    name = request.path_params["id"]
    server.ready.states.remove(name)
    return _json({"id": name, "object": "state", "deleted": True})


async def take_state(server: Server, request: Request) -> Response:
    """`GET /v1/states/{id}/content`: the state as a safetensors file."""
    service = server.ready
    kept = service.states.get(request.path_params["id"])
    headers = {"content-disposition": f'attachment; filename="{kept.id}.safetensors"'}
    return Response(written(kept.snapshot, service.fingerprint), 200, headers, "application/octet-stream")


async def bring_state(server: Server, request: Request) -> Response:
    """`PUT /v1/states`: such a file."""
    service, data = server.ready, await request.body()
    (reading,) = await service.read([Asked([service.tokenizer.end_of_text], 0, keep=True)])
    assert reading.snapshot is not None
    snapshot = brought(data, reading.snapshot, service.fingerprint, service.vocabulary)
    return _json(service.states.shown(service.states.add(snapshot), service.name, service.fingerprint))


async def fork_state(server: Server, request: Request) -> Response:
    """`POST /v1/states/{id}/fork`: more names for one state, which costs nothing."""
    service, body = server.ready, await _read(Fork, request, b"{}")
    kept = service.states.get(request.path_params["id"])
    made = [service.states.add(kept.snapshot, kept.id) for _ in range(body.copies)]
    return _json(
        {
            "object": "list",
            "data": [service.states.shown(each, service.name, service.fingerprint) for each in made],
        }
    )


async def routing(server: Server, request: Request) -> Response:
    """`POST /v1/routing`: which experts the tokens of a text visit."""
    service, body = server.ready, await _read(Routed, request)
    service.check_model(body.model)
    start = None if body.state is None else service.states.get(body.state).snapshot
    (prompt,) = _single(body.prompt)
    ids = await encoded(service, prompt) or [service.tokenizer.end_of_text]
    service.check_prompt(ids, 0, start)

    async def work() -> Response:
        (reading,) = await service.read([Asked(ids, 0, start=start, routing=True, prompt_logprobs=0)])
        scores = [each.logprob for each in reading.scores or []]
        return _json(
            {
                "object": "routing",
                "model": service.name,
                "tokens": ids,
                "strings": [service.spelling(each) for each in ids],
                "token_logprobs": [None] * (len(ids) - len(scores)) + scores,
                **routing_shown(service, reading),
            }
        )

    return await while_connected(request, work()) or Response(status_code=LEFT)


def _single(prompt: Any) -> Sequence[str | list[int]]:
    found = prompts_of(prompt)
    if len(found) != 1:
        raise invalid("give one prompt", "prompt")
    return found


# What the model is


async def models(server: Server, _: Request) -> Response:
    """`GET /v1/models`."""
    return _json({"object": "list", "data": [_model(server.ready)]})


async def one_model(server: Server, request: Request) -> Response:
    """`GET /v1/models/{name}`."""
    server.ready.check_model(request.path_params["name"])
    return _json(_model(server.ready))


def _model(service: Service) -> dict[str, Any]:
    config = service.model.config
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "moemamba",
        "fingerprint": service.fingerprint,
        "max_model_len": service.limits.max_prompt + service.limits.max_tokens,
        "max_tokens": service.limits.max_tokens,
        "chat": service.template is not None,
        "pattern": config.pattern,
        "n_blocks": config.n_blocks,
        "d_model": config.d_model,
        "vocab_size": config.vocab_size,
        "routers": [
            {"name": name, "n_experts": each.count, "top_k": each.top_k}
            for name, each in zip(service.model.router_names, config.routers, strict=True)
        ],
        "version": __version__,
    }


async def tokenize(server: Server, request: Request) -> Response:
    """`POST /tokenize`: as lm-eval asks."""
    service, body = server.ready, await _read(Tokenize, request)
    ids = await encoded(service, body.prompt)
    most = service.limits.max_prompt + service.limits.max_tokens
    return _json(
        {"tokens": ids, "count": len(ids), "max_model_len": most, "strings": [service.spelling(each) for each in ids]}
    )


async def detokenize(server: Server, request: Request) -> Response:
    """`POST /detokenize`."""
    service, body = server.ready, await _read(Detokenize, request)
    try:
        return _json({"prompt": service.tokenizer.decode(body.tokens)})
    except ValueError as error:
        raise invalid(str(error), "tokens") from error


async def tokenizer_info(server: Server, _: Request) -> Response:
    """`GET /tokenizer_info`: what lm-eval asks before it begins."""
    service = server.ready
    end = service.spelling(service.tokenizer.end_of_text)
    template = None if service.template is None else service.template.source
    return _json({"eos_token": end, "bos_token": end, "pad_token": end, "chat_template": template})


# How it goes


async def health(server: Server, _: Request) -> Response:
    """`GET /health`: 200, or 503 while the model is loaded and before the server stops."""
    if server.ready.draining:
        raise unavailable("the server is about to stop", "draining")
    return _json({"status": "ok"})


async def stats(server: Server, _: Request) -> Response:
    """`GET /v1/stats`: for the page."""
    service = server.ready
    load = [{"layer": name, "load": values} for name, values in _load(service)]
    return _json({"object": "stats", **_gauges(service), "experts": load, "draining": service.draining})


async def metrics(server: Server, _: Request) -> Response:
    """`GET /metrics`: in Prometheus' text format."""
    service = server.ready
    text = service.metrics.text(_gauges(service), _load(service))
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _gauges(service: Service) -> dict[str, float]:
    engine, cache = service.worker.engine, service.cache
    return {
        "num_requests_running": service.limits.slots - engine.free,
        "num_requests_waiting": max(0, service.worker.pending - (service.limits.slots - engine.free)),
        "slots": service.limits.slots,
        "slots_in_use": service.limits.slots - engine.free,
        "rows_decoding": engine.live,
        "generated_tokens_total": engine.generated,
        "prefix_cache_queries_total": cache.queries,
        "prefix_cache_hits_total": cache.hits,
        "state_cache_bytes": cache.nbytes,
        "state_cache_states": len(cache),
        "kept_states": len(service.states),
        "kept_state_bytes": service.states.nbytes,
    }


def _load(service: Service) -> list[tuple[str, list[float]]]:
    load = [each.tolist() for each in service.worker.engine.load]
    return list(zip(service.model.router_names, load, strict=True)) if load else []


# The page


async def page(_: Server, request: Request) -> Response:
    """`GET /` and its files."""
    name = request.path_params.get("name", "index.html")
    ending = name[name.rfind(".") :]
    file = files(__package__).joinpath("page", name)
    if "/" in name or "\\" in name or name.startswith(".") or ending not in PAGE or not file.is_file():
        raise Refusal(404, f"there is nothing at {request.url.path!r:.120}")
    headers = {"content-security-policy": POLICY, "cache-control": "no-cache"}
    return Response(file.read_bytes(), 200, headers, PAGE[ending])


async def _read(kind: type[Body], request: Request, empty: bytes = b"") -> Body:
    """The body of a request; the answer names the fields that it does not know."""
    body, request.state.ignored = read_body(kind, await request.body() or empty)
    return body


def _json(values: dict[str, Any]) -> Response:
    data = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(data, media_type="application/json")
