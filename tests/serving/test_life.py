"""The life of a server as a process: it says what it does, answers, drains at SIGTERM; a long day of many clients."""

import asyncio
import errno
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from servers import Server, small

from moemamba import cli, save
from moemamba.text import ByteTokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "mine"
    save(folder, small(), ByteTokenizer())
    return folder


@contextmanager
def process(run, *words):
    """A server's process, and how to talk to it."""
    command = [sys.executable, "-m", "moemamba", "serve", str(run), "--port", "0", "--device", "cpu", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as made:
        try:
            said = []
            for line in made.stderr:
                said.append(line)
                if found := re.search(r"answers at http://127.0.0.1:(\d+), API", line):
                    break
            else:
                raise AssertionError(said)
            assert any("loading" in line for line in said)
            yield made, Server(int(found[1]))
        finally:
            made.kill()


def test_sigterm_lets_answers_end(run):
    with process(run, "--served-model-name", "named", "--max-tokens", "3000") as (made, server):
        assert server.ask("GET", "/v1/models")[1]["data"][0]["id"] == "named"
        connection = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps({"prompt": "x", "max_tokens": 600, "stream": True, "ignore_eos": True})
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: "
        connection.sendall(f"{head}{len(body)}\r\n\r\n{body}".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        made.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        status, _, answer = server.raw("POST", "/v1/completions", '{"prompt": "x"}')
        assert status == 503 and b"about to stop" in answer
        assert server.raw("GET", "/health")[0] == 503
        stream = b""
        while piece := connection.recv(1 << 16):
            stream += piece
            if b"[DONE]" in stream:
                break
        assert stream.rstrip().endswith(b"[DONE]") or b"data: [DONE]" in stream
        connection.close()
        assert made.wait(30) == 0
        assert "stopping; 1 answers under way" in made.stderr.read()


@pytest.mark.slow
def test_what_takes_too_long_is_cut_off(run):
    with process(run, "--drain", "0.2", "--max-tokens", "100000") as (made, server):
        connection = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps({"prompt": "x", "max_tokens": 90_000, "stream": True, "ignore_eos": True})
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: "
        connection.sendall(f"{head}{len(body)}\r\n\r\n{body}".encode())
        assert connection.recv(1000)
        made.send_signal(signal.SIGINT)
        assert made.wait(30) == 0
        assert "some answers were not finished" in made.stderr.read()
        connection.close()


def test_mistakes_are_said_in_a_sentence(run, tmp_path, monkeypatch, capsys):
    def said(*words):
        monkeypatch.setattr(sys, "argv", ["moemamba", "serve", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, capsys.readouterr().err.strip().splitlines()[-1]

    reason = os.strerror(errno.EADDRINUSE)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, line = said(run, "--port", port)
        assert status == 2
        assert line == f"moemamba: 127.0.0.1:{port} cannot be used ({reason}); choose another with --port, or 0 for any"
    assert said(tmp_path)[0] == 2 and said(run, "--port", "70000")[0] == 2
    status, line = said(run, "--slots", "0")
    assert status == 2 and "slots is 0" in line
    (tmp_path / "t.jinja").write_text("{% for %}")
    status, line = said(run, "--port", "0", "--chat-template", tmp_path / "t.jinja")
    assert status == 2 and "the chat template cannot be read" in line


class Day:
    """Many clients, of whom a fifth leaves at any time; prompts and answers of some lengths."""

    def __init__(self, server, clients, prompts, answers, seed=0):
        self.server, self.clients, self.draw = server, clients, random.Random(seed)
        self.prompts, self.answers = prompts, answers
        self.counts = dict.fromkeys(("done", "left", "full", "stopping", "lost"), 0)
        self.lost = []

    def asked(self):
        prompt = [self.draw.randrange(256) for _ in range(self.draw.choice(self.prompts))]
        body = {"prompt": prompt, "max_tokens": self.draw.choice(self.answers), "stream": self.draw.random() < 0.5}
        body |= self.draw.choice(({}, {"temperature": 0}, {"logprobs": 1}, {"n": 2}, {"prompt": prompt[:4] * 9}))
        return json.dumps(body)

    async def one(self, body, leaves):
        """What became of one request."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        except OSError:
            return "stopping"
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: "
        writer.write(f"{head}{len(body)}\r\n\r\n{body}".encode())
        answer = b""
        with suppress(OSError):
            if leaves:
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1 << 20), self.draw.random() * 0.2)
                writer.transport.abort()
                return "left"
            while piece := await reader.read(1 << 16):
                answer += piece
        writer.close()
        status = answer[9:12]
        if status == b"200" and (b"data: [DONE]" in answer or b'"usage":{' in answer):
            return "done"
        if status == b"429":
            return "full"
        if status == b"503" or not answer:
            return "stopping"
        self.lost.append((body, answer))
        return "lost"

    async def go(self, count):
        left = iter(range(count))

        async def client():
            for _ in left:
                body, leaves = self.asked(), self.draw.random() < 0.2
                while (found := await self.one(body, leaves)) == "full":
                    self.counts["full"] += 1
                    await asyncio.sleep(0.1 * self.draw.random())  # and come again
                self.counts[found] += 1

        await asyncio.gather(*(client() for _ in range(self.clients)))


def resident(process):
    """Bytes of memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) * 1024


def a_day(run, count, clients, prompts, answers):
    with process(run, "--slots", "8", "--max-waiting", "40", "--cache-bytes", "4000000") as (made, server):
        day = Day(server, clients, prompts, answers)
        asyncio.run(day.go(count // 3))
        first = resident(made)
        asyncio.run(day.go(count // 3))
        assert not day.lost and day.counts["stopping"] == 0, day.lost[:1]
        for _ in range(50):
            stats = server.ask("GET", "/v1/stats")[1]
            if stats["slots_in_use"] == stats["num_requests_waiting"] == 0:
                break
            time.sleep(0.1)
        assert stats["slots_in_use"] == stats["num_requests_waiting"] == stats["rows_decoding"] == 0
        assert stats["state_cache_bytes"] <= 4_000_000
        growth = resident(made) / first - 1

        async def ended():
            working = asyncio.create_task(day.go(count // 3))
            enough = day.counts["done"] + count // 10
            while day.counts["done"] < enough:
                await asyncio.sleep(0.01)
            made.send_signal(signal.SIGTERM)
            await working

        asyncio.run(ended())
        assert not day.lost, day.lost[:1]
        assert made.wait(60) == 0 and "Traceback" not in made.stderr.read()
        assert day.counts["done"] > count // 2 and day.counts["left"] > count // 12 and day.counts["stopping"] > 0
        return day.counts, growth


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_a_short_day(run):
    a_day(run, 300, 16, (4, 16, 64), (4, 8, 16))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_a_long_day(run):
    """Nothing is lost, no slot leaks, memory stays: of 1,000 requests, or as many as MOEMAMBA_REQUESTS says."""
    count = int(os.environ.get("MOEMAMBA_REQUESTS", "1000"))
    counts, growth = a_day(run, count, 64, (32, 128, 512), (32, 64, 128))
    print(counts, f"memory {growth:+.2%}")
    assert growth < 0.05
