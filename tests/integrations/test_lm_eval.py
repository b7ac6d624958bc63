"""lm-eval asks our class as it asks transformers' models, and gets the same answers."""

import json
import math
import sys

import pytest
import torch

from moemamba import ModelConfig, MoEMamba, cli, save
from moemamba.config import AttentionConfig, ExpertsConfig
from moemamba.text import ByteTokenizer

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's many packages

QUESTIONS = {
    "lambada/lambada_openai_test.jsonl": [{"text": f"the {word} sat on the {word}"} for word in ("cat", "dog", "owl")],
    "hellaswag/hellaswag_val.jsonl": [
        {"query": f"A man {verb}. he", "choices": ["sat down.", "left the room at once.", "is"], "gold": number}
        for number, verb in enumerate(("sings", "eats", "runs"))
    ],
    "piqa/piqa_val_llmfoundry.jsonl": [
        {"query": f"Question: how to {verb}?\n", "choices": ["slowly", "with care and water"], "gold": number % 2}
        for number, verb in enumerate(("cook", "wash", "fly", "sew"))
    ],
    "winogrande/winogrande_xl_val_llmfoundry.jsonl": [
        {"context_options": ["Ann met Bob so Ann", "Ann met Bob so Bob"], "continuation": "left.", "gold": number}
        for number in (0, 1)
    ],
    "blimp/first.jsonl": [{"sentence_good": "the cats sleep", "sentence_bad": "the cats sleeps"}] * 2,
    "blimp/second.jsonl": [{"sentence_good": "she sees herself", "sentence_bad": "she sees himself"}],
}
for name in ("easy", "challenge"):
    QUESTIONS[f"arc/arc_{name}_test_llmfoundry.jsonl"] = QUESTIONS["piqa/piqa_val_llmfoundry.jsonl"]
TASKS = ("lambada", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "blimp")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for name, rows in QUESTIONS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def build(pattern="ME"):
    torch.manual_seed(0)
    config = ModelConfig(pattern, 2, 32, attention=AttentionConfig(2), experts=ExpertsConfig(4, top_k=2))
    return MoEMamba(config).eval()


