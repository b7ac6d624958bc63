"""Completions over HTTP, as OpenAI's client and lm-eval ask for them, against the model itself."""

import math

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import TEMPLATE, running, small

from moemamba import generate
from moemamba.text import ByteTokenizer, train_bpe
from moemamba.training.evaluate import evaluate

MODEL, BYTES = small(), ByteTokenizer()
TEXT = "the cat sat on the mat, and the dog sat on the cat, and so on and on. "


@pytest.fixture(scope="module")
def server():
    with running(MODEL, template=TEMPLATE, slots=4, max_tokens=200, max_prompt=5000) as made:
        yield made


@pytest.fixture(scope="module")
def words():
    """A server whose tokens are pieces of words."""
    tokenizer = train_bpe([TEXT * 3], 300)
    with running(small(vocab_size=300), tokenizer, slots=4) as made:
        made.tokenizer = tokenizer
        yield made


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def continued(prompt, count, **sampling):
    return BYTES.decode(generate(MODEL, BYTES.encode(prompt), count, stop=256, **sampling))


def test_the_client_gets_what_the_model_says(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "moemamba"
    found = client.completions.create(model="small", prompt="hello", max_tokens=20, temperature=0)
    assert found.choices[0].text == continued("hello", 20, temperature=0)
    assert found.choices[0].finish_reason == "length" and found.object == "text_completion"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (5, 20, 25)
    again = client.completions.create(model="small", prompt="hello", max_tokens=20, temperature=0.9, seed=5, top_p=0.8)
    assert again.choices[0].text == continued("hello", 20, temperature=0.9, seed=[5], top_p=0.8)
    assert again.usage.prompt_tokens_details.cached_tokens == 5
    assert again.system_fingerprint.startswith("moemamba-")


def test_the_client_streams(client):
    asked = {"model": "small", "prompt": ["hello", "x"], "max_tokens": 12, "n": 2, "seed": 3}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].text != whole.choices[1].text, "samples differ"
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts = [""] * 4
    for chunk in chunks[:-1]:
        assert chunk.usage is None and chunk.id == chunks[0].id
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == ["length"] * 4
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 48


def test_the_client_knows_errors(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt="x")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature is 3") as error:
        client.completions.create(model="small", prompt="x", temperature=3)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="5,000 are the most") as error:
        client.completions.create(model="small", prompt="x" * 5001)
    assert error.value.code == "context_length_exceeded"
    for name, value in (("suffix", "x"), ("best_of", 3)):
        with pytest.raises(openai.BadRequestError, match=f"{name} is not supported"):
            client.completions.create(model="small", prompt="x", **{name: value})
    with pytest.raises(openai.BadRequestError, match="embeddings are not supported"):
        client.embeddings.create(model="small", input="x")


def test_the_client_talks(client):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x"}]
    asked = {"model": "small", "messages": messages, "max_completion_tokens": 10, "temperature": 0}
    prompt = "[user] hello\n[assistant] x\n[assistant] "
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == continued(prompt, 10, temperature=0)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == 10 and all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)
    assert bytes(byte for entry in entries for byte in entry.bytes).decode(errors="replace") == (
        whole.choices[0].message.content
    )
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == whole.choices[0].message.content and chunks[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match=r"a message has '<\|endoftext\|>' in it"):
        client.chat.completions.create(model="small", messages=[{"role": "<|endoftext|>", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match=r"a message has '<\|endoftext\|>' in it"):
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "a<|endoftext|>b"}])
    with pytest.raises(openai.BadRequestError, match="tools are not supported"):
        client.chat.completions.create(**asked, tools=[{"type": "function", "function": {"name": "f"}}])


