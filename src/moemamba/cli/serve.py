"""`moemamba serve`: a server that OpenAI's clients know how to talk to, and a page to look at."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..host.terminal import say
from ..marks import option
from ..reading import validate
from ..serving.config import ACCESS, FIRST, PACE, Limits
from .loading import Loading
from .options import Merged, Place, Positional, Repeated
from .terminal import parse

NEEDS = 'serving needs starlette and uvicorn; install them with: pip install "moemamba[serve]"'


@dataclass(frozen=True)
class Serve:
    """Answer requests over HTTP, in the form of OpenAI's API, and show a page at /."""

    run: Positional[Place]
    """a run directory or a checkpoint"""
    host: str = option("127.0.0.1", FIRST)
    """address to answer at; 0.0.0.0 lets the network in, which asks for --api-key"""
    port: int = option(8000, FIRST)
    """port to answer at; 0 takes one that is free, which is shown"""
    served_model_name: str | None = option(None, FIRST)
    """what clients call the model; the name of the run's folder if None"""
    api_key: str | None = option(None, FIRST)
    """a key that clients must send; or MOEMAMBA_API_KEY in the environment, which no list of processes shows"""
    allow_host: Repeated[tuple[str, ...]] = option((), ACCESS)
    """a name by which the server may be called, besides localhost; give the option again for more than one"""
    allow_origin: Repeated[tuple[str, ...]] = option((), ACCESS)
    """a site whose pages may use the server, such as https://example.org; give the option again for more than one"""
    chat_template: Place | None = option(None, FIRST)
    """a Jinja file that makes a prompt of a conversation; that of the model if None"""
    limits: Merged[Limits] = field(default_factory=Limits)
    drain: float = option(30.0, PACE)
    """seconds that answers under way get once the server has to stop (SIGTERM or Ctrl-C)"""
    loading: Merged[Loading] = option(factory=Loading, group=FIRST, shows=("device", "weights"))

    def __post_init__(self) -> None:
        validate(self, not_negative=("drain",))
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port is {self.port}; it must be from 0 to 65535")


def main(arguments: Sequence[str]) -> None:
    asked = parse(Serve, arguments, "serve")
    from ..checkpoint import find_model
    from ..host.files import expanded

    try:
        from ..serving import running
    except ImportError as error:
        raise ValueError(NEEDS) from error
    folder = find_model(expanded(asked.run))
    path = expanded(asked.run).resolve()
    place = running.Place(
        asked.host,
        asked.port,
        asked.api_key or os.environ.get("MOEMAMBA_API_KEY") or None,
        asked.allow_host,
        asked.allow_origin,
        asked.drain,
    )

    def load(tell: Callable[[str], None]) -> dict[str, Any]:
        return _loaded(folder, asked, asked.served_model_name or path.name, tell)

    running.serve(place, asked.limits, load, say)


def _loaded(folder: Any, asked: Serve, name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """The model and what goes with it."""
    from ..checkpoint import checksums
    from ..serving.openai.templates import find_template

    tell(f"loading {folder}")
    model, tokenizer = asked.loading.load(folder)
    return {
        "model": model.requires_grad_(False),
        "tokenizer": tokenizer,
        "name": name,
        "checksums": checksums(folder) | ({"weights": 8} if asked.loading.weights else {}),
        "template": find_template(folder, asked.chat_template, tokenizer),
    }
