"""What of a configuration keeps its models from being exported, by format; known before anything is trained.

No torch here, so that `moemamba info` answers at once.
"""

from collections.abc import Callable

from ...config import ModelConfig
from .jamba import jamba, plain

__all__ = ["FORMATS", "architecture", "expect_portable", "obstacles", "plain", "remark", "served"]

Reasons = list[str]


def mamba(config: ModelConfig) -> Reasons:
    """transformers' Mamba, of pattern M alone."""
    options, found = config.mamba, _only_mamba(config)
    if options.inner_norm != "none":
        found.append("it has no norms of dt, B and C (mamba.inner_norm)")
    return found + _norms(config)


def falcon_mamba(config: ModelConfig) -> Reasons:
    """transformers' Falcon-Mamba: Mamba with norms without weights inside."""
    found = _only_mamba(config)
    if config.mamba.inner_norm != "weightless":
        found.append('its norms of dt, B and C have no weights: mamba.inner_norm = "weightless"')
    return found + _norms(config)


def gguf(config: ModelConfig) -> Reasons:
    """llama.cpp, which knows Mamba and Jamba; the tokenizer is looked at when the model is exported."""
    as_mamba = architecture(config) == "mamba"
    found = _only_mamba(config) + _norms(config) if as_mamba else jamba(config)
    if as_mamba and config.mamba.inner_norm != "none" and config.inner_norm_eps != config.norm_eps:
        found.append("its norms have one eps (mamba.inner_norm_eps)")
    if config.mamba.expand != 2:
        found.append(f"llama.cpp computes expand = 2 alone, and here it is {config.mamba.expand:g}")
    if config.mamba.proj_bias or not config.mamba.conv_bias:
        found.append("llama.cpp has a bias in the convolution and none in the projections of Mamba")
    return found


def architecture(config: ModelConfig) -> str:
    """What llama.cpp computes it as: Mamba where there is nothing else, with inner norms without weights if any."""
    return "jamba" if config.pattern.strip("M") or config.mamba.inner_norm == "rmsnorm" else "mamba"


def step(config: ModelConfig) -> Reasons:
    """One step as a graph with its state going in and out."""
    return ["attention's state grows with every token, and the state of the step is of one size"] * (
        "A" in config.pattern
    )


def vllm(config: ModelConfig) -> Reasons:
    """vLLM, which serves three architectures that ours can be."""
    return {"mamba": mamba, "falcon_mamba": falcon_mamba, "jamba": jamba}[served(config)](config)


def served(config: ModelConfig) -> str:
    """The architecture as which vLLM computes it: the one with nothing to pad, if there is one."""
    return next(
        (name for name, fits in (("mamba", mamba), ("falcon_mamba", falcon_mamba)) if not fits(config)), "jamba"
    )


FORMATS: dict[str, tuple[str, Callable[[ModelConfig], Reasons]]] = {
    "hf": ("transformers, with this package installed beside it", lambda config: []),
    "mamba": ("transformers' MambaForCausalLM, and all that reads it", mamba),
    "falcon_mamba": ("transformers' FalconMambaForCausalLM", falcon_mamba),
    "jamba": ("transformers' JambaForCausalLM", jamba),
    "vllm": ("vLLM, by its own Mamba, Falcon-Mamba or Jamba", vllm),
    "gguf": ("llama.cpp and what is built on it", gguf),
    "onnx": ("a step of generation for ONNX Runtime", step),
    "torch": ("a step of generation for torch.export.load", step),
}
"""by name: what it is for, and what keeps a configuration from it, a clause each"""


def obstacles(config: ModelConfig) -> dict[str, Reasons]:
    """Of every format what keeps a configuration from it; nothing where it can be exported."""
    return {name: check(config) for name, (_, check) in FORMATS.items()}


def expect_portable(name: str, config: ModelConfig) -> None:
    """Raises ValueError, with all reasons, if a configuration has no form in a format."""
    if found := FORMATS[name][1](config):
        can = [other for other, reasons in obstacles(config).items() if not reasons]
        raise ValueError(f"{name} cannot hold this model: {'; '.join(found)}. It can go to {', '.join(can) or 'none'}")


def remark(name: str, config: ModelConfig) -> str:
    """What to know of an export that is possible; empty for an exact one."""
    as_jamba = {"jamba": True, "gguf": architecture(config) == "jamba", "vllm": served(config) == "jamba"}
    padded = as_jamba.get(name, False)
    if padded and plain(config):
        return "in float32, by padding that switches its inner norms off; exact with mamba.inner_norm = rmsnorm"
    return ""


def _only_mamba(config: ModelConfig) -> Reasons:
    return [f"it has Mamba layers alone, and the pattern is {config.pattern}"] if config.pattern.strip("M") else []


def _norms(config: ModelConfig) -> Reasons:
    found = []
    if config.norm != "rmsnorm" or not config.final_norm or config.final_norm_kind not in (None, "rmsnorm"):
        found.append('its norms are norm = "rmsnorm", one before the head too')
    if config.head_bias:
        found.append("its head has no bias")
    if config.mamba.expand != int(config.mamba.expand):
        found.append(f"its expand is a whole number, and here it is {config.mamba.expand:g}")
    return found