def test_lm_eval_gets_our_own_figures(server):
    """The request of lm-eval's local-completions, summed as it sums, against `evaluate` and against the logits."""
    ids = BYTES.encode(TEXT)
    answer = server.post(
        "/v1/completions", model="small", prompt=[ids, ids[:30]], temperature=0, max_tokens=1, logprobs=1, seed=7,
        echo=True,
    )  # fmt: skip
    first, second = answer["choices"]
    values = first["logprobs"]["token_logprobs"]
    assert len(values) == len(ids) + 1 and values[0] is None and first["logprobs"]["top_logprobs"][0] is None
    loss = -sum(values[1:-1]) / (len(ids) - 1)
    assert loss == pytest.approx(evaluate(MODEL, _tokens(ids), context=len(ids) - 1).loss, abs=1e-5)
    expected = MODEL(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, top in enumerate(first["logprobs"]["top_logprobs"][1:-1]):
        best = values[place + 1] == max(top.values())
        assert best == (int(expected[place].argmax()) == ids[place + 1]), "greedy, compared as floats"
    assert second["logprobs"]["token_logprobs"][1:30] == pytest.approx(values[1:30], abs=1e-5)


def _tokens(ids):
    import numpy as np

    from moemamba.data.prepared import Tokens

    return Tokens(np.array(ids, np.uint16), np.array([len(ids)]), len(ids))


def test_echo_is_the_prompt_and_offsets_count_characters(words):
    for stream in (False, True):
        asked = {"prompt": TEXT[:40], "max_tokens": 9, "temperature": 0, "logprobs": 2, "echo": True, "n": 2}
        choices = joined(words, asked) if stream else words.post("/v1/completions", **asked)["choices"]
        for choice in choices:
            text, found = choice["text"], choice["logprobs"]
            assert text.startswith(TEXT[:40])
            assert len(found["tokens"]) == len(found["text_offset"]) == len(found["token_logprobs"])
            ids = words.tokenizer.encode(TEXT[:40])
            assert len(found["tokens"]) == len(ids) + 9
            for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
                if "\ufffd" not in text[: offset + 1] and not token.startswith("bytes:"):
                    assert text[offset : offset + len(token)] == token
            assert all(2 <= len(top) <= 3 for top in found["top_logprobs"][1:])
    only = words.post("/v1/completions", prompt=TEXT[:40], max_tokens=0, echo=True)["choices"][0]
    assert only["text"] == TEXT[:40] and only["finish_reason"] == "length" and only["logprobs"] is None


def joined(server, asked):
    """The choices of a stream, put together."""
    made = {}
    for event in server.stream("/v1/completions", **asked)[:-1]:
        for choice in event["choices"]:
            own = made.setdefault(choice["index"], {"text": "", "logprobs": None, "finish_reason": None})
            own["text"] += choice["text"]
            own["finish_reason"] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                own["logprobs"] = own["logprobs"] or {}
                own["logprobs"].setdefault(name, []).extend(values)
    return [made[index] for index in sorted(made)]


STOP = st.text("abcdt he,", min_size=1, max_size=3)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.lists(STOP, max_size=3), st.integers(1, 30), st.integers(0, 9), st.booleans(), st.sampled_from([None, 0, 3]))
def test_a_stream_is_the_whole(words, stops, count, seed, echo, logprobs):
    """Whatever stops it: texts are cut to the character, and nothing of a stop is ever sent."""
    free = words.post("/v1/completions", prompt="the", max_tokens=count, seed=seed, top_p=0.5, echo=echo)
    asked = {
        "prompt": "the", "max_tokens": count, "seed": seed, "top_p": 0.5, "stop": stops or None, "echo": echo,
        "logprobs": logprobs,
    }  # fmt: skip
    (whole,), (streamed,) = words.post("/v1/completions", **asked)["choices"], joined(words, asked)
    assert (whole["text"], whole["finish_reason"]) == (streamed["text"], streamed["finish_reason"])
    assert (whole["logprobs"] or None) == (streamed["logprobs"] or None) or not any(whole["logprobs"].values())
    text = free["choices"][0]["text"]
    begin = 3 if echo else 0
    places = [place for stop in stops if (place := text.find(stop, begin)) >= 0]
    if places and "\ufffd" not in text:
        assert whole["text"] == text[: min(places)] or any(
            text[: len(whole["text"]) + len(stop)].endswith(stop) for stop in stops
        )
        assert whole["finish_reason"] == "stop"
    assert not any(stop in whole["text"][begin:] for stop in stops)


def test_half_characters_are_completed(server):
    """A prompt of tokens that ends within a character: the answer begins with the whole of it, and no piece is half."""
    for stream in (False, True):
        asked = {"prompt": list("né".encode())[:-1], "max_tokens": 1, "logit_bias": {str(0xA9): 100}}
        choice = joined(server, asked)[0] if stream else server.post("/v1/completions", **asked)["choices"][0]
        assert choice["text"] == "é"
    found = server.post("/v1/completions", prompt="x", max_tokens=40, seed=1, temperature=2, logprobs=1)["choices"][0]
    spelled = b"".join(
        bytes([int(each[8:], 16)]) if each.startswith("bytes:") else each.encode()
        for each in found["logprobs"]["tokens"]
    )
    assert spelled.decode(errors="replace") == found["text"]


