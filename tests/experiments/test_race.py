"""The race: what an entry may choose, how its time is told, and one run from end to end."""

import gzip
import json
import shlex
from pathlib import Path

import pytest

from moemamba import TrainConfig
from moemamba.cli import run
from moemamba.experiments.paper.race import EVALUATED, clock, configured, entry, judged, rows
from moemamba.reading import to_dict

ROOT = Path(__file__).parents[2]


def test_an_entry_has_any_recipe_and_none_of_the_rules(tmp_path):
    found = entry("fast=moe-mamba-tiny,n_experts=4,batch_size=3,context=48,learning_rate=0.01,steps=7,compile=true")
    config = configured(found, TrainConfig(data="a", validation="b", test="c", eval_tokens=5), 1, tmp_path)
    assert (config.batch_size, config.context, config.steps, config.compile) == (3, 48, 7, True)
    assert (config.seed, config.data_seed, config.data, config.eval_tokens) == (1, 1, "a", EVALUATED)
    assert config.model.experts.n_experts == 4
    for fixed in ("seed=3", "data=x", "eval_tokens=9", "validation=x", "start=x"):
        with pytest.raises(ValueError, match="must be the same for all"):
            entry(f"mamba-tiny,{fixed}")


def written(folder, losses, config=None):
    """A run that wrote these bits per byte at seconds 10, 20, ..."""
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(to_dict(config or TrainConfig(run="x"))))
    lines = [{"kind": "data", "step": 0, "train_tokens": 5, "held_out_bytes": 777}]
    for k, bits in enumerate(losses, 1):
        line = {
            "kind": "evaluation",
            "step": k,
            "tokens": 100 * k,
            "seconds": 10.0 * k,
            "loss": bits,
            "bits_per_byte": bits,
        }
        lines.append(line)
    lines.append({"kind": "test", "step": len(losses), "loss": 1.0, "bits_per_byte": 1.25, "tokens": 3})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_the_clock_stops_at_the_first_evaluation_with_the_target(tmp_path):
    fast = judged(written(tmp_path / "a", [1.5, 1.2, 0.99, 1.1, 0.95]), "fast", "c", "gpu", "1")
    exact = judged(written(tmp_path / "b", [1.5, 1.0]), "exact", "c", "gpu", "1")
    never = judged(written(tmp_path / "c", [1.5, 1.3]), "never", "c", "gpu", "1")
    assert (fast.seconds, fast.step, fast.tokens, fast.best, fast.test) == (30, 3, 300, 0.95, 1.25)
    assert exact.seconds == 20 and never.seconds is None and fast.held_out_bytes == 777
    assert [row[0] for row in rows([never, fast, exact])] == ["exact", "fast", "never"]
    assert rows([never])[0][2:5] == ("never", "–", "–")
    assert (clock(75.25), clock(59.99), clock(3600)) == ("1:15.2", "0:59.9", "60:00.0")
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no evaluation with bits per byte"):
        judged(tmp_path / "a", "fast", "c", "gpu", "1")


def test_a_race_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    command = ["paper", "race", "--data", str(corpus), "--out", str(tmp_path / "out"), "--device", "cpu"]
    tiny = "tiny=mamba-tiny,d_model=16,n_blocks=1,batch_size=2,context=32,steps=2,eval_every=1"
    with pytest.raises(FileNotFoundError, match=r"benchmarks/corpus\.py builds"):
        run([*command, "--entry", tiny])
    for name in ("train", "validation", "test"):
        with gzip.open(corpus / f"{name}.jsonl.gz", "wt") as stream:
            for k in range(3):
                stream.write(json.dumps({"text": f"{name} {k} " * 40}) + "\n")
    run([*command, "--entry", tiny])
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "tiny" / "seed-0" / "race.json").read_text())
    assert record["seconds"] is None and record["test"] > 1 and len(record["curve"]) == 2
    assert record["held_out_bytes"] == sum(len(f"validation {k} " * 40) for k in range(3))
    assert shlex.split(record["command"])[:3] == ["moemamba", "paper", "race"]
    assert "| tiny | 0 | never |" in shown
    for words, said in (
        ([*command], "race needs --data"),
        (["paper", "mlp", "--entry", tiny], "goes with race alone"),
        ([*command, "--entry", tiny, "--eval-tokens", "9"], "--eval-tokens does not go with race"),
    ):
        with pytest.raises(ValueError, match=said):
            run(words)


def test_the_page_shows_commands_that_are_taken():
    text = (ROOT / "docs" / "race.md").read_text().replace("\\\n", "")
    entries = [
        word
        for line in text.splitlines()
        if line.startswith("moemamba paper race")
        for word in shlex.split(line)
        if "=" in word
    ]
    assert [entry(word).name for word in entries] == ["mamba", "mamba", "moe-mamba", "plus"]