def test_as_transformers_models_are_asked(questions, tmp_path):
    """lm-eval's own class around our model in transformers: one row a question, each read whole."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    from moemamba.integrations.lm_eval import MoEMambaLM, evaluate
    from moemamba.integrations.lm_eval.tasks import from_files
    from moemamba.integrations.transformers import MoEMambaForCausalLM

    save(tmp_path / "run", build(), ByteTokenizer())
    found = {(s.task, s.measure): s for s in evaluate(MoEMambaLM(tmp_path / "run"), TASKS, str(questions))}
    model = MoEMambaForCausalLM.from_pretrained(tmp_path / "run")
    words = AutoTokenizer.from_pretrained(tmp_path / "run")
    theirs = HFLM(pretrained=model, tokenizer=words, batch_size=1, max_length=512, device="cpu")
    expected = lm_eval.simple_evaluate(
        model=theirs,
        tasks=[config for task in TASKS for config in from_files(task, questions)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    compared = 0
    for task, values in expected.items():
        for key, value in values.items():
            if "," in key and isinstance(value, float) and not key.endswith("_stderr,none"):
                assert math.isclose(found[task, key.split(",")[0]].value, value, rel_tol=1e-5), (task, key)
                compared += 1
    assert compared == 2 + 2 + 2 + 2 + 2 + 1 + 2
    assert found["blimp", "acc"].value == sum(found[f"blimp/{part}", "acc"].value for part in ("first", "second")) / 2
    assert found["blimp", "acc"].questions == 3


@pytest.mark.parametrize("pattern", ["ME", "MA"])
def test_probabilities_are_those_of_each_row_by_itself(pattern):
    """Whatever is shared, padded, or cut into pieces."""
    from lm_eval.api.instance import Instance

    from moemamba.integrations.lm_eval import MoEMambaLM
    from moemamba.integrations.lm_eval import model as module

    model = build(pattern)
    asked = MoEMambaLM((model, ByteTokenizer()), batch_size=3)
    pairs = [("once", " upon"), ("once", " a time, long"), ("", "x"), ("a", "b"), ("once ", "up"), ("longer text", "!")]
    found = asked.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)], True)
    for (context, continuation), (chance, greedy) in zip(pairs, found, strict=True):
        ids = [256] * (not context) + list(f"{context}{continuation}".encode())
        start = len(context.rstrip()) if context else 1
        with torch.no_grad():
            logs = model(torch.tensor([ids[:-1]])).logits[0, start - 1 :].log_softmax(-1)
        assert math.isclose(chance, sum(row[i].item() for row, i in zip(logs, ids[start:], strict=True)), rel_tol=1e-5)
        assert greedy == (logs.argmax(-1).tolist() == ids[start:])
    text = "a text that is longer than a piece"
    with torch.no_grad():
        whole = model(torch.tensor([[256, *text.encode()]]), targets=torch.tensor([[*text.encode(), -100]])).loss
    rolling = Instance("loglikelihood_rolling", {}, (text,), 0)
    chunk, module.CHUNK = module.CHUNK, 7
    try:
        assert math.isclose(asked.loglikelihood_rolling([rolling])[0], -whole.item() * len(text), rel_tol=1e-5)
    finally:
        module.CHUNK = chunk


@pytest.mark.slow
def test_over_http_the_same(questions, tmp_path):
    """lm-eval's own client of completions asks `serve`, and gets what our class computes, question by question."""
    pytest.importorskip("tenacity", reason="lm-eval's client needs it")
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager
    from servers import running

    from moemamba.integrations.lm_eval import MoEMambaLM
    from moemamba.integrations.lm_eval.tasks import from_files

    def answers(model):
        return lm_eval.simple_evaluate(
            model=model,
            tasks=[config for task in TASKS for config in from_files(task, questions)],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )["samples"]

    model, run = build("MEA"), str(tmp_path / "run")
    save(run, model, ByteTokenizer())
    expected, compared = answers(MoEMambaLM(run)), 0
    with running(model) as server:
        address = {"base_url": f"{server.url}/v1/completions", "model": "small", "batch_size": 2}
        found = answers(LocalCompletionsAPI(**address, tokenizer=run, tokenizer_backend="huggingface"))
    assert found.keys() == expected.keys() and len(found) == 8
    for task, samples in expected.items():
        for ours, theirs in zip(samples, found[task], strict=True):
            for (chance, greedy), (other, likewise) in zip(
                ours["filtered_resps"], theirs["filtered_resps"], strict=True
            ):
                assert math.isclose(float(chance), float(other), rel_tol=1e-5), (task, ours["doc"])
                assert str(greedy) == str(likewise)
                compared += 1
    assert compared == 46


def test_texts_end_where_they_are_asked_to():
    from lm_eval.api.instance import Instance

    from moemamba.integrations.lm_eval import MoEMambaLM

    asked = MoEMambaLM((build(), ByteTokenizer()))
    free = asked.generate_until([Instance("generate_until", {}, ("once", {"max_gen_toks": 12}), 0)])[0]
    assert free
    until = free[2:4]
    (found,) = asked.generate_until(
        [Instance("generate_until", {}, ("once", {"until": [until], "max_gen_toks": 12}), 0)]
    )
    assert found == free.partition(until)[0]


def test_on_the_command_line(questions, tmp_path, capsys, monkeypatch):
    save(tmp_path / "run", build(), ByteTokenizer())
    words = ["eval", str(tmp_path / "run"), "--tasks", "lambada,winogrande", "--tasks-data", str(questions)]
    monkeypatch.setattr(sys, "argv", ["moemamba", *words, "--limit", "1", "--json"])
    cli.main()
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert [(each["task"], each["measure"], each["questions"]) for each in found] == [
        ("lambada", "perplexity", 1),
        ("lambada", "acc", 1),
        ("winogrande", "acc", 1),
    ]
    for asked, said in (("poetry", "there is no task 'poetry' for files"), ("piqa", "which piqa is asked from")):
        other = [*words[:3], asked, "--tasks-data", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["moemamba", *other])
        with pytest.raises(SystemExit):
            cli.main()
        assert said in capsys.readouterr().err
