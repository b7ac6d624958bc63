"""Routers of one's own: sigmoid gates that sum to one, experts by a hash of the token, and experts that choose tokens.

Each is trained for some steps in place of the model's own, and says how its experts were used.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moemamba as mm
from moemamba import layers


class SigmoidRouter(layers.BaseRouter):
    """Gates are sigmoids of the chosen experts, divided by their sum (as in DeepSeek-V3, arXiv 2412.19437)."""

    def __init__(self, d_model: int, n_experts: int, top_k: int = 2, capacity_factor: float | None = None):
        super().__init__(n_experts, top_k, capacity_factor)
        self.weight = nn.Parameter(torch.randn(n_experts, d_model) * d_model**-0.5)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> layers.Routing:
        logits = F.linear(x.float(), self.weight.float())  # (b, l, e)
        scores = logits.sigmoid()
        gates, indices = scores.topk(self.top_k)
        gates = gates / gates.sum(-1, keepdim=True)
        shares = scores / scores.sum(-1, keepdim=True)
        return self.routed(indices, gates, seq_idx, logits=logits, probabilities=shares)


class HashRouter(layers.BaseRouter):
    """The expert of a token is a fixed function of its id (Hash Layers, arXiv 2106.04426): nothing to learn or balance.

    A layer never sees ids. Those that the embedding was called with are kept by a hook on it, in prompts, in training
    and in decoding alike.
    """

    def __init__(self, embedding: nn.Embedding, n_experts: int, seed: int = 0):
        super().__init__(n_experts)
        table = torch.randint(n_experts, (embedding.num_embeddings,), generator=torch.Generator().manual_seed(seed))
        self.register_buffer("table", table)
        self.seen: list[Tensor] = []
        embedding.register_forward_pre_hook(self.see)

    def see(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.seen[:] = [given[0]]  # one list for all copies of this module, such as generation makes

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> layers.Routing:
        indices = self.table[self.seen[0]].view(*x.shape[:2], 1)
        return self.routed(indices, torch.ones_like(indices, dtype=torch.float32), seq_idx)


class ExpertChoiceRouter(layers.BaseRouter):
    """Each expert takes the tokens that it likes best (arXiv 2202.09368): balanced by construction.

    A token may get several experts or none, and that depends on later ones, so that it is no router for generation.
    """

    def __init__(self, d_model: int, n_experts: int, tokens_each: float = 2.0):
        super().__init__(n_experts)
        self.weight = nn.Parameter(torch.randn(n_experts, d_model) * d_model**-0.5)
        self.tokens_each = tokens_each

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> layers.Routing:
        logits = F.linear(x.float(), self.weight.float())
        shares = logits.softmax(-1)
        if seq_idx is not None:
            shares = shares.masked_fill((seq_idx < 0)[..., None], -1)
        length = x.shape[1]
        taken = max(1, min(length, round(self.tokens_each * length / self.n_experts)))
        gates, places = shares.transpose(1, 2).topk(taken)  # (b, e, taken): of each expert its tokens
        mine = torch.zeros_like(shares).transpose(1, 2).scatter(2, places, gates).transpose(1, 2)  # (b, l, e)
        experts = torch.arange(self.n_experts, device=x.device).expand_as(mine)
        return self.routed(experts.masked_fill(mine <= 0, self.n_experts), mine.clamp(min=0), seq_idx, logits=logits)


def with_router(config: mm.ModelConfig, kind: str) -> mm.MoEMamba:
    """A model whose mixtures have other routers."""
    model = mm.MoEMamba(config)
    for module in model.modules():
        if isinstance(module, layers.MoE):
            experts = module.experts.n_experts
            if kind == "sigmoid":
                module.router = SigmoidRouter(config.d_model, experts)
            elif kind == "hash":
                module.router = HashRouter(model.embedding, experts)
            else:
                module.router = ExpertChoiceRouter(config.d_model, experts)
    return model


def main(steps: int = 60) -> None:
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    config = mm.ModelConfig("ME", n_blocks=2, d_model=32, experts=mm.ExpertsConfig(4))
    for kind in ("sigmoid", "hash", "expert choice"):
        torch.manual_seed(0)
        model = with_router(config, kind)
        optimizer = mm.make_optimizer(model, learning_rate=1e-2)
        for step in range(steps):
            starts = torch.randint(len(text) - 65, (8,))
            rows = torch.stack([text[start : start + 65] for start in starts])
            out = model(rows[:, :-1], targets=rows[:, 1:])
            (out.loss + out.auxiliary).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                first = out.loss.item()
        load = out.router[0].load / out.router[0].load.sum()
        print(f"{kind:14}loss {first:.3f} -> {out.loss.item():.3f}; load of the first layer {load.tolist()}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
