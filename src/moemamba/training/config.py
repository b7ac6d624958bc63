"""How a model is trained. No torch here, so that the command line answers at once."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from ..config import ModelConfig
from ..data.config import NO_TEST, DataConfig, Sampling, absolute_source, at_home
from ..host.files import expanded, read_json
from ..marks import documented, option
from ..presets import preset
from ..reading import from_dict, validate

# Titles in --help, in its order.
FIRST = "what most runs set"
DATA = "data"
UPDATE = "schedule and optimiser"
WATCH = "metrics, evaluation and checkpoints"
MACHINE = "memory, speed and processes"


@documented
@dataclass(frozen=True)
class TrainConfig:
    """One training run: model, data, schedule, and where it all goes.

    The defaults train a small MoE-Mamba on Python's standard library in a few minutes on two CPU cores.

    Raises:
        ValueError: a value that cannot work, named with what would.
    """

    model: ModelConfig = option(
        factory=lambda: preset("moe-mamba-tiny"),
        group=FIRST,
        place=4,
        of_one_run=True,
        shows=("pattern", "n_blocks", "d_model", "experts.n_experts", "experts.top_k"),
    )
    """the model; its vocab_size is replaced by the tokenizer's"""
    data: str | tuple[str, ...] | None = option(None, FIRST, changes="on resume")
    """a text file, JSON or parquet with a "text" field, tokens (.u16.bin, .u32.bin), any of them packed (.gz, .xz,
    .zst, .bz2), a folder of such files, a dataset of the Hugging Face hub (hf:allenai/c4:en:train:100000, the number of
    documents last), or a folder that `moemamba prepare` has written; Python's own standard library if None. Several
    are mixed, by weights in front of a colon (0.7:books/ 0.3:hf:allenai/c4:en), or by their sizes without weights"""
    validation: str | None = option(None, FIRST, changes="on resume")
    """held-out data of the same kinds; if None, every twentieth document of `data`, chosen by its content's hash"""
    test: str | None = option(None, DATA, changes="on resume")
    """text of the same kinds, all of which a finished run is tested on once; if None, every second window of the
    held-out text, whose other half serves the evaluations of training. "none" leaves the test out"""
    tokenizer: str = option(DataConfig.tokenizer, FIRST, changes="on resume")
    """"bytes", "bpe-8192" (trained on the training text, with that many tokens), or the path of a tokenizer.json;
    prepared tokens bring their own"""
    sampling: Sampling = option("windows", DATA)
    """windows: each epoch reads every window of the text once; documents: the paper's own, random documents laid end to
    end and read from a random place on"""
    reset_state: bool = option(False, DATA)
    """begin every document of a packed sequence from an empty state"""
    carry_state: bool = option(False, DATA)
    """each row of a batch reads on where the same row of the batch before ended, and begins with the state that it left
    there, through which no gradient flows: for contexts longer than --context"""
    data_seed: int = option(0, DATA, of_one_run=True)
    """seed of the order of the data"""
    run: str = option("runs/moe-mamba", FIRST, changes="always", of_one_run=True)
    """directory of this run, for its configuration, metrics and checkpoints"""
    start: str | None = option(None, FIRST, changes="on a branch", of_one_run=True)
    """begin with the weights of a run (its newest checkpoint), of a checkpoint or of a saved model, with a new schedule
    and a fresh optimiser; architecture and tokenizer must be the same"""
    branch: str | None = option(None, FIRST, changes="on a branch", of_one_run=True)
    """go on from a checkpoint of another run (or its newest) in a run of its own, with its optimiser and its place in
    the data; steps, cooldown and final_lr may differ: so a run with wsd is cooled down from any checkpoint"""

    steps: int = option(1000, FIRST, place=2, changes="on resume", recipe=True)
    """optimiser steps in all; a run that is resumed with more goes on longer, its schedule stretched to them"""
    batch_size: int = option(16, FIRST, place=2)
    """sequences in one optimiser step"""
    context: int = option(256, FIRST, place=2)
    """tokens in a sequence"""
    seed: int = option(0, FIRST, place=3, of_one_run=True)
    """seed of the initial weights"""

    optimizer: Literal["adamw", "muon"] = option("adamw", FIRST, place=2, recipe=True)
    """adamw: AdamW for all weights; muon: Muon for experts and matrices between hidden layers, AdamW for all else, at
    the same learning_rate"""
    learning_rate: float = option(3e-3, FIRST, place=2, recipe=True)
    """highest learning rate of the schedule"""
    schedule: Literal["cosine", "linear", "wsd"] = option("cosine", FIRST, place=2, recipe=True)
    """how the learning rate falls after the warm-up; wsd (warmup, stable, decay) stays level until the cooldown"""
    warmup: float = option(0.05, UPDATE, recipe=True)
    """share of the steps in which the learning rate rises linearly"""
    cooldown: float = option(0.2, UPDATE, changes="on a branch", recipe=True)
    """share of the steps, the last ones, in which the learning rate falls with --schedule wsd"""
    final_lr: float = option(0.1, UPDATE, changes="on a branch", recipe=True)
    """where the schedule ends, as a share of the learning rate"""
    weight_decay: float = option(0.1, UPDATE, recipe=True)
    """weight decay: the share of a weight that a step at learning rate 1 would take away"""
    decay: Literal["matrices", "all"] = option("matrices", UPDATE, recipe=True)
    """which weights decay: matrices spares A_log, D, biases and norms; all is the paper's recipe"""
    beta1: float = option(0.9, UPDATE, recipe=True)
    """share of the running mean of the gradients that AdamW keeps from step to step"""
    beta2: float = option(0.95, UPDATE, recipe=True)
    """share of the running mean of the squared gradients that AdamW keeps from step to step"""
    rates: dict[str, float] = option(factory=dict, group=UPDATE, recipe=True)
    """factors of the learning rate by the names of modules or parameters, in which * stands for anything:
    *.router=0.5 embedding=2; the last that fits counts, and 0 leaves weights as they are"""
    average: float | None = option(None, UPDATE, recipe=True)
    """average the weights over the steps with this decay, such as 0.999 (about the last 1,000 steps); the average is
    evaluated too and saved beside the weights, in the folder averaged of each checkpoint. None: no average"""
    clip: float = option(1.0, UPDATE, recipe=True)
    """largest norm of the gradient; a larger gradient is scaled down to it"""

    on_failure: Literal["stop", "skip"] = option("stop", UPDATE, changes="on resume")
    """when a step's loss or gradient is not finite, or spikes: stop the run, or go on without that update"""
    max_skips: int = option(10, UPDATE, changes="on resume")
    """with --on-failure skip: so many skipped steps one after another stop the run all the same"""
    spike_factor: float | None = option(None, UPDATE, changes="on resume")
    """a step fails too if its gradient has this many times the median norm of the last 100 steps, such as 10; never if
    None"""

    log_every: int = option(10, WATCH, changes="always")
    """steps between lines of metrics.jsonl"""
    eval_every: int = option(100, FIRST, place=2, changes="on resume")
    """steps between evaluations on the held-out text"""
    eval_tokens: int = option(65536, WATCH, changes="on resume")
    """validation tokens that an evaluation reads at most, in windows spread evenly over the text"""
    test_tokens: int | None = option(None, WATCH, changes="on resume")
    """tokens that the test of a finished run reads at most, likewise; all if None"""
    save_every: int = option(100, FIRST, place=2, changes="always")
    """steps between checkpoints"""
    save_at: tuple[int, ...] = option((), WATCH, changes="always")
    """steps after which a checkpoint is saved besides, and kept: from there runs branch off"""
    keep: int = option(2, WATCH, changes="always")
    """newest checkpoints to keep, besides the best"""
    tensorboard: bool = option(False, WATCH, changes="always")
    """write the metrics for TensorBoard too, into the folder tensorboard of the run; the same as --track tensorboard"""
    track: Literal["none", "tensorboard", "trackio", "wandb"] = option("none", WATCH, changes="always", later=True)
    """show the metrics in a program for that while they come: TensorBoard, trackio (on this machine, or in a space of
    the Hugging Face hub), or Weights & Biases; the project is moemamba, the run is called as its directory"""

    device: str = option("auto", FIRST, place=3, changes="always")
    """where to compute: cpu, cuda or cuda:1; auto is a GPU where there is one, else the CPU"""
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", MACHINE)
    """number format of activations; auto is bfloat16 on a GPU, else float32. Weights and optimiser are float32"""
    shard: Literal["none", "parameters"] = option("none", MACHINE, place=2, changes="on resume")
    """with several processes (torchrun): none gives each a copy of parameters, gradients and optimiser; parameters
    shares them out"""
    expert_parallel: int = option(1, MACHINE, place=2, changes="on resume")
    """with several processes (torchrun): how many of them share the experts of a layer; tokens travel to them"""
    sequence_parallel: int = option(1, MACHINE, place=2, changes="on resume", later=True)
    """with several processes (torchrun): how many of them share each sequence, a part each, for contexts that one
    does not hold"""
    accumulate: int = option(1, MACHINE, changes="on resume")
    """parts that a batch is computed in, one after another, to save memory; must divide batch_size"""
    routing_groups: int | None = option(None, MACHINE, place=2)
    """groups of consecutive sequences that a batch is routed in: an expert's capacity and the balance loss are those of
    a group, so that results depend on neither processes nor parts; one for each process and part if None"""
    compile: bool = option(False, FIRST, place=3, changes="always")
    """compile every layer with torch.compile; needs a C++ compiler on a CPU"""
    cuda_graph: Literal["auto", "on", "off"] = option("auto", MACHINE, place=1, changes="always")
    """replay the step as a CUDA graph, which spares the host's work; auto: in one process on one GPU, where it can be.
    The graph keeps the memory of a step to itself"""
    recompute: bool = option(False, MACHINE, changes="always")
    """compute activations again in the backward pass, to save memory"""
    timeout: float = option(10.0, MACHINE, place=2, changes="always")
    """minutes that several processes wait for each other within a step before they take one for lost; while text is
    tokenised or a checkpoint written they wait for a day"""

    def __post_init__(self) -> None:
        for name in ("data", "validation", "test", "tokenizer", "run", "start", "branch"):
            object.__setattr__(self, name, at_home(getattr(self, name)))
        counts = ("steps", "batch_size", "context", "accumulate", "log_every", "eval_every", "eval_tokens")
        more = (
            "test_tokens",
            "save_every",
            "keep",
            "max_skips",
            "routing_groups",
            "expert_parallel",
            "sequence_parallel",
        )
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
        if any(step < 1 for step in self.save_at):
            raise ValueError(f"save_at is {self.save_at}; steps are counted from 1")
        self.reads()  # has rules of its own
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
        for name, what in (("start", "model"), ("branch", "run")):
            value = getattr(self, name)
            if value is not None and not value.strip():  # an unset variable of a shell, seldom what is meant
                raise ValueError(f"{name} is {value!r}, which names no {what}; name one, or leave it out")
        shares = {"warmup": 1.0, "cooldown": 1.0, "final_lr": 1.0, "beta1": 0.9999999, "beta2": 0.9999999}
        for name, most in shares.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average is {self.average}; it must lie between 0 and 1, such as 0.999, or None")
        for pattern, factor in self.rates.items():
            if not pattern or factor < 0:
                raise ValueError(
                    f"rates has {factor} for {pattern!r}; give the name of a module or a parameter, and a factor of 0 "
                    "or more"
                )
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ValueError(f"spike_factor is {self.spike_factor}; it must be more than 1, such as 10, or None")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; those of the model by `model=config.model.replace(...)`.

        Raises:
            ValueError: there is no such field, or the values cannot work.
        """
        for name in changes.keys() - {field.name for field in fields(self)}:
            raise ValueError(f"{name} is no field of TrainConfig; a field of the model is changed by model.replace")
        return replace(self, **changes)

    def reads(self) -> DataConfig:
        """What of it concerns the data.

        Raises:
            ValueError: a value that cannot work.
        """
        cache = str(expanded(self.run) / "tokens")
        lanes = self.batch_size if self.carry_state else None
        how = (self.sampling, self.reset_state, self.data_seed, self.context)
        return DataConfig(self.data, self.validation, self.tokenizer, *how, cache, self.test, lanes)


def absolute(config: TrainConfig) -> TrainConfig:
    """The same run from any folder: paths of data are absolute, and in every path `~` is the home folder."""
    data = config.data
    if data is not None:
        data = absolute_source(data) if isinstance(data, str) else tuple(map(absolute_source, data))
    validation = config.validation and absolute_source(config.validation, weights=False)
    test = config.test if config.test in (None, NO_TEST) else absolute_source(config.test, weights=False)
    return replace(config, data=data, validation=validation, test=test, run=config.run and str(expanded(config.run)))


def read_run(file: Path) -> TrainConfig:
    """How a run was begun, from its train.json; one of an older version has no test, and evaluates on all it held out.

    Raises:
        ValueError: what is wrong, with the file's name.
        OSError: it is missing or cannot be read.
    """
    return from_dict(TrainConfig, {"test": NO_TEST} | read_json(file), str(file))


def run_of(place: Path) -> TrainConfig | None:
    """How the run was begun that a model belongs to: a run, a checkpoint of one, its averaged weights, or a model that
    lies in a run's folder; None for a model alone."""
    above = (place, *place.resolve().parents)[:4]
    file = next((path / "train.json" for path in above if (path / "train.json").is_file()), None)
    return read_run(file) if file else None
