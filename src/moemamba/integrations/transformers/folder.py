"""The folder of a model: what both libraries read, and what a reader wants to know."""

import os
from pathlib import Path
from typing import Any, ClassVar

from ...checkpoint import find_model
from ...host.files import expanded
from .card import model_card
from .configuration import CODE

REMOTE = '''"""moemamba's models in transformers: the code is the package's (pip install moemamba)."""

import moemamba
from moemamba.integrations.transformers import MoEMambaConfig, MoEMambaForCausalLM, MoEMambaModel
'''


class Folder:
    """How a model is saved and opened, beside what transformers does."""

    config: Any
    run: Path | None = None
    """the directory of the training run that it was opened from"""
    _auto_class: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a run's directory means its newest checkpoint.

        Raises:
            moemamba.checkpoint.CheckpointError: the run has none.
        """
        place, run = pretrained_model_name_or_path, None
        if isinstance(place, str | os.PathLike) and (expanded(place) / "train.json").is_file():
            run = expanded(place)
            place = find_model(run)
        found = super().from_pretrained(place, *args, **kwargs)  # type: ignore[misc]
        (found[0] if isinstance(found, tuple) else found).run = run  # with output_loading_info it is a pair
        return found

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: what is saved refers to the package's code anyway, which is not copied."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with a model card if there is none, and code for `trust_remote_code`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{CODE}.py").write_text(REMOTE, encoding="utf-8")
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text(model_card(self.config.native(), self.run), encoding="utf-8")
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
