"""Generation as others use it: any stop, a seed a row, from a model that is being trained, and what is refused."""

import gc
import threading
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moemamba import ModelConfig, MoEMamba, generate
from moemamba.config import AttentionConfig
from moemamba.inference import Sampling, engine, generation, graph, stream
from moemamba.inference.draws import Draws
from moemamba.inference.evaluation import in_evaluation
from moemamba.inference.stopping import Ending, read_stops
from moemamba.text import ByteTokenizer, train_bpe

PROMPTS = [[1, 2, 3], [9], [4, 4, 5, 6, 7, 8, 1]]
HIRAGANA = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "bpe": train_bpe([HIRAGANA] * 20, 300),
}


def build(pattern="ME", **changes):
    torch.manual_seed(0)
    model = MoEMamba(ModelConfig(pattern, 2, 32, vocab_size=29, attention=AttentionConfig(2)).replace(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def model():
    return build().eval()


@pytest.fixture(params=["ordinary", "captured"])
def path(request, monkeypatch):
    """Both ways to take a step; without a GPU the second one only runs what a graph would record."""
    if request.param == "captured":
        as_on_a_gpu(monkeypatch)
    return request.param


def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(engine, "capturable", lambda model: True)
    if not torch.cuda.is_available():
        monkeypatch.setattr(graph, "EAGER", 1 << 30)


def kept(row, sequence):
    """A row up to a sequence of tokens."""
    found = [place for place in range(len(row)) if row[place : place + len(sequence)] == sequence]
    return row[: found[0]] if found else row


def test_sequences_of_tokens_stop(model, path):
    free = generate(model, PROMPTS, 12, temperature=0)
    sequence = free[1][3:6]
    assert generate(model, PROMPTS, 12, temperature=0, stop=[sequence]) == [kept(row, sequence) for row in free]
    both = [sequence, torch.tensor(free[0][7:9]), free[2][5]]
    expected = [min(kept(row, sequence), kept(row, free[0][7:9]), kept(row, [free[2][5]]), key=len) for row in free]
    assert generate(model, PROMPTS, 12, temperature=0, stop=both) == expected
    assert generate(model, PROMPTS, 12, temperature=0, stop=free[1][3]) == [kept(row, free[1][3:4]) for row in free]
    steps = list(stream(model, PROMPTS, 12, Sampling(temperature=0), stop=[sequence]))
    streamed = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    assert [row[: len(own)] for row, own in zip(streamed, free, strict=True)] == streamed
    assert len(streamed[1]) == len(kept(free[1], sequence)) + len(sequence) - 1, "the last of them is not yielded"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_stop_wherever_tokens_are_cut(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(HIRAGANA)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, len(HIRAGANA) - 1), st.integers(1, 5), st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    def check(start, length, before):
        before = [token for token in before if token != tokenizer.end_of_text]  # one right before a stop goes with it
        stop, tokens = HIRAGANA[start : start + length], [*before, *ids]
        ending = Ending(read_stops(stop, tokenizer.vocab_size, tokenizer))
        end = next((count for count, token in enumerate(tokens, 1) if ending.push(token)), None)
        ending.finish()
        text = tokenizer.decode(tokens[:end])
        place = text.find(stop)
        assert ending.kept is not None and place >= 0
        assert text.startswith(tokenizer.decode(tokens[: ending.kept]).rstrip("\ufffd"))
        assert len(tokenizer.decode(tokens[: ending.kept]).rstrip("\ufffd")) <= place, "nothing of the stop is kept"
        longer = tokenizer.decode(tokens[: ending.kept + 1])
        assert len(longer) > place or longer.endswith("\ufffd") or ending.kept + 1 == end, (
            "and no token too many is lost"
        )

    check()


def test_a_text_that_stops_generation():
    tokenizer = ByteTokenizer()
    model = MoEMamba(ModelConfig("ME", 1, 32)).eval()
    with torch.no_grad():
        model.head.weight.mul_(50)
    free = generate(model, [1, 2], 60, seed=3, top_k=5)
    text = tokenizer.decode(free)
    stop = next(letter for letter in text if letter.isprintable() and letter != "\ufffd")
    found = generate(model, [[1, 2], [1, 2]], 60, seed=[3, 3], stop=stop, tokenizer=tokenizer, top_k=5)
    assert found == [generate(model, [1, 2], 60, seed=[3], stop=stop, tokenizer=tokenizer, top_k=5)] * 2
    assert tokenizer.decode(found[0]) == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([[]], "empty stop"),
        ("", "empty stop"),
        ([29], "stop has the token 29; this model's tokens are 0 to 28"),
        ([[1, -1]], "stop has the token -1"),
        (1.5, "stop has 1.5; expected tokens"),
        ([[1, [2]]], r"stop has \[2\]; expected tokens"),
        ("ab", "stop has the text 'ab'; give tokenizer="),
        ([3, "ab"], "stop has the text 'ab'; give tokenizer="),
    ],
)
def test_stops_that_can_never_come(model, stop, message):
    tokenizer = TOKENIZERS["bytes"] if stop == "" else None
    with pytest.raises(ValueError, match=message):
        generate(model, [1], 3, stop=stop, tokenizer=tokenizer)


