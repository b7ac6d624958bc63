"""A model in a loop of Accelerate's, in one process or several.

pip install accelerate
accelerate launch --cpu --num_processes 2 examples/accelerated.py [STEPS]
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import moemamba as mm


def main(steps: int = 30, folder: str | None = None) -> list[float]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = mm.MoEMamba(mm.ModelConfig("ME", n_blocks=1, d_model=32, vocab_size=32, experts=mm.ExpertsConfig(4)))
    optimizer = mm.make_optimizer(model, learning_rate=1e-2)
    rows = (torch.arange(17) + torch.arange(64)[:, None]) % 32  # counting from anywhere
    loader = DataLoader(TensorDataset(rows), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    while len(losses) < steps:
        for (row,) in loader:
            out = model(row[:, :-1], targets=row[:, 1:])
            accelerator.backward(out.loss + out.auxiliary)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(out.loss.detach(), "mean").item())
    accelerator.print(f"{accelerator.num_processes} processes: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if folder is not None and accelerator.is_main_process:
        mm.save(folder, accelerator.unwrap_model(model))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
