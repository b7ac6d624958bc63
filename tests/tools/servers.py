"""A server in this process, and plain HTTP to talk to it."""

import contextlib
import http.client
import json
import threading

import torch

from moemamba import ModelConfig, MoEMamba
from moemamba.config import ExpertsConfig
from moemamba.serving.config import Limits
from moemamba.serving.openai.templates import Template
from moemamba.serving.running import Place, serve
from moemamba.text import ByteTokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


def small(pattern="ME", vocab_size=257, seed=0):
    """A model with lively weights."""
    torch.manual_seed(seed)
    config = ModelConfig(pattern, 2, 32, vocab_size=vocab_size, experts=ExpertsConfig(4, top_k=2))
    model = MoEMamba(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


class Server:
    """Talks to a server at a port of this machine."""

    def __init__(self, port, key=None):
        self.port, self.key = port, key
        self.url = f"http://127.0.0.1:{port}"

    def raw(self, method, path, body=None, headers=None):
        """(status, headers, bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        own = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            connection.request(method, path, body, {**own, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def ask(self, method, path, body=None, headers=None):
        """(status, JSON)."""
        data = None if body is None else json.dumps(body)
        status, _, answer = self.raw(method, path, data, headers)
        return status, json.loads(answer)

    def post(self, path, **body):
        """The answer, which must be one."""
        status, answer = self.ask("POST", path, body)
        assert status == 200, answer
        return answer

    def refused(self, path, **body):
        """(status, the error)."""
        status, answer = self.ask("POST", path, body)
        assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}, answer
        return status, answer["error"]

    def stream(self, path, **body):
        """Every event of a stream."""
        status, headers, answer = self.raw("POST", path, json.dumps({**body, "stream": True}))
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), answer
        events = [each for each in answer.decode().split("\n\n") if each and not each.startswith(":")]
        assert all(each.startswith("data: ") for each in events)
        return [each if each == "[DONE]" else json.loads(each) for each in (each[6:] for each in events)]


@contextlib.contextmanager
def running(model, tokenizer=None, key=None, template=None, hosts=(), origins=(), host="127.0.0.1", **limits):
    """A server of a model; its service too, as `Server.service`."""
    tokenizer = tokenizer or ByteTokenizer()
    ready, lines, held, failure = threading.Event(), [], {}, []

    @contextlib.contextmanager
    def until(stop):
        import asyncio

        held.update(stop=stop, loop=asyncio.get_running_loop())
        yield

    def load(tell):
        tell("loading")
        made = None if template is None else Template(template, tokenizer)
        return {"model": model, "tokenizer": tokenizer, "name": "small", "checksums": {}, "template": made}

    def say(text):
        lines.append(text)
        if " answers at " in text:
            ready.set()

    def work():
        try:
            serve(Place(host, 0, key, hosts, origins, 10), Limits(**limits), load, say, until)
        except BaseException as error:
            failure.append(error)
            ready.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(120) and not failure, failure
    address = next(line for line in lines if " answers at " in line).split(" answers at ")[1].split(",")[0]
    try:
        yield Server(int(address.rsplit(":", 1)[1]), key)
    finally:
        held["loop"].call_soon_threadsafe(held["stop"].set)
        thread.join(30)
        assert not thread.is_alive() and not failure, failure
