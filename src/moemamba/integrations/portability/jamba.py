"""Our sub-layers as layers of Jamba, each a mixer and a feed-forward network (arXiv 2403.19887). No torch here."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...config import ModelConfig


class JambaLayer(NamedTuple):
    """A layer of Jamba, by the numbers of our sub-layers that it is made of."""

    mixer: int | None
    """None: attention that adds nothing"""
    attention: bool
    feedforward: int | None
    """None: one that adds nothing"""
    experts: bool


class Period(NamedTuple):
    """The layers `offset`, `offset + length`, and so on."""

    length: int
    offset: int


def jamba(config: ModelConfig) -> list[str]:
    """What keeps a configuration from being Jamba's."""
    found = _layers(config)
    if config.norm != "rmsnorm" or not config.final_norm or config.final_norm_kind not in (None, "rmsnorm"):
        found.append('its norms are norm = "rmsnorm", one before the head too')
    if config.head_bias:
        found.append("its head has no bias")
    used = set(config.pattern)
    found += _mamba(config) if "M" in used else ["it needs a Mamba layer"]
    found += _experts(config) if "E" in used else []
    found += _feedforward(config) if "F" in used else []
    found += _attention(config) if "A" in used else []
    return found


def plain(config: ModelConfig) -> bool:
    """Whether Mamba layers have no inner norms, which Jamba always has."""
    return config.mamba.inner_norm == "none"


def layout(config: ModelConfig) -> list[JambaLayer]:
    """The layers of Jamba. Without attention one more, which adds nothing, since its readers look for one.

    Raises:
        ValueError: a sub-layer has no place.
    """
    layers: list[JambaLayer] = []
    for number, letters in enumerate(config.layers):
        if letters in ("M", "A"):
            layers.append(JambaLayer(number, letters == "A", None, False))
        elif letters in ("E", "F") and layers and layers[-1].feedforward is None:
            layers[-1] = layers[-1]._replace(feedforward=number, experts=letters == "E")
        else:
            raise ValueError(
                f"its layers are a mixer (M or A) and then at most one of E and F, unlike {config.pattern}"
            )
    if not any(layer.attention for layer in layers):
        every = all(layer.experts for layer in layers)  # a period of 1 leaves no layer out
        layers.append(JambaLayer(None, True, None, every))
    return layers


def period(flags: Sequence[bool]) -> Period | None:
    """The shortest period whose layers are those marked; None if there is none."""
    for length in range(1, len(flags) + 1):
        for offset in range(length):
            if all(flag == (number % length == offset) for number, flag in enumerate(flags)):
                return Period(length, offset)
    return None


def pattern(letters: Iterable[str]) -> tuple[str, int]:
    """The shortest pattern that, repeated, is these letters, and how often."""
    whole = "".join(letters)
    for length in range(1, len(whole) + 1):
        if len(whole) % length == 0 and whole[:length] * (len(whole) // length) == whole:
            return whole[:length], len(whole) // length
    return whole, 1


def _layers(config: ModelConfig) -> list[str]:
    try:
        layers = layout(config)
    except ValueError as error:
        return [str(error)]
    uneven = [layer.experts for layer in layers]
    if any(uneven) and period(uneven) is None:
        return ["its layers with experts come at even distances"]
    if period([layer.attention for layer in layers]) is None:
        return ["its attention layers come at even distances"]
    return []


def _mamba(config: ModelConfig) -> list[str]:
    found = []
    if config.mamba.expand != int(config.mamba.expand):
        found.append(f"its expand is a whole number, and here it is {config.mamba.expand:g}")
    if not plain(config) and config.inner_norm_eps != config.norm_eps:
        found.append("its norms have one eps (mamba.inner_norm_eps)")
    if plain(config) and "A" in config.pattern:
        found.append("beside attention its Mamba layers need mamba.inner_norm")
    return found


def _experts(config: ModelConfig) -> list[str]:
    experts, found = config.experts, []
    if experts.activation != "swiglu":
        found.append(f"its experts are swiglu, and here they are {experts.activation}")
    if experts.scores != "softmax" or experts.router_bias or experts.bias:
        found.append("its router is a softmax, without biases in router and experts")
    if experts.n_shared_experts:
        found.append("it has no shared experts")
    if experts.bias_rate:
        found.append("its router has no selection bias, which experts.bias_rate moves")
    if isinstance(experts.n_experts, tuple):
        found.append("it has as many experts in each layer")
    elif experts.n_experts == 1:
        found.append("it needs more than one expert")
    if "F" in config.pattern and config.d_ff != config.d_expert:
        found.append(
            f"its experts are as wide as its dense layers, and here d_ff is {config.d_ff}, d_expert {config.d_expert}"
        )
    return found


def _feedforward(config: ModelConfig) -> list[str]:
    if config.feedforward.activation == "swiglu" and not config.feedforward.bias:
        return []
    return ["its dense layers are swiglu without biases"]


def _attention(config: ModelConfig) -> list[str]:
    options = config.attention
    if options.rotary or options.qkv_bias or options.out_bias:
        return ["its attention has no positions and no biases: attention.rotary = False"]
    return []
