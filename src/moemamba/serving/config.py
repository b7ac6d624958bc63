"""What a server allows. No torch here."""

from dataclasses import dataclass

from ..marks import option
from ..reading import validate

# Titles in --help, in its order.
FIRST = "what most servers set"
ACCESS = "who may use it"
REQUESTS = "what a request may ask for"
STATES = "states that are kept"
PACE = "pace"


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients ask for, so that no request takes the machine from the others.

    Raises:
        ValueError: a value that cannot work.
    """

    slots: int = option(16, FIRST)
    """requests that are answered at once; others wait"""
    max_waiting: int = option(256, REQUESTS)
    """requests that may wait for a slot; more are told to come again (429)"""
    max_prompt: int = option(131_072, REQUESTS)
    """tokens of a prompt at most"""
    max_tokens: int = option(4096, REQUESTS)
    """new tokens of an answer at most"""
    max_choices: int = option(64, REQUESTS)
    """answers to one request at most: its prompts times n"""
    max_body: int = option(16 << 20, REQUESTS)
    """bytes of a request at most"""
    max_seconds: float = option(600.0, REQUESTS)
    """seconds that a request may take, waiting included"""
    cache_bytes: int = option(256 << 20, STATES)
    """bytes for states of prompts and answers, so that nobody reads the same text twice; 0 keeps none"""
    state_bytes: int = option(256 << 20, STATES)
    """bytes for states that clients have asked to keep"""
    state_seconds: float = option(3600.0, STATES)
    """seconds that such a state is kept after its last use"""
    chunk: int = option(64, PACE)
    """positions of prompts that are read between two tokens of the answers that are under way, at least"""
    gap: float = option(0.03, PACE)
    """seconds between two of their tokens: a machine that is fast enough reads more positions in them"""
    chunk_alone: int = option(512, PACE)
    """the same while no answer is under way"""
    batch_invariant: bool = option(False, PACE)
    """do not start where an answer may depend on what else is computed, to the last bit, as it does on a GPU"""

    def __post_init__(self) -> None:
        names = set(self.__dataclass_fields__) - {"cache_bytes", "batch_invariant"}
        validate(self, positive=tuple(sorted(names)), not_negative=("cache_bytes",))
