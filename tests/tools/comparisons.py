"""A comparison as `results.json` holds it, made up."""

from moemamba.config import ExpertsConfig, ModelConfig
from moemamba.experiments.results import Claim, Comparison, History, Reproduction, RunResult, Tuning, summarise

MODELS = {
    "mamba": ModelConfig("M", 1, 16),
    "experts-4": ModelConfig("ME", 1, 16, experts=ExpertsConfig(4, capacity_factor=1.0)),
    "experts-8": ModelConfig("ME", 1, 16, experts=ExpertsConfig(8, capacity_factor=1.0)),
}


def run_of(model: str, seed: int) -> RunResult:
    steps = (10, 20, 30)
    loss = {step: 5 - step / 10 - len(model) / 100 + seed / 50 for step in steps}
    train = [{"step": step, "loss": loss[step], "tokens_per_second": 100.0 + seed} for step in steps]
    held_out = [
        {"step": step, "tokens": step * 64, "seconds": step / 8, "loss": loss[step], "bits_per_byte": 2.0}
        | {"accuracy": 0.25, "drop_gap": 0.01}
        for step in steps
    ]
    layer = {"name": "layers.1", "load": [0.5, 0.25, 0.25, 0.0], "entropy": 1.0, "dropped": 0.1, "balance": 1.1}
    router = [{"step": step, "layers": [layer]} for step in steps] if model != "mamba" else []
    return RunResult.condensed(model, seed, "finished", History(train, held_out, router), 15)


def comparison() -> Comparison:
    runs = [run_of(model, seed) for model in MODELS for seed in ((0,) if model == "experts-8" else (0, 1))]
    settings = {"steps": 30, "batch_size": 2, "context": 32, "learning_rate": 0.1, "data": "text", "tokenizer": "bytes"}
    paper = Reproduction(
        "Table",
        {"mamba": 3.7, "experts-4": 3.6, "experts-8": 3.5},
        {"experts-8": 1.2},
        (Claim("experts-8", "mamba"), Claim("experts-4", "mamba", accuracy=True)),
        20,
        {"mamba": Tuning({0.01: 4.0, 0.1: 3.9, 0.2: float("inf")})},
    )
    recipes = {"mamba": {}, "experts-8": {"learning_rate": 0.2, "steps": 30}}
    environment = {"torch": "2", "device": "cpu"}
    rows = summarise(runs, MODELS, 32)
    return Comparison(rows, runs, settings | {"spike": None}, recipes, environment, "moemamba compare", paper)
