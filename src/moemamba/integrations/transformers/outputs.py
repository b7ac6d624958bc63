"""What our models return to transformers, whose name for a cache depends on its version."""

from dataclasses import make_dataclass
from typing import Any

from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import ModelOutput

CACHE, FORMER = ("cache", "past_key_values") if "cache" in ALL_CACHE_NAMES else ("past_key_values", "cache")
"""the argument and field of the cache, and what other versions call it, which is understood too"""


def _output(name: str, doc: str, *fields: str) -> Any:
    """A `ModelOutput` with these fields, each None where it is not given."""
    also = {"__doc__": doc, FORMER: property(lambda self: getattr(self, CACHE)), "__module__": __name__}
    return make_dataclass(name, [(field, Any, None) for field in fields], bases=(ModelOutput,), namespace=also)


MoEMambaOutput = _output(
    "MoEMambaOutput",
    """What `MoEMambaModel` returns.

    last_hidden_state: (b, l, d).
    cache (before transformers 5.24 past_key_values): the `StateCache`.
    hidden_states: on request the residual stream before each sub-layer, and last_hidden_state.
    router: a `RouterStats` for each router, bottom to top.
    """,
    *("last_hidden_state", CACHE, "hidden_states", "router"),
)
MoEMambaCausalLMOutput = _output(
    "MoEMambaCausalLMOutput",
    """What `MoEMambaForCausalLM` returns.

    loss: () with labels: cross-entropy in nats, and while training the routers' losses.
    logits: (b, l, v); None while training with labels, where the loss is computed without holding them.
    aux_loss: () the routers' losses, weighed.
    cache, hidden_states, router: see `MoEMambaOutput`.
    """,
    *("loss", "logits", CACHE, "hidden_states", "aux_loss", "router"),
)
