"""docs/library.md works as it is written: its blocks are run one after the other."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    text = PAGE.read_text(encoding="utf-8")
    names: dict = {"__name__": "library"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
    assert len(blocks) >= 14
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        code = "\n" * line + block[1]  # so that a traceback names the line of the page
        exec(compile(code, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "held-out loss" in said
