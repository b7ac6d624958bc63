"""Our models as models of transformers: `AutoModelForCausalLM` and everything that goes with it.

    import moemamba.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("runs/first")

Importing this registers the type "moemamba" with transformers' `Auto*` classes, which then open a run, a checkpoint, or
what `save_pretrained` has written; `moemamba.load` opens all of these too. `accelerate` is for transformers' own
models.
"""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "moemamba.integrations.transformers needs the package transformers: pip install 'moemamba[hf]'",
        name="transformers",
    )

from .accelerating import accelerate
from .balancing import BalanceBias
from .cache import StateCache
from .causal import MoEMambaForCausalLM
from .configuration import MoEMambaConfig
from .modeling import MoEMambaModel
from .registration import register

__all__ = [
    "BalanceBias",
    "MoEMambaConfig",
    "MoEMambaForCausalLM",
    "MoEMambaModel",
    "StateCache",
    "accelerate",
]

register()
