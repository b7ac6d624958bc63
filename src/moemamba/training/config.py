"""How a model is trained. No torch here, so that the command line answers at once."""

import math
import os
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..config import ModelConfig
from ..host.files import expanded
from ..presets import preset
from ..reading import validate

HUB = "hf:"  # how the name of a dataset of the Hugging Face hub begins

# How --help groups the options; what is named here first is all that the first page shows.
GROUPS = {
    "what most runs set": (
        *(
            "data",
            "validation",
            "tokenizer",
            "run",
            "start",
            "branch",
            "resume",
            "auto-resume",
            "steps",
            "batch-size",
            "context",
        ),
        *("optimizer", "learning-rate", "schedule", "eval-every", "save-every", "seed", "device", "compile"),
        *("model.pattern", "model.n-blocks", "model.d-model", "model.experts.n-experts", "model.experts.top-k"),
    ),
    "data": ("sampling", "reset-state", "data-seed"),
    "schedule and optimiser": (
        *("warmup", "cooldown", "final-lr", "weight-decay", "decay", "beta1", "beta2", "clip"),
        *("on-failure", "max-skips", "spike-factor"),
    ),
    "metrics, evaluation and checkpoints": ("log-every", "eval-tokens", "keep", "tensorboard"),
    "memory, speed and processes": (
        *("dtype", "accumulate", "recompute", "cuda-graph", "shard", "expert-parallel", "routing-groups", "timeout"),
    ),
}


