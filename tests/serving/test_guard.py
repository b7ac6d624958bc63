"""Who may ask, and what is said to whom may not; hostile requests get a status and a sentence, and the server lives."""

import json
import logging
import socket
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import running, small

from moemamba.serving.openai.bodies import Completion

MODEL = small()


@pytest.fixture(scope="module")
def server():
    limits = {"slots": 2, "max_body": 20_000, "max_prompt": 3000, "max_tokens": 50}
    with running(MODEL, origins=("https://good.example",), hosts=("alias.example",), **limits) as made:
        yield made


@pytest.fixture(scope="module")
def locked():
    with running(MODEL, key="se cret") as made:
        yield made


def test_the_key(locked):
    keyless = type(locked)(locked.port)
    for path in ("/v1/models", "/metrics", "/v1/stats", "/v1/states", "/tokenizer_info"):
        status, answer = keyless.ask("GET", path)
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert locked.raw("GET", path)[0] == 200
    for given_key in ("x", "Bearer", "Bearer se", "bearer se cret", "Basic se cret", "Bearer s\xe9"):
        assert keyless.raw("GET", "/v1/models", headers={"authorization": given_key})[0] == 401
    assert keyless.raw("GET", "/health")[0] == keyless.raw("GET", "/")[0] == 200
    assert keyless.raw("GET", "/page/../../config.py")[0] == 404


def test_names_of_the_server(server):
    for host, status in [
        ("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:9", 200), ("alias.example", 200), ("LOCALHOST.", 200),
        ("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.evil", 421), ("[::", 421), ("", 421),
    ]:  # fmt: skip
        assert server.raw("GET", "/v1/models", headers={"host": host})[0] == status, host


def test_pages_of_other_sites(server):
    own = f"http://127.0.0.1:{server.port}"
    for origin, status in [(own, 200), ("https://good.example", 200), ("https://evil.example", 403), ("null", 403)]:
        found, headers, _ = server.raw("POST", "/tokenize", '{"prompt":"x"}', {"origin": origin})
        assert found == status, origin
        assert headers.get("access-control-allow-origin") == (origin if "good" in origin else None)
    ask = {"origin": "https://good.example", "access-control-request-method": "POST"}
    status, headers, _ = server.raw("OPTIONS", "/v1/completions", headers=ask)
    assert status == 204 and "authorization" in headers["access-control-allow-headers"]
    assert server.raw("OPTIONS", "/v1/completions", headers={**ask, "origin": "https://evil.example"})[0] == 403


def test_the_page_and_its_policy(server):
    status, headers, body = server.raw("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html") and b"<html" in body
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    for path in ("/page/../app.py", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/.html", "/page/x.js", "/page/",
                 "/page/..\\app.py", "//etc/passwd", "/page/index.html%00.js"):  # fmt: skip
        status, _, body = server.raw("GET", path)
        assert status in (404, 400) and b"import" not in body, path


def test_sizes(server):
    big = json.dumps({"prompt": "x" * 30_000})
    status, _, answer = server.raw("POST", "/v1/completions", big)
    assert status == 413 and json.loads(answer)["error"]["code"] == "body_too_large"
    pieces = (big[k : k + 1000].encode() for k in range(0, len(big), 1000))
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/v1/completions", pieces, {"transfer-encoding": "chunked"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    status, error = server.refused("/v1/completions", prompt="x" * 3001)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    status, error = server.refused("/v1/completions", prompt="x", max_tokens=51)
    assert status == 400 and "50 are the most" in error["message"]
    status, error = server.refused("/v1/completions", prompt=["x"] * 65)
    assert status == 400


def test_heads(server):
    for path in ("/", "/health", "/v1/models", "/metrics", "/v1/states"):
        status, headers, body = server.raw("HEAD", path)
        assert status == 200 and body == b"" and int(headers["content-length"]) > 0, path
    assert server.raw("HEAD", "/v1/completions")[0] == 405


def test_who_leaves_before_the_body_is_there(server, caplog):
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)  # it tells nobody else
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{"pr')
        time.sleep(0.1)
    assert server.ask("GET", "/v1/stats")[1]["slots_in_use"] == 0
    time.sleep(0.1)
    logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert not caplog.records, "a log is for faults of this program"


def test_what_can_never_run(server):
    with running(MODEL, slots=2, max_waiting=3) as narrow:
        status, error = narrow.refused("/v1/completions", prompt="x", n=6)
        assert status == 400 and error["message"] == (
            "the request asks for 6 answers, and 5 are the most here at once; ask for fewer"
        )
        assert len(narrow.post("/v1/completions", prompt="x", n=5, max_tokens=1)["choices"]) == 5
    status, error = server.refused("/v1/completions", prompt="x", seed=10**200)
    assert status == 400 and "a number has 201 digits" in error["message"]


def test_what_is_not_known_is_named(server):
    for path, body in [
        ("/v1/completions", {"prompt": "x", "max_tokens": 1}), ("/v1/states", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1, "stream": True}), ("/tokenize", {"prompt": "x"}),
        ("/v1/routing", {"prompt": "x"}), ("/detokenize", {"tokens": [65]}),
    ]:  # fmt: skip
        strange = {"zeta": 1, "é\r\nset-cookie: a=b": None, "from_": 1}
        status, headers, answer = server.raw("POST", path, json.dumps({**body, **strange}))
        assert status == 200 and headers["x-moemamba-ignored"] == "from_, zeta, ???set-cookie:?a=b", answer
        assert "set-cookie" not in headers
        assert "x-moemamba-ignored" not in server.raw("POST", path, json.dumps(body))[1]
    long = {"prompt": "x", **dict.fromkeys(("x" * 900 + str(k) for k in range(9)), 1)}
    status, headers, _ = server.raw("POST", "/tokenize", json.dumps(long))
    assert status == 200 and len(headers["x-moemamba-ignored"]) == 1000


