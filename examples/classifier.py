"""A sequence classifier that reads in both directions, on time series of several lengths: no tokens, no text.

python examples/classifier.py [STEPS]
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moemamba as mm
from moemamba import layers


class Block(nn.Module):
    """`x + there(norm x) + back(norm x)`, then `x + experts(norm x)`: Mamba in each direction, and a mixture."""

    def __init__(self, d_model: int, n_experts: int):
        super().__init__()
        self.first, self.second = (layers.make_norm("rmsnorm", d_model) for _ in range(2))
        self.there, self.back = layers.Mamba(d_model), layers.Mamba(d_model)
        self.experts = layers.MoE(d_model, n_experts)

    def forward(self, x: Tensor, seq_idx: Tensor) -> tuple[Tensor, layers.RouterStats]:
        h = self.first(x)
        there, _ = self.there(h, seq_idx=seq_idx)
        back, _ = self.back(h.flip(1), seq_idx=seq_idx.flip(1))
        x = x + there + back.flip(1)
        y, stats = self.experts(self.second(x), seq_idx)
        return x + y, stats


class Classifier(nn.Module):
    """(b, l, channels) -> scores (b, classes), and the routers' loss."""

    def __init__(self, channels: int, classes: int, d_model: int = 32, blocks: int = 2):
        super().__init__()
        self.embedding = nn.Linear(channels, d_model)
        self.blocks = nn.ModuleList(Block(d_model, 4) for _ in range(blocks))
        self.head = layers.PooledHead(d_model, classes, "mean")

    def forward(self, series: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        seq_idx = layers.padded(lengths, series.shape[1])
        x, auxiliary = self.embedding(series), series.new_zeros(())
        for block in self.blocks:
            x, stats = block(x, seq_idx)
            auxiliary = auxiliary + stats.loss() / len(self.blocks)
        return self.head(x, seq_idx), auxiliary


def batch(rows: int, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Waves of three kinds, 20 to 40 long, with noise: series (b, 40, 1), lengths (b,), classes (b,)."""
    kinds = torch.randint(3, (rows,), generator=draws)
    lengths = torch.randint(20, 41, (rows,), generator=draws)
    time = torch.arange(40.0) + 10 * torch.rand(rows, 1, generator=draws)
    waves = torch.stack([torch.sin(time / 2), torch.sign(torch.sin(time / 2)), (time / 6) % 1 - 0.5])  # (3, b, 40)
    series = waves[kinds, torch.arange(rows)] + 0.2 * torch.randn(rows, 40, generator=draws)
    return series[..., None], lengths, kinds


def main(steps: int = 60) -> float:
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    model = Classifier(1, 3)
    optimizer = mm.make_optimizer(model, learning_rate=5e-3)
    for _ in range(steps):
        series, lengths, kinds = batch(32, draws)
        scores, auxiliary = model(series, lengths)
        (F.cross_entropy(scores, kinds) + auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
    series, lengths, kinds = batch(300, draws)
    with torch.no_grad():
        right = (model(series, lengths)[0].argmax(-1) == kinds).float().mean().item()
    print(f"{right:.0%} of 300 new series are told apart")
    return right


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