def test_a_seeded_row_does_not_depend_on_its_batch(model, path):
    alone = [generate(model, prompt, 20, seed=[seed]) for prompt, seed in zip(PROMPTS, (5, 6, 7), strict=True)]
    assert generate(model, PROMPTS, 20, seed=[5, 6, 7]) == alone
    assert generate(model, PROMPTS[::-1], 20, seed=[7, 6, 5]) == alone[::-1]
    assert generate(model, PROMPTS, 20, seed=5)[0] == alone[0] == generate(model, PROMPTS[0], 20, seed=5)
    assert generate(model, PROMPTS, 20, seed=5)[1] == generate(model, [[1], PROMPTS[1], *PROMPTS], 20, seed=5)[1]
    same = generate(model, [[1, 2]] * 8, 20, seed=5)
    assert len(set(map(tuple, same))) == 8, "samples of one prompt differ"
    stop = alone[1][4]  # rows that leave the batch
    assert generate(model, PROMPTS, 20, seed=[5, 6, 7], stop=stop) == [kept(row, [stop]) for row in alone]


def test_a_seeded_text_can_be_cut_anywhere(model):
    whole = generate(model, PROMPTS[0], 12, seed=3)
    first = generate(model, PROMPTS[0], 5, seed=3)
    assert first + generate(model, PROMPTS[0] + first, 7, seed=3) == whole


def test_a_seed_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    generate(model, PROMPTS, 5, seed=3)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("seed", "message"),
    [([1, 2], "seed has 2 values for 3"), ([1, 2, -3], "seed is -3"), (0.5, "seed is 0.5"), ("a", "seed")],
)
def test_bad_seeds_are_named(model, seed, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS, 3, seed=seed)