def test_ways_to_choose(server):
    plain = {"prompt": "abc", "max_tokens": 12}
    greedy = server.post("/v1/completions", **plain, temperature=0)["choices"][0]["text"]
    for other in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1.0}):
        assert server.post("/v1/completions", **plain, **other)["choices"][0]["text"] == greedy
    among_all = server.post("/v1/completions", **plain, seed=1)["choices"][0]["text"]
    for all_of_them in ({"top_k": -1}, {"top_k": 0}, {"top_p": 1}, {"min_p": 0}):
        assert server.post("/v1/completions", **plain, seed=1, **all_of_them)["choices"][0]["text"] == among_all
    biased = server.post("/v1/completions", **plain, temperature=0, logit_bias={"122": 100})["choices"][0]["text"]
    assert biased == "z" * 12
    less = server.post("/v1/completions", **plain, temperature=0, logit_bias={"122": 60}, frequency_penalty=2)
    assert less["choices"][0]["text"] == "z" * 12
    ended = server.post("/v1/completions", **plain, logit_bias={"256": 100}, return_token_ids=True)
    assert ended["choices"][0] | {"logprobs": None} == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "stop", "token_ids": [],
    }  # fmt: skip
    assert ended["usage"]["completion_tokens"] == 1, "what was computed"
    on = server.post("/v1/completions", **plain, logit_bias={"256": 100}, ignore_eos=True)["usage"]
    assert on["completion_tokens"] == 12
    asked = server.post("/v1/completions", **plain, temperature=0, stop_token_ids=[greedy.encode()[0]])
    assert asked["choices"][0]["text"] == "" and asked["choices"][0]["finish_reason"] == "stop"
    seeds = {server.post("/v1/completions", **plain)["choices"][0]["text"] for _ in range(3)}
    assert len(seeds) == 3, "another each time without a seed"
    for prompt in (None, "", [256]):
        empty = server.post("/v1/completions", prompt=prompt, max_tokens=4, temperature=0)
        assert empty["choices"][0]["text"] == BYTES.decode(generate(MODEL, [256], 4, temperature=0))


def test_fields_that_are_not_known_are_named(server):
    status, headers, _ = server.raw("POST", "/v1/completions", '{"prompt":"x","max_tokens":1,"foo":1,"bar":[2]}')
    assert status == 200 and headers["x-moemamba-ignored"] == "bar, foo"


def test_json_keeps_to_its_schema(server):
    import json

    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    for seed in range(4):
        choice = server.post("/v1/completions", prompt="x", max_tokens=60, seed=seed, response_format=form)["choices"][
            0
        ]
        found = json.loads(choice["text"])
        assert choice["finish_reason"] == "stop" and 0 <= found["a"] <= 99 and found["b"] in ("x", "yy")
    several = server.post("/v1/completions", prompt="x", max_tokens=60, n=3, response_format=form)
    assert all(json.loads(choice["text"]) for choice in several["choices"])
    for wrong, said in [
        ({"type": "xml"}, "response_format.type must be"),
        ({"type": "json_schema"}, "must be a JSON schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}, "the schema cannot be used"),
        ({"type": "json_schema", "json_schema": {"schema": {"pattern": "(", "type": "string"}}}, "cannot be used"),
        ({"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}, "more than 65,536 bytes"),
    ]:
        status, error = server.refused("/v1/completions", prompt="x", response_format=wrong)
        assert status == 400 and said in error["message"] and error["param"] == "response_format"


def test_tokens_and_texts(server):
    assert server.post("/tokenize", prompt="hé", add_special_tokens=True)["tokens"] == list("hé".encode())
    assert server.post("/detokenize", tokens=list("hé".encode()))["prompt"] == "hé"
    status, info = server.ask("GET", "/tokenizer_info")
    assert status == 200 and info["eos_token"] == "<|endoftext|>" and "[assistant]" in info["chat_template"]


def test_where_there_is_no_template(words):
    status, error = words.refused("/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
    assert (status, error["code"]) == (400, "no_chat_template") and "--chat-template" in error["message"]


def test_routing_over_http(server):
    import base64

    import numpy as np

    record = []
    ids = BYTES.encode("hello you")
    MODEL(torch.tensor([ids]), record=record)
    answer = server.post("/v1/routing", prompt="hello you")
    experts = np.frombuffer(base64.b64decode(answer["experts"]), "<i2").reshape(answer["shape"])
    gates = np.frombuffer(base64.b64decode(answer["gates"]), "<f2").reshape(answer["shape"])
    assert answer["layers"] == list(MODEL.router_names) and answer["tokens"] == ids and answer["n_experts"] == [4, 4]
    for layer, choice in enumerate(record):
        assert experts[:, layer].tolist() == choice.indices[0].tolist()
        assert gates[:, layer] == pytest.approx(choice.gates[0].numpy(), abs=1e-3)
    assert all(math.isfinite(value) for value in answer["token_logprobs"][1:]) and answer["strings"][0] == "h"
    asked = {"prompt": "hello", "max_tokens": 5, "seed": 1, "return_routed_experts": True, "return_token_ids": True}
    choice = server.post("/v1/completions", **asked)["choices"][0]
    record = []
    sequence = BYTES.encode("hello") + choice["token_ids"]
    MODEL(torch.tensor([sequence]), record=record)
    routing = choice["routing"]
    found = np.frombuffer(base64.b64decode(routing["experts"]), "<i2").reshape(routing["shape"])
    assert found.transpose(1, 0, 2).tolist() == [choice.indices[0].tolist() for choice in record]
    last = [event for event in server.stream("/v1/completions", **asked) if event != "[DONE]"][-1]
    assert last["choices"][0]["routing"] == routing
