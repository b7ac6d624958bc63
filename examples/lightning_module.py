"""A model as a LightningModule, in one process or several.

pip install lightning
python examples/lightning_module.py [STEPS [PROCESSES]]
"""

import sys

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import moemamba as mm


class Language(lightning.LightningModule):
    """What the Trainer asks for, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.model = mm.MoEMamba(
            mm.ModelConfig("ME", n_blocks=1, d_model=32, vocab_size=32, experts=mm.ExpertsConfig(4))
        )

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        (rows,) = batch
        out = self.model(rows[:, :-1], targets=rows[:, 1:])
        assert out.loss is not None and out.auxiliary is not None
        self.log("loss", out.loss, sync_dist=True)
        return out.loss + out.auxiliary

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return mm.make_optimizer(self.model, learning_rate=1e-2)


def main(steps: int = 30, processes: int = 1, folder: str | None = None) -> float:
    torch.manual_seed(0)
    rows = (torch.arange(17) + torch.arange(64)[:, None]) % 32  # counting from anywhere
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = Language()
    trainer.fit(module, DataLoader(TensorDataset(rows), batch_size=4, shuffle=True))
    loss = trainer.callback_metrics["loss"].item()
    if trainer.is_global_zero:
        print(f"{trainer.world_size} processes: loss {loss:.3f} after {trainer.global_step} steps")
        if folder is not None:
            mm.save(folder, module.model)
    return loss


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