def test_draws_are_exponential_and_independent():
    draws = Draws([(seed, sample) for seed in range(4) for sample in range(4)], [0] * 16, 64, 257, "cpu")
    values = torch.stack([draws.at(step) for step in range(64)])  # (64, 16, 257)
    ordered, count = values.flatten().sort().values.double(), values.numel()
    distance = (1 - (-ordered).exp() - torch.arange(count) / count).abs().max()
    assert distance < 1.6 / count**0.5  # Kolmogorov-Smirnov, 1 in 80
    for a, b in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1]), (values[..., 1:], values[..., :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 4 / a.numel() ** 0.5
    assert len(values.unique()) > 0.95 * count
    later = Draws([(2, 3)], [10], 5, 257, "cpu")
    assert torch.equal(later.at(4), values[14, 2 * 4 + 3][None])


def test_draws_do_not_depend_on_blocks(monkeypatch):
    rows = [(1, row) for row in range(3)], [5, 0, 9], 40, 31, "cpu"
    whole = Draws(*rows)
    monkeypatch.setattr("moemamba.inference.draws.BLOCK", 200)
    parts = Draws(*rows)
    for step in range(40):
        if step == 20:
            parts.select(torch.tensor([2, 0]))
        assert torch.equal(parts.at(step), whole.at(step)[[2, 0]] if step >= 20 else whole.at(step))


def test_training_elsewhere_does_not_matter():
    """A model in training mode, with a capacity and dropout, from several threads, and its mode changed by another."""
    model = build(n_experts=4, capacity_factor=0.25)
    model.layers[0].norm.register_module("more", nn.Identity())
    expert = model.layers[1].branches[0]
    model.layers[0].branches[0].out_proj = nn.Sequential(model.layers[0].branches[0].out_proj, nn.Dropout(0.5))
    prompts = [[k + 1, k + 2, k + 3] * 30 for k in range(4)]
    model.eval()
    expected = [generate(model, prompt, 8, temperature=0) for prompt in prompts]
    model.train()
    wrong, done = [], threading.Event()

    def work(k):
        wrong.extend(k for _ in range(10) if generate(model, prompts[k], 8, temperature=0) != expected[k])

    def flip():
        while not done.is_set():
            model.eval()
            model.train()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    flipping = threading.Thread(target=flip)
    for thread in (flipping, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    flipping.join()
    assert not wrong and model.training and expert.training and all(module.training for module in model.modules())


def test_a_stream_does_not_see_a_change_of_mode(model):
    model = build(n_experts=4, capacity_factor=0.25).eval()
    expected = generate(model, [[1, 2, 3] * 9] * 3, 8, temperature=0)
    rows = []
    for step in stream(model, [[1, 2, 3] * 9] * 3, 8, Sampling(temperature=0)):
        model.train()
        rows.append(step)
    assert [list(row) for row in zip(*rows, strict=True)] == expected and model.training


def test_a_view_is_the_model_itself():
    """Parameters, hooks and tied weights are its own: what changes in the model is seen."""
    model = build(tie_embeddings=True).train()
    view = in_evaluation(model)
    assert view.head.weight is view.embedding.weight is model.embedding.weight
    assert dict(view.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert not any(module.training for module in view.modules()) and all(module.training for module in model.modules())
    model.norm.weight = nn.Parameter(torch.full_like(model.norm.weight, 2.0))
    assert view.norm.weight is model.norm.weight
    seen = []
    model.norm.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        view(torch.tensor([[1]]))
    assert seen == [1]
    model.compile_layers(backend="eager")
    with torch.no_grad():
        assert torch.equal(in_evaluation(model)(torch.tensor([[1]])).logits, view(torch.tensor([[1]])).logits)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {}, {"seed": 3}, {"top_p": 0.5}])
@pytest.mark.parametrize("where", ["head", "embedding", "A_log", "router"])
def test_an_output_that_is_not_finite(sampling, where, path):
    model = build().eval()
    name = next(name for name, _ in model.named_parameters() if where in name)
    for value in (torch.nan,) if where == "A_log" else (torch.nan, torch.inf):  # a decay can be at once
        with torch.no_grad():
            model.get_parameter(name).flatten()[:] = value
        with pytest.raises(ArithmeticError, match=r"output is not finite.*another checkpoint"):
            generate(model, PROMPTS, 12, **sampling)


def test_an_output_that_stops_being_finite(path):
    model = build("M").eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[5] = 1e4  # always 5 or 0
        model.embedding.weight[5] = torch.nan
        model.embedding.weight[0] = torch.nan
    steps = stream(model, [[1]], 100, Sampling(temperature=0))
    with pytest.raises(ArithmeticError, match="not finite"):
        list(steps)


def test_engines_are_kept_between_calls(monkeypatch):
    """Also those of a model in training mode, which is seen through a view that is gone after a call."""
    as_on_a_gpu(monkeypatch)
    made = []
    init = engine.Slots.__init__
    monkeypatch.setattr(engine.Slots, "__init__", lambda self, *args: made.append(1) or init(self, *args))
    model = build("MAR").train()
    first = generate(model, PROMPTS, 12, temperature=0)
    assert generate(model, PROMPTS[:1], 12, temperature=0) == first[:1] and made == [1]
    with torch.no_grad():
        model.norm.weight.mul_(-1)
    assert generate(model, PROMPTS, 12, temperature=0) != first and made == [1]
    other = []
    thread = threading.Thread(target=lambda model: other.append(generate(model, PROMPTS, 12)), args=(model,))
    thread.start()
    thread.join()
    del thread
    assert made == [1, 1], "another thread has an engine of its own"
    kept = ref(generation._kept.idle[0][1])
    del model
    gc.collect()
    assert kept() is None, "it goes with its model"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("text", "prompts is 'text'; expected token ids"),
        (5, "prompts is '5'"),
        (["text", "more"], "prompt 0 is 'text'; expected its token ids"),
        ([[1], [2.5]], "prompt 1 holds float"),
        ([1.0, 2.0], "prompt 0 is 1.0"),
        (torch.ones(1, 3), "prompt 0 holds float"),
        (torch.ones(1, 3, 2, dtype=torch.int64), "prompt 0 holds list"),
        ([[1, "a"]], "prompt 0 holds"),
    ],
)
def test_prompts_that_are_none(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, 3)