@dataclass(frozen=True)
class TrainConfig:
    """One training run: model, data, schedule, and where it all goes.

    The defaults train a small MoE-Mamba on Python's standard library in a few minutes on two CPU cores.

    Raises:
        ValueError: a value that cannot work, named with what would.
    """

    model: ModelConfig = field(default_factory=lambda: preset("moe-mamba-tiny"))
    """the model; its vocab_size is replaced by the tokenizer's"""
    data: str | tuple[str, ...] | None = None
    """a text file, JSON or parquet with a "text" field, tokens (.u16.bin, .u32.bin), any of them packed (.gz, .xz,
    .zst, .bz2), a folder of such files, a dataset of the Hugging Face hub (hf:allenai/c4:en:train:100000, the number of
    documents last), or a folder that `moemamba prepare` has written; Python's own standard library if None. Several
    are mixed, by weights in front of a colon (0.7:books/ 0.3:hf:allenai/c4:en), or by their sizes without weights"""
    validation: str | None = None
    """held-out data of the same kinds; if None, every twentieth document of `data`, chosen by its content's hash"""
    tokenizer: str = "bytes"
    """"bytes", "bpe-8192" (trained on the training text, with that many tokens), or the path of a tokenizer.json;
    prepared tokens bring their own"""
    sampling: Literal["windows", "documents"] = "windows"
    """windows: each epoch reads every window of the text once; documents: the paper's own, random documents laid end to
    end and read from a random place on"""
    reset_state: bool = False
    """begin every document of a packed sequence from an empty state"""
    data_seed: int = 0
    """seed of the order of the data"""
    run: str = "runs/moe-mamba"
    """directory of this run, for its configuration, metrics and checkpoints"""
    start: str | None = None
    """begin with the weights of a run (its newest checkpoint), of a checkpoint or of a saved model, with a new schedule
    and a fresh optimiser; architecture and tokenizer must be the same"""
    branch: str | None = None
    """go on from a checkpoint of another run (or its newest) in a run of its own, with its optimiser and its place in
    the data; steps, cooldown and final_lr may differ: so a run with wsd is cooled down from any checkpoint"""

    steps: int = 1000
    """optimiser steps in all; a run that is resumed with more goes on longer, its schedule stretched to them"""
    batch_size: int = 16
    """sequences in one optimiser step"""
    context: int = 256
    """tokens in a sequence"""
    seed: int = 0
    """seed of the initial weights"""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for all weights; muon: Muon for experts and matrices between hidden layers, AdamW for all else, at
    the same learning_rate"""
    learning_rate: float = 3e-3
    """highest learning rate of the schedule"""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """how the learning rate falls after the warm-up; wsd (warmup, stable, decay) stays level until the cooldown"""
    warmup: float = 0.05
    """share of the steps in which the learning rate rises linearly"""
    cooldown: float = 0.2
    """share of the steps, the last ones, in which the learning rate falls with --schedule wsd"""
    final_lr: float = 0.1
    """where the schedule ends, as a share of the learning rate"""
    weight_decay: float = 0.1
    """weight decay: the share of a weight that a step at learning rate 1 would take away"""
    decay: Literal["matrices", "all"] = "matrices"
    """which weights decay: matrices spares A_log, D, biases and norms; all is the paper's recipe"""
    beta1: float = 0.9
    """share of the running mean of the gradients that AdamW keeps from step to step"""
    beta2: float = 0.95
    """share of the running mean of the squared gradients that AdamW keeps from step to step"""
    clip: float = 1.0
    """largest norm of the gradient; a larger gradient is scaled down to it"""

    on_failure: Literal["stop", "skip"] = "stop"
    """when a step's loss or gradient is not finite, or spikes: stop the run, or go on without that update"""
    max_skips: int = 10
    """with --on-failure skip: so many skipped steps one after another stop the run all the same"""
    spike_factor: float | None = None
    """a step fails too if its gradient has this many times the median norm of the last 100 steps, such as 10; never if
    None"""

    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    eval_every: int = 100
    """steps between evaluations on the held-out text"""
    eval_tokens: int = 65536
    """validation tokens that an evaluation reads at most, in windows spread evenly over the text"""
    save_every: int = 100
    """steps between checkpoints"""
    keep: int = 2
    """newest checkpoints to keep, besides the best"""
    tensorboard: bool = False
    """write the metrics for TensorBoard too, into the folder tensorboard of the run"""

    device: str = "auto"
    """where to compute: cpu, cuda or cuda:1; auto is a GPU where there is one, else the CPU"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """number format of activations; auto is bfloat16 on a GPU, else float32. Weights and optimiser are float32"""
    shard: Literal["none", "parameters"] = "none"
    """with several processes (torchrun): none gives each a copy of parameters, gradients and optimiser; parameters
    shares them out"""
    expert_parallel: int = 1
    """with several processes (torchrun): how many of them share the experts of a layer; tokens travel to them"""
    accumulate: int = 1
    """parts that a batch is computed in, one after another, to save memory; must divide batch_size"""
    routing_groups: int | None = None
    """groups of consecutive sequences that a batch is routed in: an expert's capacity and the balance loss are those of
    a group, so that results depend on neither processes nor parts; one for each process and part if None"""
    compile: bool = False
    """compile every layer with torch.compile; needs a C++ compiler on a CPU"""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """replay the step as a CUDA graph, which spares the host's work; auto: in one process on one GPU, where it can be.
    The graph keeps the memory of a step to itself"""
    recompute: bool = False
    """compute activations again in the backward pass, to save memory"""
    timeout: float = 10.0
    """minutes that several processes wait for each other within a step before they take one for lost; while text is
    tokenised or a checkpoint written they wait for a day"""

    def __post_init__(self) -> None:
        for name in ("data", "validation", "tokenizer", "run", "start", "branch"):
            object.__setattr__(self, name, at_home(getattr(self, name)))
        counts = ("steps", "batch_size", "context", "accumulate", "log_every", "eval_every", "eval_tokens")
        more = ("save_every", "keep", "max_skips", "routing_groups", "expert_parallel")
        validate(
            self,
            positive=(*counts, *more, "learning_rate", "clip", "timeout"),
            not_negative=("warmup", "cooldown", "final_lr", "weight_decay", "beta1", "beta2", "seed", "data_seed"),
        )
        if self.timeout > 1e6:
            raise ValueError(f"timeout is {self.timeout:g} minutes; choose at most 1000000")
        if self.start is not None and self.branch is not None:
            raise ValueError("start takes weights alone, branch all of a checkpoint; leave one of them out")
        for name in ("seed", "data_seed"):
            if getattr(self, name) >= 1 << 63:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be less than 2^63")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate is {self.accumulate}, which does not divide batch_size = {self.batch_size}; "
                "choose one of its divisors"
            )
        if self.routing_groups is not None and (
            self.batch_size % self.routing_groups or self.routing_groups % self.accumulate
        ):
            raise ValueError(
                f"routing_groups is {self.routing_groups}; it must divide batch_size = {self.batch_size} and be a "
                f"multiple of accumulate = {self.accumulate}, since a part is routed before the next is known"
            )
        if self.sampling == "documents" and self.reset_state:
            raise ValueError(
                'reset_state goes with sampling = "windows" alone: the paper\'s sampling carries state from one '
                "document to the next; leave one of them out"
            )
        weighted(self.data)
        for name, what in (("validation", "text"), ("tokenizer", "tokenizer"), ("start", "model"), ("branch", "run")):
            value = getattr(self, name)
            if value is not None and not value.strip():  # an unset variable of a shell, seldom what is meant
                raise ValueError(f"{name} is {value!r}, which names no {what}; name one, or leave it out")
        shares = {"warmup": 1.0, "cooldown": 1.0, "final_lr": 1.0, "beta1": 0.9999999, "beta2": 0.9999999}
        for name, most in shares.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ValueError(f"spike_factor is {self.spike_factor}; it must be more than 1, such as 10, or None")


def at_home(value: Any) -> Any:
    """Paths as text, in which a leading `~`, behind a weight too, is the home folder; everything else as it is."""
    if isinstance(value, tuple | list):
        return tuple(map(at_home, value))
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or "~" not in value:
        return value
    weight, path = re.fullmatch(r"([-+.\d][^:/]*:)?(.*)", value, re.DOTALL).groups("")  # type: ignore[union-attr]
    return f"{weight}{expanded(path)}" if path.startswith("~") else value


def weighted(data: str | tuple[str, ...] | None) -> tuple[tuple[str | None, float | None], ...]:
    """The corpora of `TrainConfig.data` and their weights, all of them None if none is given.

    `("0.7:books/", "0.3:hf:allenai/c4:en")` -> `(("books/", 0.7), ("hf:allenai/c4:en", 0.3))`. A weight is what stands
    before the first colon if it begins like a number, which neither a drive (`C:`) nor a hub (`hf:`) does; a file whose
    name does is written `./1:2.txt`.

    Raises:
        ValueError: a weight that is none, some corpora with a weight and some without, or no corpus.
    """
    found: list[tuple[str | None, float | None]] = []
    for text in (data,) if data is None or isinstance(data, str) else data:
        if text is not None and not text.strip():
            raise ValueError(f"data is {text!r}, which names no text; name one, or . for the current folder")
        number, colon, source = (text or "").partition(":")
        if not (colon and re.match(r"[-+]?\.?\d", number)):
            found.append((text, None))
            continue
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (0 < weight < math.inf and source.strip()):
            raise ValueError(
                f"data is {text!r}, whose weight is {number}; write a number above 0, a colon and a text, as in "
                f"0.7:books/ (or ./{text} if that is a file's name)"
            )
        found.append((source, weight))
    if not found:
        raise ValueError("data names no text; give one, or None for Python's standard library")
    without = [source for source, weight in found if weight is None]
    if 0 < len(without) < len(found):
        raise ValueError(f"data gives no weight to {without[0]}, but to others; give every text one, or none at all")
    return tuple(found)


def absolute(config: TrainConfig) -> TrainConfig:
    """The same run from any folder: paths of data are absolute, and in every path `~` is the home folder."""
    data = config.data
    if data is not None:
        data = _absolute(data) if isinstance(data, str) else tuple(map(_absolute, data))
    validation = config.validation and _absolute(config.validation, weights=False)
    return replace(config, data=data, validation=validation, run=config.run and str(expanded(config.run)))


def _absolute(text: str, weights: bool = True) -> str:
    """What a text stands for in the current folder, its weight in front; a dataset of the hub is the same anywhere."""
    source = weighted(text)[0][0] or text if weights else text
    if source.startswith(HUB):
        return text
    return text.removesuffix(source) + os.path.abspath(expanded(source))
