"""A small English model that is to be talked to, from its text to its files: one command for each step.

    talk.py text CORPORA TEXT         # check what lies in CORPORA against SOURCES, and write it as text and as tokens
    talk.py train TEXT RUN [OPTIONS]  # RECIPE, one GPU; further options of `moemamba train` go behind it
    talk.py pack RUN MODEL            # its averaged weights, matrices in 8 bits and the rest in bfloat16
    talk.py measure TEXT MODEL        # what the model has to show, as one JSON object

What is held out was set apart by document; a document of the training text that shares a paragraph with it goes.
`measure` has: bits a byte of held-out OpenStax text; of 20 samples of 200 tokens the share of words that the training
or the held-out text knows, and groups of 8 words that come twice; the bytes of each file.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Source(NamedTuple):
    file: str
    sha256: str
    licence: str
    obtained: str


SOURCES = {
    "openstax": Source(
        "text/openstax/train.txt",
        "930eeaaf214787fce90736ec6c728eaa4c69d5afbf3928857aaa97eaea201733",
        "CC BY 3.0",
        "OpenStax textbooks (openstax.org) as plain text; a line <|endoftext|> ends a document",
    ),
    "openstax, held out": Source(
        "text/openstax/val.txt",
        "75e3eb700e669412aeed4342415afb8d6b0f321fe4f87481bdd5ee036edbf8ca",
        "CC BY 3.0",
        "other documents of the same textbooks",
    ),
    "mix": Source(
        "mix/train.bin",
        "d467987409d9312023315fae13c99ea925c82bdf43eeb79b0e535baa5de86258",
        "CC BY-SA 3.0 (English Wikipedia), public domain in the USA (books), CC BY 3.0 (OpenStax)",
        "documents of English Wikipedia (52%), public-domain books (44%) and OpenStax (4%) as GPT-2 tokens, uint16, "
        "50256 behind each document",
    ),
}
RECIPE = {
    "model": "--model.d-model 256 --model.n-blocks 6 --model.tie-embeddings",
    "experts": "--model.experts.n-experts 8 --model.experts.top-k 2 --model.experts.d-expert 176",
    "budget": "--steps 8000 --batch-size 128 --context 512 --eval-every 500 --save-every 2000",
    "rates": "--optimizer muon --learning-rate 0.003 --schedule wsd --warmup 0.02 --cooldown 0.3 --average 0.998",
}
"""beside the preset moe-mamba-25m-plus, whose width it changes"""
VOCABULARY = 4096
WEIGHTS = {"mix": 0.92, "openstax": 0.08}
END = "<|endoftext|>"
SAMPLES, TOKENS, GRAM = 20, 200, 8
WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)*")


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def documents(file: Path, corpora: Path) -> Iterator[str]:
    """The texts of a source."""
    if file.suffix != ".bin":
        yield from file.read_text(encoding="utf-8").split(f"\n{END}\n")
        return
    from moemamba.text import load_tokenizer

    gpt2 = load_tokenizer(corpora / "tokenizers" / "gpt2")
    ids = np.fromfile(file, "<u2")
    first = 0
    for end in np.flatnonzero(ids == 50256):
        yield gpt2.decode(ids[first:end].tolist())
        first = int(end) + 1


def paragraphs(texts: Iterable[str]) -> set[int]:
    """Hashes of what is long enough to be told from others."""
    return {hash(each) for text in texts for each in map(str.strip, text.split("\n")) if len(each) > 80}


def write_text(corpora: Path, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, source in SOURCES.items():
        if (got := digest(corpora / source.file)) != source.sha256:
            raise SystemExit(f"{corpora / source.file} has the SHA-256 {got}; expected {source.sha256} for {name}")
    out.mkdir(parents=True)
    held = list(documents(corpora / SOURCES["openstax, held out"].file, corpora))
    known = paragraphs(held)
    (out / "held_out.txt").write_text(f"\n{END}\n".join(held), encoding="utf-8")
    for name in WEIGHTS:
        kept = shared = size = 0
        with (out / f"{name}.txt").open("w", encoding="utf-8") as stream:
            for text in documents(corpora / SOURCES[name].file, corpora):
                if paragraphs([text]) & known:
                    shared += 1
                    continue
                kept, size = kept + 1, size + stream.write(f"{text}\n{END}\n")
        found[name] = {"documents": kept, "characters": size, "left out, shared with what is held out": shared}
    write_tokens(out)
    return found


def moemamba(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "moemamba", *map(str, arguments)], check=True)


def write_tokens(text: Path) -> None:
    tokenizer: object = f"bpe-{VOCABULARY}"
    for name in WEIGHTS:
        moemamba("prepare", text / f"{name}.txt", "--out", text / name, "--tokenizer", tokenizer, "--held-out", 0.005)
        tokenizer = text / name / "tokenizer.json"


def train(text: Path, run: Path, options: list[str]) -> None:
    data = [f"{weight}:{text / name}" for name, weight in WEIGHTS.items()]
    recipe = [each for part in RECIPE.values() for each in part.split()]
    held = ["--validation", text / "held_out.txt", "--test", "none"]
    moemamba("train", "moe-mamba-25m-plus", "--data", *data, *held, "--run", run, *recipe, *options)


def pack(run: Path, out: Path) -> None:
    import torch

    from moemamba import load, save

    save(out, *load(run / "averaged", dtype=torch.bfloat16, weights="int8"))


def words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def measure(text: Path, place: Path) -> dict[str, Any]:
    import torch

    from moemamba import generate, load
    from moemamba.training.evaluate import evaluate

    torch.set_num_threads(1)
    model, tokenizer = load(place, dtype=torch.float32)
    known = {word for file in text.glob("*.txt") for line in file.open(encoding="utf-8") for word in words(line)}
    beginnings = [each for each in (text / "held_out.txt").read_text(encoding="utf-8").split(f"\n{END}\n") if each]
    prompts = [tokenizer.encode(beginnings[k % len(beginnings)])[:16] for k in range(SAMPLES)]
    samples = generate(model, prompts, TOKENS, seed=0, temperature=0.7, top_p=0.9)
    texts = [tokenizer.decode(sample) for sample in samples]
    # The last word may be cut; numbers and formulas are no words.
    said = [words(each)[:-1] for each in texts]
    grams = [[tuple(own[k : k + GRAM]) for k in range(len(own) - GRAM + 1)] for own in said]
    every = [word for own in said for word in own]
    found = evaluate(model, text / "held_out.txt", tokenizer=tokenizer)
    return {
        "held out": found.to_dict(),
        "share of real words": round(sum(word in known for word in every) / max(len(every), 1), 4),
        "words": len(every),
        "not known": sorted({word for word in every if word not in known})[:40],
        "repeated 8-grams": sum(len(own) - len(set(own)) for own in grams),
        "bytes": {file.name: file.stat().st_size for file in place.iterdir()},
        "samples": texts[:3],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["text", "train", "pack", "measure"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options, rest = parser.parse_known_args()
    if rest and options.what != "train":
        parser.error(f"{options.what} has no further options, and was given {' '.join(rest)}")
    if options.what == "train":
        train(options.source, options.out, rest)
    elif options.what == "pack":
        pack(options.source, options.out)
    else:
        work = write_text if options.what == "text" else measure
        print(json.dumps(work(options.source, options.out), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
