"""Our model below the head, as transformers has it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...model import Backbone, MoEMamba
from .arguments import sequences
from .balancing import Collected, auxiliary, carrying
from .cache import StateCache
from .configuration import MoEMambaConfig
from .folder import Folder
from .outputs import CACHE, MoEMambaOutput


class MoEMambaPreTrainedModel(Folder, PreTrainedModel):  # type: ignore[misc]
    """What both models are to transformers."""

    config_class = MoEMambaConfig
    config: MoEMambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Residual"]
    _is_stateful = True  # nothing that was read can be taken back, as assisted generation would
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {
        *("A_log", ".D", "dt_proj.bias", "router.weight", "router.bias", "balance_bias")
    }

    def drawn(self) -> None:
        """Say that the constructor has drawn all weights, but for what lies on the meta device and waits for a file.

        Of the tensors and not of their modules: transformers may put another in the place of one, which is not drawn.
        """
        for tensor in (*self.parameters(), *self.buffers()):
            tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights that a file did not have, as a new model has them."""
        names = [name for name, each in self.named_modules() if each is module]
        if not names or isinstance(module, MoEMambaPreTrainedModel):
            if isinstance(module, nn.Embedding | nn.Linear):  # a new vocabulary's
                nn.init.normal_(module.weight, std=0.02)
            return
        own: dict[str, Tensor] = {name: p for name, p in module.named_parameters(recurse=False) if not _loaded(p)}
        own |= {name: b for name, b in module.named_buffers(recurse=False) if not _loaded(b)}
        if own:
            fresh = type(self)(self.config).get_submodule(names[0])
            for name, tensor in own.items():
                tensor.copy_(getattr(fresh, name))


def _loaded(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "_is_hf_initialized", False))


class MoEMambaModel(MoEMambaPreTrainedModel, Backbone):
    """Embedding, sub-layers and norm; what `AutoModel` gives.

    While training its output carries the routers' losses: whoever differentiates a loss of it differentiates them too,
    with the weights of the configuration (`balance_weight`, `z_weight`), whatever computes the loss. A cached call of
    any length continues the sequences, and packed rows (`seq_idx`, or `position_ids` that start again) are kept apart.
    """

    def __init__(self, config: MoEMambaConfig, native: MoEMamba | None = None):
        super().__init__(config)
        native = native or MoEMamba(config.native())
        self.routers = native.config.routers
        self.embedding: nn.Embedding = native.embedding
        self.layers, self.norm = native.layers, native.norm
        self.collected = Collected()
        self.drawn()
        self.post_init()  # type: ignore[operator]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers is {every_n_layers}; all sub-layers are checkpointed, or none")
        self.recompute = enable

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.recompute

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        cache: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        carries_auxiliary: bool = True,
        **kwargs: Any,
    ) -> Any:
        """
        Args:
            input_ids: (b, l) int64, or inputs_embeds: (b, l, d).
            attention_mask: (b, positions so far and now), 0 at padding, which may lie anywhere.
            past_key_values: continues the sequences of an earlier call; or cache, which is transformers' name for it
                from 5.24 on.
            position_ids: a sequence of packed rows begins where they do not go on by one; nothing else is read of them.
            seq_idx: (b, l) the sequence of each position; -1 is padding.
            carries_auxiliary: whether the output carries the routers' losses while training; see the class.
        Raises:
            ValueError: a shape or an option that does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if output_attentions:
            raise ValueError("output_attentions is True, but this model keeps no attention weights; leave it False")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        rows, length = x.shape[:2]
        marks = sequences(rows, length, attention_mask, position_ids, seq_idx, kwargs.get("cu_seq_lens_q"))
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = StateCache()
        streams: list[Tensor] | None = [] if output_hidden_states else None
        before = None if cache is None else cache.state
        hidden, state, router = self.through(x, before, marks, hidden=streams)
        if cache is not None:
            cache.advance(state, length)
        if self.training and router:
            self.collected.note(router, self.routers)
            if carries_auxiliary and hidden.requires_grad:
                hidden = carrying(hidden, auxiliary(router, self.routers))
        output = MoEMambaOutput(
            last_hidden_state=hidden,
            hidden_states=None if streams is None else (*streams[:-1], hidden),
            router=router or None,
            **{CACHE: cache if use_cache else None},
        )
        return output if return_dict is not False else output.to_tuple()
