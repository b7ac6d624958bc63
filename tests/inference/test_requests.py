"""What a request can ask of the engine besides tokens, each beside a slow way to the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moemamba import ModelConfig, MoEMamba, State, generate
from moemamba.config import AttentionConfig
from moemamba.inference import Engine, Request, Sampling, Snapshot, StateCache
from moemamba.inference.choosing import Tilt
from moemamba.inference.prefill import Reader
from moemamba.inference.stopping import read_stops

GREEDY = Sampling(temperature=0)
VOCABULARY = 29


def build(pattern, blocks=1):
    torch.manual_seed(0)
    model = MoEMamba(ModelConfig(pattern, blocks, 32, vocab_size=VOCABULARY, attention=AttentionConfig(2))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


MODELS = {pattern: build(pattern) for pattern in ("ME", "AR")}
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def run(engine, *requests):
    """Of each request its events."""
    numbers = [engine.submit(request) for request in requests]
    events = {number: [] for number in numbers}
    while engine.busy:
        for event in engine.step():
            events[event.request].append(event)
    return [events[number] for number in numbers]


def tokens(events):
    return [event.token for event in events if event.token is not None]


def logprobs(model, sequence):
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits[0].log_softmax(-1)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.mark.parametrize("chunk", [3, 64])
def test_scores_are_those_of_one_call(model, chunk):
    """Of the prompt in parts, and of new tokens."""
    for cache in (None, StateCache(1 << 20)):
        engine = Engine(model, 2, chunk, cache=cache)
        request = Request(PROMPT, 6, seed=(1, 0), logprobs=2, prompt_logprobs=3)
        (events,) = run(engine, request)
        sequence = PROMPT + tokens(events)
        expected = logprobs(model, sequence)
        reading = events[0].reading
        found = [*reading.scores, *(event.score for event in events)]
        assert len(found) == len(sequence) - 1 and reading.cached == 0
        for place, score in enumerate(found):
            assert score.logprob == pytest.approx(expected[place, sequence[place + 1]].item(), abs=1e-5)
            top = expected[place].topk(3 if place < len(PROMPT) - 1 else 2)
            assert [token for token, _ in score.top] == top.indices.tolist()
            assert [value for _, value in score.top] == pytest.approx(top.values.tolist(), abs=1e-5)
        (greedy,) = run(engine, Request(PROMPT, 4, GREEDY, logprobs=1))
        assert all(event.score.logprob == event.score.top[0][1] for event in greedy), "the very same number"


def test_routing_is_that_of_one_call():
    model = MODELS["ME"]
    record = []
    with torch.no_grad():
        model(torch.tensor([PROMPT]), record=record)
    for chunk in (5, 64):
        ((event,),) = run(Engine(model, 2, chunk), Request(PROMPT, 0, routing=True))
        assert event.kept == 0 and event.token is None
        for (experts, gates), choice in zip(event.reading.routing, record, strict=True):
            assert experts.dtype == np.int16 and experts.tolist() == choice.indices[0].tolist()
            assert gates == pytest.approx(choice.gates[0].numpy(), abs=1e-6)


def test_a_state_goes_on(model):
    engine = Engine(model, 2, cache=StateCache(1 << 20))
    whole = generate(model, PROMPT, 8, seed=[4])
    for cut in (1, 5, 15, len(PROMPT)):
        ((event,),) = run(engine, Request(PROMPT[:cut], 0, keep=True))
        state = event.reading.snapshot
        assert state.position == cut and state.tail == tuple(PROMPT[:cut][-16:])
        for _ in range(2):  # reading never changes it
            (events,) = run(engine, Request(PROMPT[cut:], 8, seed=(4, 0), start=state))
            assert tokens(events) == whole and events[0].reading.cached >= cut
        ((event,),) = run(engine, Request(PROMPT[cut:], 0, start=state, prompt_logprobs=0))
        expected = logprobs(model, PROMPT)[range(cut - 1, len(PROMPT) - 1), PROMPT[cut:]]
        assert [score.logprob for score in event.reading.scores] == pytest.approx(expected.tolist(), abs=1e-5)


def lengths_read(monkeypatch):
    """A list of how long the parts of prompts are that are read from now on."""
    gather, seen = Reader.gather, []

    def watched(self, parts, runs):
        groups = gather(self, parts, runs)
        seen.extend(part.last - part.first for group in groups for part in group.parts)
        return groups

    monkeypatch.setattr(Reader, "gather", watched)
    return seen


def test_what_is_known_is_not_read_again(model, monkeypatch):
    seen = lengths_read(monkeypatch)
    engine = Engine(model, 4, cache=StateCache(1 << 20))
    (first,) = run(engine, Request(PROMPT, 8, seed=(4, 0)))
    assert seen == [len(PROMPT)] and first[0].reading.cached == 0
    (again,) = run(engine, Request(PROMPT, 8, seed=(4, 0)))
    assert tokens(again) == tokens(first) and again[0].reading.cached == len(PROMPT) and len(seen) == 1
    longer = PROMPT + tokens(first)  # of an answer all but the last token has been read
    for tail in range(6):
        seen.clear()
        prompt = longer[:27] + [3] * tail
        (events,) = run(engine, Request(prompt, 5, seed=(2, 0)))
        assert sum(seen) <= tail and events[0].reading.cached == len(prompt) - sum(seen)
        assert tokens(events) == generate(model, prompt, 5, seed=[2])
    seen.clear()
    run(engine, Request([*PROMPT[:18], 25, 25], 1))
    run(engine, Request([*PROMPT[:18], 26, 26], 1))
    assert seen == [18, 2, 2], "where a prompt left a known path a state is kept"


def test_samples_share_their_prompt(model, monkeypatch):
    seen = lengths_read(monkeypatch)
    alone = [generate(model, PROMPT, 6, seed=[k]) for k in range(5)]
    seen.clear()
    requests = [Request(PROMPT, 6, seed=(k, 0)) for k in range(5)]
    assert [tokens(events) for events in run(Engine(model, 8, 7), *requests)] == alone
    assert sum(seen) == len(PROMPT)
    engine = Engine(model, 8, 7)
    numbers = [engine.submit(request) for request in requests]
    found = {number: [] for number in numbers}
    engine.step()
    engine.abort(numbers[0])  # who waited for it goes on
    while engine.busy:
        for event in engine.step():
            found[event.request].append(event)
    assert [tokens(found[number]) for number in numbers] == [[], *alone[1:]]
    assert engine.free == 8 and engine.live == 0


@pytest.mark.parametrize("pattern", ["M", "ME", "MA", "R", "(ME)F"])
def test_one_arithmetic(pattern, tmp_path):
    """To the bit: alone, beside others, in parts, cached, evicted, from a state, from a file, scored as a prompt."""
    model = build(pattern)
    asked = {"sampling": Sampling(0.9), "seed": (3, 0), "logprobs": 2}
    others = [Request([20 - k, k, 7][: 1 + k % 3], 9, seed=(k, 0)) for k in range(6)]
    alone = [event.score for event in run(Engine(model, 1), Request(PROMPT, 8, **asked))[0]]

    def same(events):
        assert [event.score for event in events] == alone

    for chunk in (1, 2, 3, 7, 64):
        same(run(Engine(model, 8, chunk), *others, Request(PROMPT, 8, **asked))[-1])
    cache = StateCache(1 << 20)
    engine = Engine(model, 8, 5, cache=cache)
    for _ in range(2):
        same(run(engine, *others, Request(PROMPT, 8, **asked), Request(PROMPT, 8, **asked))[-1])
    ((event,),) = run(engine, Request(PROMPT[:9], 0, keep=True))
    state = event.reading.snapshot
    same(run(engine, Request(PROMPT[9:], 8, start=state, **asked))[0])
    state.state.save(tmp_path / "state")
    loaded = Snapshot(State.load(tmp_path / "state"), state.hidden, state.position, state.tail)
    same(run(Engine(model, 1, 4), Request(PROMPT[9:], 8, start=loaded, **asked))[0])
    cache.clear()
    same(run(engine, Request(PROMPT, 8, **asked))[0])
    answer = generate(model, PROMPT, 8, temperature=0.9, seed=[3])
    ((event,),) = run(Engine(model, 1, 6), Request(PROMPT + answer, 0, prompt_logprobs=2))
    assert event.reading.scores[-8:] == alone


def slow(model, prompt, count, sampling, bias):
    """The same with a loop."""
    sequence = list(prompt)
    for _ in range(count):
        logits = logprobs(model, sequence)[-1].clone()
        for token, value in bias.items():
            logits[token] += value
        new = sequence[len(prompt) :]
        for token in set(new):
            logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * new.count(token)
        sequence.append(int(logits.argmax()))
    return sequence[len(prompt) :]


@pytest.mark.parametrize(
    ("sampling", "bias"),
    [
        (Sampling(0.0, presence_penalty=1.5), {}),
        (Sampling(0.0, frequency_penalty=0.7), {}),
        (Sampling(0.0, presence_penalty=-2, frequency_penalty=0.5), {3: 4.0, 7: -100.0}),
        (GREEDY, {11: 100.0}),
    ],
)
def test_penalties_and_bias(model, sampling, bias):
    plain = slow(model, PROMPT, 9, GREEDY, {})
    found = run(Engine(model, 4), Request(PROMPT, 9, sampling, bias=bias), Request(PROMPT, 9, GREEDY))
    assert tokens(found[0]) == slow(model, PROMPT, 9, sampling, bias)
    assert tokens(found[1]) == plain, "others are not touched"
    assert Tilt.of(GREEDY, {}, 5, torch.device("cpu")) is None


class Only:
    """Allows some tokens at first, then others."""

    def __init__(self, *allowed):
        self.allowed_next, self.seen = list(allowed), []

    def allowed(self):
        found = np.zeros(VOCABULARY, bool)
        found[self.allowed_next[len(self.seen)]] = True
        return found

    def push(self, token):
        self.seen.append(token)


def test_constraints_hold(model):
    for sampling in (GREEDY, Sampling(2.0)):
        one, other = Only([3], [4, 5], [6], [7, 8]), Only([9], [10], [11], [12])
        requests = [Request(PROMPT, 4, sampling, seed=(1, 0), constraint=each) for each in (one, other)]
        plain = Request(PROMPT, 4, sampling, seed=(1, 0))
        a, b, c = (tokens(events) for events in run(Engine(model, 4), *requests, plain))
        assert a[0] == 3 and a[1] in (4, 5) and a[2] == 6 and a[3] in (7, 8) and one.seen == a
        assert b == [9, 10, 11, 12]
        assert c == generate(model, PROMPT, 4, temperature=sampling.temperature, seed=[1])


def test_what_is_not_finite_fails_alone():
    """A request whose tokens the weights have no numbers for; those beside it go on, and nothing of it is kept."""
    model, cache = build("ME"), StateCache(1 << 20)
    fine = [Request([1 + k, 2, 3], 6, GREEDY, bias={28: -100.0}) for k in range(3)]
    expected = [tokens(run(Engine(model, 1), each)[0]) for each in fine]
    with torch.no_grad():
        model.embedding.weight[28] = torch.nan
    engine = Engine(model, 4, cache=cache)
    bad, *good = run(engine, Request([1, 28, 3], 6, GREEDY), *fine)
    assert [tokens(events) for events in good] == expected
    (event,) = bad
    assert "not finite" in event.failure and event.kept == 0
    assert cache.find(None, [1, 28, 3])[0] == 0 and engine.free == 4
    ((first, event),) = run(engine, Request([1, 2], 2, GREEDY, bias={28: 100.0}))
    assert first.token == 28 and event.failure and len(cache) and cache.find(None, [1, 2, 28])[0] == 2
    ((event,),) = run(engine, Request([28], 0, keep=True))
    assert event.failure and event.reading is None
    ((event,),) = run(engine, Request([1, 28], 1, GREEDY))
    assert event.failure


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 3),
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 5), st.integers(0, 3), st.booleans()), min_size=1, max_size=8
    ),
)
def test_each_gets_what_it_gets_alone(name, slots, chunk, room, requests):
    """Whatever is cached, evicted, shared and given up meanwhile."""
    model = MODELS[name]
    engine = Engine(model, slots, chunk, alone=2 * chunk, cache=StateCache(room * 10_000))
    found, asked, aborted = {}, {}, set()

    def step():
        for event in engine.step():
            found[event.request].append(event)

    for size, count, steps, gives_up in requests:
        number = engine.submit(Request(PROMPT[:size], count, seed=(size, 0)))
        found[number], asked[number] = [], (size, count)
        for _ in range(steps):
            step()
        if gives_up:
            engine.abort(number)
            aborted.add(number)
    while engine.busy:
        step()
    for number, (size, count) in asked.items():
        alone = generate(model, PROMPT[:size], count, seed=[size])
        if number not in aborted:
            assert tokens(found[number]) == alone and found[number][-1].kept == count
        assert tokens(found[number]) == alone[: len(tokens(found[number]))]
    assert engine.free == slots and engine.live == engine.waiting == 0


def test_stops_say_what_ended_them(model):
    free = generate(model, PROMPT, 6, temperature=0)
    place = next(k for k in range(1, 6) if free[k] not in free[:k])
    (events,) = run(Engine(model, 1), Request(PROMPT, 6, GREEDY, read_stops(free[place], VOCABULARY)))
    assert tokens(events) == free[:place]
    assert (events[-1].token, events[-1].kept, events[-1].ended_by) == (None, place, free[place])
