"""`moemamba generate` with many prompts, and `moemamba chat`: lines in, answers out."""

import io
import json
import sys

import pytest
from servers import TEMPLATE, small

from moemamba import cli, generate, save
from moemamba.cli import chat
from moemamba.text import ByteTokenizer, StreamDecoder

BYTES, MODEL = ByteTokenizer(), small()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talking") / "model"
    save(folder, MODEL, BYTES)
    return str(folder)


def standard_input(text):
    """As Python reads it from a terminal: bytes that are no text come as half characters."""
    return io.TextIOWrapper(io.BytesIO(text.encode(errors="surrogatepass")), encoding="utf-8", errors="surrogateescape")


@pytest.fixture
def call(monkeypatch, capsys):
    """(status, output, errors) of a command line."""

    def call(*words, stdin=""):
        monkeypatch.setattr(sys, "argv", ["moemamba", *words])
        monkeypatch.setattr(sys, "stdin", standard_input(stdin))
        status = 0
        try:
            cli.main()
        except SystemExit as left:
            status = int(left.code or 0)
        return status, *capsys.readouterr()

    return call


def continued(prompt, count, **sampling):
    return BYTES.decode(generate(MODEL, BYTES.encode(prompt) or [256], count, stop=256, **sampling))


def test_prompts_from_files_and_standard_input(call, run, tmp_path):
    prompts = ["hello", "", "the cat", *(f"number {k}" for k in range(20))]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": each, "id": 3}) for each in prompts) + "\n\n")
    expected = [continued(prompt, 7, temperature=0) for prompt in prompts]
    asked = ["generate", run, "--max-new-tokens", "7", "--temperature", "0", "--json", "--slots", "3"]
    plain = "\n".join(map(json.dumps, prompts))
    for words, stdin in [(["p.txt"], ""), (["p.jsonl"], ""), (["-"], plain)]:
        where = words[0] if words == ["-"] else str(tmp_path / words[0])
        status, output, _ = call(*asked, "--prompts", where, stdin=stdin)
        found = [json.loads(line) for line in output.splitlines()]
        assert status == 0 and [each["text"] for each in found] == expected
        assert [each["prompt"] for each in found] == prompts
        assert {each["finish_reason"] for each in found} <= {"length", "stop"}
    status, output, _ = call(*asked[:-3], "--prompts", "-", stdin="hello\n\nthe cat\n")
    assert output == "".join(f"{prompt}{text}\n\n" for prompt, text in zip(prompts[:3], expected, strict=False))


def test_samples_and_stops(call, run):
    words = ["generate", run, "--prompt", "ab", "--samples", "3", "--json", "--max-new-tokens", "9", "--seed", "4"]
    found = [json.loads(line) for line in call(*words)[1].splitlines()]
    assert [each["sample"] for each in found] == [0, 1, 2] and len({each["text"] for each in found}) == 3
    first = found[0]["text"]
    cut = next(letter for letter in first[2:] if letter != "\ufffd")
    stopped = json.loads(call(*words, "--stop", cut)[1].splitlines()[0])
    assert stopped["text"] == first[: first.index(cut)] and stopped["finish_reason"] == "stop"
    assert json.loads(call(*words[:4], "--json", "--max-new-tokens", "0")[1])["text"] == ""


@pytest.mark.parametrize(
    ("words", "stdin", "said"),
    [
        (["--prompts", "nowhere.txt"], "", "No such file"),
        (["--prompts", "-", "--json"], '"x"\n{"a": 1}\n', "line 2 of - is no prompt"),
        (["--prompts", "-", "--json"], '"x"\nx\n', "line 2 of - is no prompt"),
        (["--prompt", "x", "--prompts", "-"], "", "give --prompt or --prompts, not both"),
        (["--prompt", "x", "--samples", "0"], "", "samples is 0"),
        (["--prompt", "x", "--json", "--seed", "-1"], "", "seed is -1"),
    ],
)
def test_mistakes(call, run, words, stdin, said):
    status, _, errors = call("generate", run, "--max-new-tokens", "2", *words, stdin=stdin)
    assert status == 2 and said in errors and "Traceback" not in errors


def test_a_text_in_turns(call, run):
    """Undo takes a turn back, a fork comes back, and what follows is what the model makes of the whole text."""
    prompt, texts = BYTES.encode("hello"), []
    for line in (" more", ""):
        new = generate(MODEL, prompt, 6, stop=256, temperature=0)
        decoder = StreamDecoder(BYTES, prompt)
        texts.append("".join(map(decoder.push, new)) + decoder.finish())
        prompt += new + BYTES.encode(line)
    first, second = texts
    lines = [
        "hello",
        "/undo",
        "/undo",
        "hello",
        "/fork a",
        " more",
        "/undo",
        " more",
        "/go a",
        "/go",
        " more",
        "/new",
        "hello",
    ]
    asked = ["chat", run, "--max-new-tokens", "6", "--temperature", "0"]
    status, output, errors = call(*asked, stdin="\n".join(lines))
    assert status == 0 and output == "\n".join([first, first, second, second, second, first, ""])
    assert "there is no turn to take back" in errors and "places that were kept: a" in errors


def test_commands(call, run):
    asked = ["chat", run, "--max-new-tokens", "3", "--temperature", "0"]
    status, output, errors = call(
        *asked, stdin="/routing\nhello\n/routing\n/fork\n/go\n/nothing\n/help\n/quit\nhello\n"
    )
    lines = output.splitlines()
    assert status == 0 and "there is no answer yet" in errors and "there is no /nothing" in errors
    assert [line.split()[0] for line in lines if line.startswith("token")] == ["token"]
    table = lines[lines.index(next(line for line in lines if line.startswith("token"))) + 1 :][:3]
    record = []
    ids = BYTES.encode("hello") + generate(MODEL, BYTES.encode("hello"), 3, temperature=0)
    import torch

    MODEL(torch.tensor([ids]), record=record)
    for place, row in enumerate(table, len(ids) - 3):
        assert row.split()[-2:] == ["+".join(map(str, choice.indices[0, place].tolist())) for choice in record]
    assert any(line.startswith("/undo") for line in lines) and output.count("hello") == 0


def test_a_line_that_is_no_text_ends_nothing(call, run):
    status, output, errors = call("chat", run, "--max-new-tokens", "4", "--temperature", "0", stdin="a\ud800\nhello\n")
    assert status == 0 and "half a character" in errors and output == continued("hello", 4, temperature=0) + "\n"


def test_commands_are_completed():
    assert [chat._completed("/ro", k) for k in range(2)] == ["/routing", None]
    assert [chat._completed(text, 0) for text in ("", "hello", "/x")] == [None] * 3


def test_a_conversation(call, run, tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    asked = ["chat", run, "--max-new-tokens", "6", "--temperature", "0", "--chat-template", str(tmp_path / "t.jinja")]
    first = continued("[user] hi\n[assistant] ", 6, temperature=0)
    status, output, errors = call(*asked, stdin="hi\na<|endoftext|>b\n")
    assert status == 0 and output == first + "\n" and "which would end or begin one" in errors
    first = continued("[system] be\n[user] hi\n[assistant] ", 6, temperature=0)
    assert call(*asked, "--system", "be", stdin="hi\n")[1] == first + "\n"
    status, _, errors = call("chat", run, "--system", "be")
    assert status == 2 and "--system needs a model with a chat template" in errors
