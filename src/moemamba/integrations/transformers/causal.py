"""Our language model, as transformers has it."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin

from ...layers.head import Head
from ...layers.plain import plain
from ...model import MoEMamba
from .balancing import auxiliary
from .cache import StateCache
from .configuration import MoEMambaConfig
from .modeling import MoEMambaModel, MoEMambaPreTrainedModel
from .outputs import CACHE, FORMER, MoEMambaCausalLMOutput

IN_FILES = {"head": "lm_head"} | {name: f"model.{name}" for name in ("embedding", "layers", "norm")}
"""the names of our modules in files, which are those of `moemamba.save`, and in the model"""


def _from_files(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Rename what was read from a file as it lies there, as Trainer reads its checkpoints."""
    for name in list(state_dict):
        first, dot, rest = name.removeprefix(prefix).partition(".")
        if dot and name.startswith(prefix) and (now := IN_FILES.get(first)):
            state_dict[f"{prefix}{now}.{rest}"] = state_dict.pop(name)


class MoEMambaForCausalLM(MoEMambaPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model; what `AutoModelForCausalLM` gives.

    `generate` of every kind (greedy, sampling, beams, left-padded rows, a cache of one's own) gives the tokens that
    `moemamba.generate` does. `native()` is the same model as our own class, with the same weights.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: MoEMambaConfig):
        super().__init__(config)
        native = MoEMamba(config.native())
        self.model = MoEMambaModel(config, native)
        self.lm_head: nn.Module = native.head
        self.register_load_state_dict_pre_hook(_from_files)
        self.drawn()
        self.post_init()

    def native(self) -> MoEMamba:
        """This model as `moemamba.MoEMamba`: the same modules, so that what changes there changes here."""
        with torch.device("meta"):
            found = MoEMamba(self.config.native())
        found.embedding, found.layers, found.norm = self.model.embedding, self.model.layers, self.model.norm
        found.head = self.lm_head  # type: ignore[assignment]
        return found.train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.model._set_gradient_checkpointing(enable, *args, **kwargs)

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.model.recompute

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `_prepare_cache_for_generation` makes one of ours

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if FORMER in model_kwargs:
            model_kwargs[CACHE] = model_kwargs.pop(FORMER)
        cache = model_kwargs.get(CACHE)
        if cache is not None and not isinstance(cache, StateCache):
            raise ValueError(f"{CACHE} is a {type(cache).__name__}; this model's is a StateCache")
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = StateCache()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As everywhere, without positions, which say nothing that the mask does not."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("position_ids", None)
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        cache: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Args:
            labels: (b, l) the tokens themselves, -100 where nothing is to be learned; or shift_labels: (b, l) the
                token that follows each.
            num_items_in_batch: labels of all parts of a batch: the loss is this part's share of their mean.
            logits_to_keep: that many last positions get logits (0: all), or those of these numbers.
            others: see `MoEMambaModel.forward`.
        """
        targets = kwargs.pop("shift_labels", None)  # no argument by name: Trainer would expect it in every batch
        if labels is not None and targets is None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            seq_idx=seq_idx,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            carries_auxiliary=targets is None,
            **kwargs,
        )
        hidden = out.last_hidden_state
        loss = logits = None
        aux = auxiliary(out.router, self.model.routers) if out.router else None
        if targets is None or not self.training:
            kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
            logits = self.lm_head(kept)  # 0 keeps all
        if targets is not None:
            loss = self._loss(hidden, targets)
            if self.training and aux is not None:
                loss = loss + aux
            if num_items_in_batch is not None:
                loss = loss * ((targets != -100).sum() / num_items_in_batch)
        output = MoEMambaCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            aux_loss=aux,
            router=out.router,
            **{CACHE: out.get(CACHE)},
        )
        return output if return_dict is not False else output.to_tuple()

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy, without logits where the head is what it was built as."""
        targets = targets.to(hidden.device)
        if plain(self.lm_head, Head):
            loss: Tensor = self.lm_head(hidden, targets)
            return loss
        logits = self.lm_head(hidden).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum") / (targets != -100).sum().clamp(min=1)
