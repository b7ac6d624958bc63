"""States as objects: read once, gone on from many times, forked, taken away and brought back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import running, small

from moemamba import generate
from moemamba.serving.refusal import Refusal
from moemamba.serving.states import States
from moemamba.text import ByteTokenizer

MODEL, BYTES = small("MA"), ByteTokenizer()


@pytest.fixture(scope="module")
def server():
    with running(MODEL, slots=3) as made:
        yield made


def text(answer):
    return answer["choices"][0]["text"]


def test_a_state_is_gone_on_from_many_times(server):
    state = server.post("/v1/states", prompt="once upon ")
    assert state["tokens"] == 10 and state["bytes"] > 0 and state["parent"] is None and state["object"] == "state"
    whole = server.post("/v1/completions", prompt="once upon a time", max_tokens=12, seed=1)
    for _ in range(2):
        asked = {"prompt": "a time", "state": state["id"], "max_tokens": 12, "seed": 1, "logprobs": 0, "echo": True}
        found = server.post("/v1/completions", **asked)
        assert text(found) == "a time" + text(whole)
        assert found["choices"][0]["logprobs"]["token_logprobs"][0] is not None, "something came before"
        assert found["usage"]["prompt_tokens"] == 16
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] >= 10
    empty = server.post("/v1/completions", state=state["id"], max_tokens=12, temperature=0)
    assert text(empty) == BYTES.decode(generate(MODEL, BYTES.encode("once upon "), 12, stop=256, temperature=0))
    longer = server.post("/v1/states", prompt="a time", **{"from": state["id"]})
    assert longer["tokens"] == 16 and longer["parent"] == state["id"]
    assert longer["text"] and "once upon a time".endswith(longer["text"])
    assert text(server.post("/v1/completions", state=longer["id"], max_tokens=12, seed=1)) == text(whole)


@pytest.mark.parametrize("stop", [None, "a", "the"])
def test_what_an_answer_leaves(server, stop):
    """The state after an answer is that of its text as the client has it, whatever ended it."""
    asked = {"prompt": "hello", "max_tokens": 20, "seed": 8, "stop": stop, "return_token_ids": True}
    plain = server.post("/v1/completions", **asked)["choices"][0]
    first = server.post("/v1/completions", **asked, return_state=True)["choices"][0]
    last = [each for each in server.stream("/v1/completions", **asked, return_state=True) if each != "[DONE]"][-1]
    assert first["text"] == plain["text"] and "state" not in plain
    prompt = BYTES.encode("hello") + first["token_ids"]
    expected = text(server.post("/v1/completions", prompt=prompt, max_tokens=9, temperature=0))
    for state in (first["state"], last["choices"][0]["state"]):
        assert server.ask("GET", f"/v1/states/{state}")[1]["tokens"] == len(prompt)
        assert text(server.post("/v1/completions", state=state, max_tokens=9, temperature=0)) == expected
    again = server.post("/v1/completions", state=first["state"], prompt="x", max_tokens=3, return_state=True, n=2)
    assert all(server.ask("GET", f"/v1/states/{each['state']}")[1]["parent"] for each in again["choices"])


def test_fork_list_delete(server):
    state = server.post("/v1/states", tokens=[1, 2, 3])
    before = server.ask("GET", "/v1/states")[1]
    made = server.post(f"/v1/states/{state['id']}/fork", copies=3)["data"]
    after = server.ask("GET", "/v1/states")[1]
    assert after["bytes"] == before["bytes"], "a fork costs nothing"
    assert len(after["data"]) == len(before["data"]) + 3 and {each["parent"] for each in made} == {state["id"]}
    assert server.ask("DELETE", f"/v1/states/{state['id']}")[1]["deleted"]
    status, error = server.refused("/v1/completions", prompt="x", state=state["id"])
    assert (status, error["code"], error["param"]) == (404, "state_not_found", "state")
    asked = {"prompt": "x", "max_tokens": 5, "temperature": 0}
    assert len({text(server.post("/v1/completions", **asked, state=each["id"])) for each in made}) == 1


def test_a_state_is_a_file(server):
    state = server.post("/v1/states", prompt="take me away")
    status, headers, data = server.raw("GET", f"/v1/states/{state['id']}/content")
    assert status == 200 and state["id"] in headers["content-disposition"]
    server.ask("DELETE", f"/v1/states/{state['id']}")
    status, _, _ = server.raw("PUT", "/v1/states", data)
    assert status == 200
    back = server.ask("GET", "/v1/states")[1]["data"][-1]
    assert (back["tokens"], back["bytes"]) == (state["tokens"], state["bytes"])
    found = server.post("/v1/completions", state=back["id"], max_tokens=9, temperature=0)
    whole = server.post("/v1/completions", prompt="take me away", max_tokens=9, temperature=0)
    assert text(found) == text(whole) and found["usage"]["prompt_tokens_details"]["cached_tokens"] == 12
    with running(small("MA", seed=1)) as other:
        status, _, answer = other.raw("PUT", "/v1/states", data)
        assert status == 200, "the checksums that tell weights apart are the files', which there are none of here"
    with running(small("ME")) as other:
        status, _, answer = other.raw("PUT", "/v1/states", data)
        assert status == 409 and b"of another model" in answer


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_damaged_files_are_refused(server, data):
    if not hasattr(server, "file"):
        state = server.post("/v1/states", prompt="damage")["id"]
        server.file = server.raw("GET", f"/v1/states/{state}/content")[2]
    whole = server.file
    kind = data.draw(st.sampled_from(["cut", "flip", "noise", "longer"]))
    if kind == "cut":
        sent = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "flip":
        place = data.draw(st.integers(0, len(whole) - 1))
        sent = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    else:
        sent = whole * (kind == "longer") + data.draw(st.binary(min_size=1, max_size=50))
    before = len(server.ask("GET", "/v1/states")[1]["data"])
    status, _, answer = server.raw("PUT", "/v1/states", sent)
    if status == 200:  # what nothing depends on, such as spaces
        found = json.loads(answer)
        assert kind == "flip" and (found["tokens"], found["text"]) == (6, "damage")
        return
    assert status in (400, 409) and b'"error"' in answer and b"Traceback" not in answer and b"/tmp" not in answer
    assert len(server.ask("GET", "/v1/states")[1]["data"]) == before


def test_bounds():
    class Sized:
        def __init__(self, nbytes):
            self.nbytes, self.position, self.name = nbytes, 1, str(id(self))

    now = [0.0]
    states = States(100, 10, lambda: now[0])
    first = states.add(Sized(60))
    with pytest.raises(Refusal, match="states may have 100 bytes here, and 60 are in use") as refusal:
        states.add(Sized(60))
    assert refusal.value.status == 429
    now[0] = 9.0
    states.get(first.id)
    now[0] = 18.0
    assert states.add(Sized(40)) and len(states) == 2 and states.nbytes == 100
    now[0] = 19.5
    assert len(states.all()) == 1, "who was not used for long goes"
    with pytest.raises(Refusal, match="there is no state"):
        states.get(first.id)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "fork", "get", "remove", "wait"]), st.integers(0, 9)), max_size=40))
def test_what_states_count(actions):
    """Bytes and order, whatever comes: as if each were counted anew."""
    now, known, used = [0.0], [], {}
    states = States(25, 10, lambda: now[0])

    class Sized:
        def __init__(self, number):
            self.nbytes, self.name = 1 + number % 7, f"{len(used)} {number}"

    def add(snapshot, parent=None):
        try:
            known.append(states.add(snapshot, parent))
        except Refusal:
            assert sum({each.snapshot: each.snapshot.nbytes for each in known}.values()) + snapshot.nbytes > 25
        else:
            used[known[-1].id] = now[0]

    for action, number in actions:
        if action == "wait":
            now[0] += number
        known = [each for each in known if now[0] - used[each.id] <= 10]
        if action == "add":
            add(Sized(number))
        elif known and action != "wait":
            one = known[number % len(known)]
            if action == "fork":
                add(states.get(one.id).snapshot, one.id)
            elif action == "remove":
                states.remove(one.id)
                known.remove(one)
            states.get(one.id) if action == "get" else None
            used[one.id] = now[0]
        assert states.all() == known
        assert states.nbytes == sum({each.snapshot: each.snapshot.nbytes for each in known}.values())
