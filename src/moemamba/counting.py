"""How large a model is and what a token costs, from its configuration alone: nothing is allocated. No torch here."""

from typing import NamedTuple

from .config import ExpertsConfig, ModelConfig


class ParameterCount(NamedTuple):
    """Parameters of a model. `total` and `active` are counted as the paper does, without embedding and head."""

    total: int
    active: int
    """those that one token passes through: the router, top_k experts and everything else that is not an expert"""
    embedding: int
    """embedding and head (once if tied)"""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Total, active and embedding parameters of a model that need not fit anywhere."""
    final_norm = _norm(config) if config.final_norm else 0
    layers = [_layer(config, letters) for letters in config.layers]
    tables = 1 if config.tie_embeddings else 2
    return ParameterCount(
        total=sum(total for total, _ in layers) + final_norm,
        active=sum(active for _, active in layers) + final_norm,
        embedding=tables * config.vocab_size * config.d_model,
    )


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Floating-point operations of one token's forward pass, a multiply-add being two; training costs three times that.

    Counts the products with active weights and the head, the scan (9 for each state dimension of each channel: decay,
    drive, update and output) and, for attention, the two products with `context / 2` keys and values on average.
    """
    matrices = count_parameters(config).active + config.vocab_size * config.d_model
    mamba = sum(letter in "MR" for letters in config.layers for letter in letters)
    attention = sum(letter == "A" for letters in config.layers for letter in letters)
    scan = 9 * config.d_inner * config.mamba.d_state
    return 2 * matrices + mamba * scan + attention * 2 * context * config.d_model


def state_bytes(config: ModelConfig, context: int, element: int = 4) -> int:
    """Size of one sequence's `State` after `context` tokens; scan states are float32, the rest `element` bytes each."""
    mamba = sum(letter in "MR" for letters in config.layers for letter in letters)
    attention = sum(letter == "A" for letters in config.layers for letter in letters)
    per_mamba = config.d_inner * (4 * config.mamba.d_state + element * (config.mamba.d_conv - 1))
    return mamba * per_mamba + attention * context * (2 * config.d_model * element + 8)


def _norm(config: ModelConfig) -> int:
    return config.d_model * (2 if config.norm == "layernorm" else 1)


def _layer(config: ModelConfig, letters: str) -> tuple[int, int]:
    """(total, active) of one residual sub-layer."""
    parts = [_branch(config, letter) for letter in letters]
    return sum(t for t, _ in parts) + _norm(config), sum(a for _, a in parts) + _norm(config)


def _branch(config: ModelConfig, letter: str) -> tuple[int, int]:
    d, i, n, r = config.d_model, config.d_inner, config.mamba.d_state, config.dt_rank
    core = i * (config.mamba.d_conv + 1) + i * (r + 2 * n) + (r + 1) * i + i * n + i  # conv1d x_proj dt_proj A_log D
    match letter:
        case "M":
            return (core + 3 * d * i,) * 2
        case "A":
            return (4 * d * d,) * 2
        case "F":
            rows = _rows(config.d_ff, config.feedforward.activation)
            bias = rows + d if config.feedforward.bias else 0
            return (d * rows + config.d_ff * d + bias,) * 2
        case "E":
            return _routed(config.experts, d, d, config.d_expert)
    parts = [(core, core)]
    shared = config.routed.routing == "shared"
    if shared:
        parts.append((d * config.routed.experts.n_experts,) * 2)
    for name, d_in, d_out in (("conv", d, i), ("gate", d, i), ("out", i, d)):
        if name not in config.routed.projections:
            parts.append((d_in * d_out,) * 2)
        elif shared:
            parts.append((d_in * d_out * config.routed.experts.n_experts, d_in * d_out * config.routed.experts.top_k))
        else:
            parts.append(_routed(config.routed.experts, d_in, d_out, config.d_routed_expert))
    return sum(t for t, _ in parts), sum(a for _, a in parts)


def _routed(experts: ExpertsConfig, d_in: int, d_out: int, d_expert: int) -> tuple[int, int]:
    expert = d_in * _rows(d_expert, experts.activation) + d_expert * d_out
    router = d_in * experts.n_experts
    shared = experts.n_shared_experts * expert
    return router + shared + experts.n_experts * expert, router + shared + experts.top_k * expert


def _rows(hidden: int, activation: str) -> int:
    return 2 * hidden if activation == "swiglu" else hidden
