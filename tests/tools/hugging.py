"""What the tests of moemamba inside transformers share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest.importorskip("transformers", reason="these models are for transformers")
from transformers import PreTrainedTokenizerFast

from moemamba import ModelConfig
from moemamba.config import AttentionConfig, ExpertsConfig
from moemamba.integrations.transformers import MoEMambaConfig, MoEMambaForCausalLM
from moemamba.text import ByteTokenizer

PATTERNS = ("ME", "MEAE", "(ME)", "R")
END = 256


def config(pattern="ME", **changes):
    experts, heads = ExpertsConfig(4, top_k=2), AttentionConfig(n_heads=2)
    return ModelConfig(pattern, **{"n_blocks": 2, "d_model": 32, "experts": experts, "attention": heads} | changes)


def build(pattern="ME", **changes):
    """A random model in evaluation mode, of transformers' kind."""
    torch.manual_seed(0)
    return MoEMambaForCausalLM(MoEMambaConfig.of(config(pattern, **changes))).eval()


def tokens(rows=2, length=12, seed=3):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def generated(model, prompts, count=8, **options):
    """The new tokens."""
    options = {"do_sample": False, "pad_token_id": END, "max_new_tokens": count} | options
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, prompts.shape[1] :]


def tokenizer(folder):
    (folder / "tokenizer.json").write_text(ByteTokenizer().to_json(), encoding="utf-8")
    end = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **end)
