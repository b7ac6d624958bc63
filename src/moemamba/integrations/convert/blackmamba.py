"""BlackMamba: Zyphra's MoE-Mamba (arXiv 2402.01771), as its own code reads its checkpoints.

That code never sets the activation, so that `swiglu` there is exact GELU of the gate, and a token's one expert counts
with the sigmoid of its logit.
"""

from ...config import Activation, ExpertsConfig, FeedForwardConfig, MambaConfig, ModelConfig
from ..portability.jamba import pattern
from .format import Format, mixer
from .keys import Keys
from .table import Entry, renamed, stacked


class BlackMamba(Format):
    """A config.json without `model_type`, known by `mamba_moe_layers`. No tokenizer is published with it."""

    name, title = "blackmamba", "BlackMamba"

    def recognises(self, keys: Keys) -> bool:
        return "mamba_moe_layers" in keys and "model_type" not in keys

    def model(self, keys: Keys) -> ModelConfig:
        keys.must("rms_norm", True, True, "our norms before layers are RMSNorm here")
        letters, n_experts = self.letters(keys)
        bias, wide = keys.get("add_bias_linear", bool), keys.get("ffn_hidden_size", int)
        activation: Activation = "geglu" if keys.get("swiglu", bool) else "gelu_erf"
        eps = keys.get("layernorm_epsilon", float, 1e-5)
        repeated, n_blocks = pattern(letters)
        return ModelConfig(
            repeated,
            n_blocks,
            keys.get("hidden_size", int),
            vocab_size=keys.get("vocab_size", int),
            mamba=MambaConfig(
                keys.get("state_size", int),
                keys.get("conv_dimension", int),
                keys.get("expansion_factor", float),
                proj_bias=bias,
            ),
            experts=ExpertsConfig(
                n_experts, d_expert=wide, activation=activation, scores="sigmoid", router_bias=True, bias=bias
            )
            if n_experts
            else ExpertsConfig(),
            feedforward=FeedForwardConfig(wide, activation, bias) if "F" in letters else FeedForwardConfig(),
            tie_embeddings=True,
            norm_eps=eps,
            final_norm_kind="layernorm",
            head_bias=bias,
        )

    def letters(self, keys: Keys) -> tuple[str, int | tuple[int, ...]]:
        """A letter a layer, and how many experts those of E have, each its own where they differ; 0 without them."""
        layers = keys.values["mamba_moe_layers"]
        known = {"r": "M", "1": "F"} | {f"{count}": "E" for count in range(2, 10)}
        if not isinstance(layers, list) or len(layers) != keys.get("num_layers", int) or not set(layers) <= set(known):
            raise ValueError(
                f"{keys.where}: mamba_moe_layers must say of each of num_layers layers that it is Mamba (r) or how "
                "many experts it has (1 to 9); both in one layer cannot be converted"
            )
        counts = tuple(int(each) for each in layers if known[each] == "E")
        return "".join(known[each] for each in layers), counts if len(set(counts)) > 1 else max(counts, default=0)

    def table(self, config: ModelConfig) -> list[Entry]:
        table = [Entry("embedding.weight", ("embedding.word_embeddings.weight",))]
        makers = {"M": self._mamba, "E": self._experts, "F": self._dense}
        for number, (letter, (own,)) in enumerate(config.sublayers()):
            ours, theirs = f"layers.{number}.", f"decoder.layers.{number}."
            table += renamed(ours, theirs, ["norm.weight"])
            table += makers[letter](own, f"{ours}branches.0.", f"{theirs}mixer.")
        table += renamed("norm.", "decoder.final_layernorm.", ["weight", "bias"])
        return table + ([Entry("head.bias", ("output_layer.bias",))] if config.head_bias else [])

    def copies(self, config: ModelConfig) -> dict[str, str]:
        return {"output_layer.weight": "embedding.word_embeddings.weight"}

    def _mamba(self, config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
        return renamed(ours, theirs, mixer(config))

    def _experts(self, config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
        places = [f"{theirs}local_experts.{number}." for number in range(config.experts.count)]
        found = renamed(f"{ours}router.", f"{theirs}router.", ["weight", "bias"])
        for name, kinds in (("up", "linear_fc1"), ("down", "linear_fc2")):
            found.append(stacked(f"{ours}experts.{name}_proj", [f"{place}{kinds}.weight" for place in places]))
            if config.experts.bias:
                found.append(stacked(f"{ours}experts.{name}_bias", [f"{place}{kinds}.bias" for place in places]))
        return found

    def _dense(self, config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
        found = []
        for name, kinds in (("up_proj.", "linear_fc1."), ("down_proj.", "linear_fc2.")):
            found += renamed(ours + name, theirs + kinds, ["weight", "bias"] if config.feedforward.bias else ["weight"])
        return found
