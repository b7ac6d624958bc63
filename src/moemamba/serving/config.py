"""What a server allows. No torch here."""

from dataclasses import dataclass

from ..reading import validate


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients ask for, so that no request takes the machine from the others.

    Raises:
        ValueError: a value that cannot work.
    """

    slots: int = 16
    """requests that are answered at once; others wait"""
    max_waiting: int = 256
    """requests that may wait for a slot; more are told to come again (429)"""
    max_prompt: int = 131_072
    """tokens of a prompt at most"""
    max_tokens: int = 4096
    """new tokens of an answer at most"""
    max_choices: int = 64
    """answers to one request at most: its prompts times n"""
    max_body: int = 16 << 20
    """bytes of a request at most"""
    max_seconds: float = 600.0
    """seconds that a request may take, waiting included"""
    cache_bytes: int = 256 << 20
    """bytes for states of prompts and answers, so that nobody reads the same text twice; 0 keeps none"""
    state_bytes: int = 256 << 20
    """bytes for states that clients have asked to keep"""
    state_seconds: float = 3600.0
    """seconds that such a state is kept after its last use"""
    chunk: int = 64
    """positions of prompts that are read between two tokens of the answers that are under way, at least"""
    gap: float = 0.03
    """seconds between two of their tokens: a machine that is fast enough reads more positions in them"""
    chunk_alone: int = 512
    """the same while no answer is under way"""
    batch_invariant: bool = False
    """do not start where an answer may depend on what else is computed, to the last bit, as it does on a GPU"""

    def __post_init__(self) -> None:
        names = set(self.__dataclass_fields__) - {"cache_bytes", "batch_invariant"}
        validate(self, positive=tuple(sorted(names)), not_negative=("cache_bytes",))
