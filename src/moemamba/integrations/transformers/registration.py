"""What transformers is told of our models."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ...config import MODEL_TYPE
from .causal import IN_FILES, MoEMambaForCausalLM
from .configuration import MoEMambaConfig
from .modeling import MoEMambaModel


def register() -> None:
    """Make `Auto*` know the type "moemamba", and files have the names of `moemamba.save`, in both directions."""
    AutoConfig.register(MODEL_TYPE, MoEMambaConfig, exist_ok=True)
    AutoModel.register(MoEMambaConfig, MoEMambaModel, exist_ok=True)
    AutoModelForCausalLM.register(MoEMambaConfig, MoEMambaForCausalLM, exist_ok=True)
    renamed = [WeightRenaming(rf"^{name}\.", f"{now}.") for name, now in IN_FILES.items()]
    register_checkpoint_conversion_mapping(MODEL_TYPE, renamed, overwrite=True)
