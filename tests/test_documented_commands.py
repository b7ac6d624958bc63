"""Every command that the documents show is one that the program takes, at the number of processes that it names."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from moemamba.cli import COMMANDS, train
from moemamba.experiments.compare import parse_contenders
from moemamba.training.spread import check

ROOT = Path(__file__).parent.parent
SCRIPT = re.compile(r"python -m moemamba (.*?)'", re.S)


def commands():
    """Of every document: (processes, arguments) of each command in its blocks of code."""
    for document in ("README.md", *(f"docs/{name}.md" for name in ("commands", "training", "serving", "ecosystem"))):
        text = (ROOT / document).read_text()
        for block in re.findall(r"^```\w*\n(.*?)^```", text.replace("\\\n", " "), re.S | re.M):
            if block.startswith("#!"):
                per_node = re.search(r"--nodes=(\d+) --ntasks-per-node=(\d+)", block)
                yield int(per_node[1]) * int(per_node[2]), shlex.split(SCRIPT.search(block)[1])
                continue
            for line in block.splitlines():
                words = shlex.split(line, comments=True) if line.startswith(("moemamba ", "torchrun ")) else []
                if words[:1] == ["torchrun"]:
                    place = words.index("--")
                    yield launched(words[1:place]), words[place + 1 :]
                elif words:
                    yield 1, words[1:]


def launched(options):
    """Processes that torchrun starts."""
    count = 1
    for name in ("--nnodes", "--nproc-per-node"):
        count *= int(options[options.index(name) + 1]) if name in options else 1
    return count


FOUND = list(commands())


class Parsed(Exception):
    """Raised in place of the work that a command would do."""


@pytest.mark.parametrize(("size", "words"), FOUND, ids=[" ".join(words)[:60] for _, words in FOUND])
def test_the_command_is_taken(size, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name, *arguments = words
    assert name in COMMANDS
    if name == "train":
        check(train.read(arguments).config, size)
        return
    module = import_module(f"moemamba.cli.{name}")
    parse = module.parse

    def only_parse(*asked, **more):
        raise Parsed(parse(*asked, **more))

    monkeypatch.setattr(module, "parse", only_parse)
    with pytest.raises(Parsed) as parsed:
        module.main(arguments)
    if name == "compare":
        parse_contenders(parsed.value.args[0].models)


def test_all_are_found():
    """Every command, and those for several machines among them."""
    assert {words[0] for _, words in FOUND} == set(COMMANDS)
    assert sum(size == 32 for size, _ in FOUND) == 2 and any(size == 8 for size, _ in FOUND)