def test_methods_and_paths(server):
    for method, path, expected in [
        ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("POST", "/", 405), ("GET", "/v1", 404),
        ("PUT", "/v1/states/x", 405), ("BREW", "/v1/completions", 405), ("GET", "/v1/states/" + "x" * 5000, 404),
        ("GET", "/v1/models/other", 404), ("POST", "/v1/states/none/fork", 404), ("GET", "/%ff%fe", 404),
    ]:  # fmt: skip
        status, _, answer = server.raw(method, path)
        assert status == expected and json.loads(answer)["error"]["message"], (method, path, status, answer)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
NAMES = [
    "model", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "stream", "stream_options", "logprobs",
    "echo", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "suffix", "best_of", "user", "top_k",
    "min_p",
    "stop_token_ids", "ignore_eos", "return_token_ids", "return_routed_experts", "state", "return_state",
    "response_format", "messages", "tokens", "from", "copies", "top_logprobs", "tools",
]  # fmt: skip
PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/states", "/v1/routing", "/tokenize", "/detokenize",
         "/v1/embeddings", "/v1/states/x/fork"]  # fmt: skip
SLOWLY = [HealthCheck.too_slow, HealthCheck.data_too_large]


def hostile(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=SLOWLY)


def check(server, status, answer):
    assert status in (200, 400, 404, 413), (status, answer)
    assert b"Traceback" not in answer
    if status != 200:
        error = json.loads(answer)["error"]
        assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 500, error


BODIES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), JSON, max_size=5).map(
    lambda body: {"max_tokens": 2, "prompt": "x", **body}
)
STREAMING = {"/v1/completions", "/v1/chat/completions"}
"""elsewhere `stream` is a field that nobody knows"""


@settings(max_examples=100, deadline=None)
@given(
    temperature=st.floats(0, 2), top_p=st.floats(0, 1), top_k=st.none() | st.integers(-1, 1 << 31),
    min_p=st.none() | st.floats(0, 1), presence_penalty=st.floats(-2, 2), frequency_penalty=st.floats(-2, 2),
)  # fmt: skip
def test_what_a_body_may_say_can_be_sampled(**fields):
    chosen = Completion(**fields).sampling
    assert chosen.top_k is None or chosen.top_k == fields["top_k"]
    assert chosen.temperature in (0.0, fields["temperature"])


def objects(server, path, body):
    status, headers, answer = server.raw("POST", path, json.dumps(body))
    streams = headers["content-type"].startswith("text/event-stream")
    if status == 200:
        assert streams == (path in STREAMING and body.get("stream") is True)
        ignored = headers.get("x-moemamba-ignored", "").split(", ")
        assert ("stream" in ignored) == (path not in STREAMING and "stream" in body)
    if streams:
        assert answer.endswith(b"data: [DONE]\n\n") or b'"error"' in answer
    else:
        json.loads(answer)
        check(server, status, answer)


def noise(server, path, body, headers):
    status, _, answer = server.raw("POST", path, body, headers)
    check(server, status, answer)


NOISE = st.binary(max_size=60) | st.sampled_from([
    b"", b"null", b"[]", b'{"prompt":"\\ud800"}', b'{"prompt":"x","temperature":NaN}', b'{"prompt":"x","n":1e400}',
    b"[" * 15_000, b'{"a":' * 3000, b'{"prompt":"\xff"}', b"\xef\xbb\xbf{}",
    b'{"prompt":"x","max_tokens":9999999999999}',
    b'{"prompt":["a",1]}', b'{"prompt":[[1],["a"]]}', b'{"prompt":[true]}', b'{"prompt":[-1]}', b'{"prompt":[257]}',
    b'{"prompt":"x","stop":["a","b",""]}', b'{"prompt":"x","logit_bias":{"-1":1}}', b'{"prompt":"x","seed":1.5}',
])  # fmt: skip
HEADERS = st.dictionaries(
    st.sampled_from(["content-type", "accept", "user-agent", "x-y", "cookie", "accept-encoding", "expect"]),
    st.text("abc;=/*,é100-", max_size=20).map(lambda value: value.strip()),
    max_size=3,
)


@hostile(150)
@given(st.sampled_from(PATHS), BODIES)
def test_hostile_objects(server, path, body):
    objects(server, path, body)


@hostile(100)
@given(st.sampled_from(PATHS), NOISE, HEADERS)
def test_hostile_bytes(server, path, body, headers):
    noise(server, path, body, headers)


@pytest.mark.slow
@hostile(3000)
@given(st.sampled_from(PATHS), BODIES)
def test_many_hostile_objects(server, path, body):
    objects(server, path, body)


@pytest.mark.slow
@hostile(2000)
@given(st.sampled_from(PATHS), NOISE, HEADERS)
def test_much_hostile_noise(server, path, body, headers):
    noise(server, path, body, headers)


@hostile(60)
@given(
    st.binary(max_size=200) | st.just(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
)
def test_what_is_no_http(server, sent):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(sent + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert b"Traceback" not in answer and (not answer or answer.startswith(b"HTTP/1.1 "))
    assert server.ask("GET", "/health")[0] == 200


def test_the_server_lives(server):
    """After all of the above: no slot is taken, and it answers."""
    assert server.post("/v1/completions", prompt="x", max_tokens=3)["usage"]["completion_tokens"] <= 3
    assert server.ask("GET", "/v1/stats")[1]["slots_in_use"] == 0
