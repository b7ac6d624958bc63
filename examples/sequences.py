"""What is no text, as tokens: bases of DNA, images pixel by pixel, audio codes of several codebooks.

    python examples/sequences.py [FOLDER [STEPS]]

Each makes a folder of tokens with `prepare`, trains a small model on it, and writes something of the same kind.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import moemamba as mm

BASES = "ACGT"


def genes(count: int = 120, length: int = 90) -> Iterator[np.ndarray]:
    """DNA in which codons repeat: 0 to 3 are the bases."""
    draws = np.random.default_rng(0)
    codons = draws.integers(0, 4, (6, 3))
    for _ in range(count):
        yield codons[draws.integers(0, 6, length // 3)].ravel()


def pictures(count: int = 120, side: int = 8) -> Iterator[np.ndarray]:
    """Discs in 8 shades of grey, row by row."""
    draws = np.random.default_rng(1)
    y, x = np.mgrid[:side, :side]
    for _ in range(count):
        centre, radius = draws.uniform(2, side - 2, 2), draws.uniform(1.5, 3)
        distance = np.hypot(y - centre[0], x - centre[1])
        yield np.clip((radius - distance + 1) * 4, 0, 7).astype(int).ravel()


CODEBOOKS, CODES = 4, 16


def sounds(count: int = 120, frames: int = 20) -> Iterator[np.ndarray]:
    """Frames of 4 codes, one of each codebook, as a codec such as EnCodec makes them, flattened.

    Each codebook has ids of its own, code + 16 * codebook, so that a model knows which one it reads.
    """
    draws = np.random.default_rng(2)
    for _ in range(count):
        start = draws.integers(0, CODES, CODEBOOKS)
        frame = (start + np.arange(frames)[:, None] * np.arange(1, CODEBOOKS + 1)) % CODES  # (frames, codebooks)
        yield (frame + CODES * np.arange(CODEBOOKS)).ravel()


def train(name: str, documents: Iterator[np.ndarray], ids: int, folder: Path, steps: int) -> tuple[mm.MoEMamba, float]:
    """Prepare, train and load: the model, and its held-out loss in nats a token."""
    mm.prepare(documents, folder / name, vocab_size=ids, held_out=0.1)
    config = mm.TrainConfig(
        model=mm.ModelConfig("ME", n_blocks=2, d_model=32, experts=mm.ExpertsConfig(4)),
        data=str(folder / name),
        run=str(folder / f"run-{name}"),
        steps=steps,
        batch_size=8,
        context=64,
        learning_rate=1e-2,
        eval_every=steps,
        eval_tokens=1024,
        save_every=steps,
    )
    mm.train(config, report=mm.Report(silent=True))
    model, _ = mm.load(config.run)
    return model, mm.evaluate(model, folder / name, context=64).loss


def main(folder: Path, steps: int) -> None:
    model, loss = train("dna", genes(), 4, folder, steps)
    end = 4  # the mark that prepare adds behind each document
    written = mm.generate(model, [end, 0, 1, 2], 30, stop=end, seed=0)
    print(f"DNA: {loss:.3f} nats a base; {''.join(BASES[base] for base in written)}")

    model, loss = train("pictures", pictures(), 8, folder, steps)
    pixels = mm.generate(model, [8], 64, stop=8, seed=0)
    shades = " .:-=+*#"
    rows = ["".join(shades[pixel] for pixel in pixels[first : first + 8]) for first in range(0, len(pixels), 8)]
    print(f"pictures: {loss:.3f} nats a pixel", *rows, sep="\n  ")

    model, loss = train("sounds", sounds(), CODES * CODEBOOKS, folder, steps)
    codes = np.array(mm.generate(model, [CODES * CODEBOOKS], 6 * CODEBOOKS, seed=0))
    codes = codes[: len(codes) // CODEBOOKS * CODEBOOKS].reshape(-1, CODEBOOKS) % CODES  # (frames, codebooks)
    print(f"sounds: {loss:.3f} nats a code; first frames {codes[:3].tolist()}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples-out"), int(sys.argv[2]) if len(sys.argv) > 2 else 200)
