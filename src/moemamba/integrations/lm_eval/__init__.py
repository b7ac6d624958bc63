"""Our models in EleutherAI's lm-evaluation-harness: the class that it asks, and its tasks from files.

`lm_eval.simple_evaluate(model=MoEMambaLM("runs/mine"), tasks=[...])` takes any of its tasks.
"""

from importlib.util import find_spec

if find_spec("lm_eval") is None:
    raise ValueError("tasks need the package lm-eval; pip install 'moemamba[eval]'")

from .model import MoEMambaLM
from .tasks import Score, evaluate

__all__ = ["MoEMambaLM", "Score", "evaluate"]
