"""The folder of a model: what both libraries read, and what a reader wants to know."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from ...checkpoint import expect_full_file, find_model
from ...host.files import expanded, replace
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
            moemamba.checkpoint.CheckpointError: the run has none, or it has weights of 8 bits.
        """
        place, run = pretrained_model_name_or_path, None
        if isinstance(place, str | os.PathLike) and (expanded(place) / "train.json").is_file():
            run = expanded(place)
            place = find_model(run)
        if isinstance(place, str | os.PathLike):
            expect_full_file(expanded(place))
        found = super().from_pretrained(place, *args, **kwargs)  # type: ignore[misc]
        (found[0] if isinstance(found, tuple) else found).run = run  # with output_loading_info it is a pair
        return found

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: what is saved refers to the package's code anyway, which is not copied."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload what `save_pretrained` writes to a repository, which is made if there is none.

        Its model card is written where the repository has none yet. The tokenizer goes up by its own `push_to_hub`.

        Args:
            kwargs: of `save_pretrained`.
        Returns:
            huggingface_hub's CommitInfo.
        """
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as place:
            folder = Path(place)
            replace(folder / "README.md", model_card(self.config.native(), self.run, repo_id))
            self.save_pretrained(folder, **kwargs)
            if hub.file_exists(repo_id, "README.md", revision=revision):
                (folder / "README.md").unlink()
            about: dict[str, Any] = {"commit_message": commit_message, "commit_description": commit_description}
            return hub.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr, **about
            )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with a model card if there is none, and code for `trust_remote_code`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / f"{CODE}.py", REMOTE)
        if not (folder / "README.md").exists():
            replace(folder / "README.md", model_card(self.config.native(), self.run))
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
