"""States that clients keep: read once, gone on from many times, forked, taken away as a file and brought back."""

import secrets
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ..host.files import FileError
from ..inference import Snapshot
from ..state import KINDS, State, pack, unpack
from ..tensors import TensorFile, not_finite, write_tensors
from .refusal import Refusal, busy, invalid

MOST = 10_000
"""states by their ids, forks too"""
TAIL = 64
"""tokens of its tail that an uploaded state may have"""


@dataclass
class Kept:
    """A state by its id."""

    id: str
    snapshot: Snapshot
    parent: str | None
    created: int
    used: float
    """when it was last used, by the monotonic clock"""
    number: int
    """in the order in which they came"""


class States:
    """The states of a server, bounded in bytes; who is not used for a while goes.

    Args:
        limit: bytes of all of them; forks share theirs.
        seconds: that a state is kept after its last use.
        spell: the text of tokens.
    """

    def __init__(
        self,
        limit: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        spell: Callable[[Sequence[int]], str] | None = None,
    ):
        self.limit, self.seconds, self._clock, self._spell = limit, seconds, clock, spell
        self.nbytes = 0
        """of all, shared ones once"""
        self._kept: dict[str, Kept] = {}  # who was used last comes last
        self._sharing: dict[str, int] = {}  # states that share a snapshot, by its name
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, snapshot: Snapshot, parent: str | None = None) -> Kept:
        """Keep a state.

        Raises:
            Refusal: there is no room.
        """
        self.expire()
        sharing = self._sharing.get(snapshot.name, 0)
        if not sharing and self.nbytes + snapshot.nbytes > self.limit:
            raise busy(
                f"states may have {self.limit:,} bytes here, and {self.nbytes:,} are in use; delete some, or wait "
                f"until some have not been used for {self.seconds:g} seconds",
                "states_full",
            )
        if len(self._kept) >= MOST:
            raise busy(f"there are {MOST:,} states; delete some", "states_full")
        name, now = f"state-{secrets.token_hex(12)}", self._clock()
        kept = self._kept[name] = Kept(name, snapshot, parent, int(time.time()), now, next(self._numbers))
        self._sharing[snapshot.name] = sharing + 1
        self.nbytes += 0 if sharing else snapshot.nbytes
        return kept

    def get(self, name: str) -> Kept:
        """A state by its id, which is in use now; raises Refusal if there is none."""
        self.expire()
        kept = self._kept.get(name)
        if kept is None:
            raise Refusal(
                404,
                f"there is no state {name!r:.80}; it may have expired: read its text again",
                param="state",
                code="state_not_found",
            )
        kept.used = self._clock()
        self._kept[name] = self._kept.pop(name)
        return kept

    def remove(self, name: str) -> None:
        """Delete a state; raises Refusal if there is none."""
        self._drop(self.get(name))

    def all(self) -> list[Kept]:
        """Oldest first."""
        self.expire()
        return sorted(self._kept.values(), key=lambda each: each.number)

    def expire(self) -> None:
        """Let go what has not been used for long."""
        now = self._clock()
        while self._kept and now - (kept := next(iter(self._kept.values()))).used > self.seconds:
            self._drop(kept)

    def _drop(self, kept: Kept) -> None:
        del self._kept[kept.id]
        name = kept.snapshot.name
        self._sharing[name] -= 1
        if not self._sharing[name]:
            del self._sharing[name]
            self.nbytes -= kept.snapshot.nbytes

    def shown(self, kept: Kept, model: str, fingerprint: str) -> dict[str, Any]:
        """A state as clients see it."""
        left = self.seconds - (self._clock() - kept.used)
        return {
            "id": kept.id,
            "object": "state",
            "created": kept.created,
            "tokens": kept.snapshot.position,
            "bytes": kept.snapshot.nbytes,
            "parent": kept.parent,
            "text": "" if self._spell is None else self._spell(kept.snapshot.tail),
            "model": model,
            "fingerprint": fingerprint,
            "expires_at": int(time.time() + left),
        }


def written(snapshot: Snapshot, fingerprint: str) -> bytes:
    """A state as a safetensors file with checksums."""
    tensors, said = pack(snapshot.state)
    said |= {
        "position": str(snapshot.position),
        "tail": ",".join(map(str, snapshot.tail)),
        "fingerprint": fingerprint,
    }
    said["said"] = _sum(said)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.safetensors"
        write_tensors(file, {**tensors, "hidden": snapshot.hidden}, said)
        return file.read_bytes()


def brought(data: bytes, like: Snapshot, fingerprint: str, vocabulary: int) -> Snapshot:
    """The state in a file that `written` has made.

    Args:
        like: any state of this model.
    Raises:
        Refusal: 409 if it is of another model, 400 if it is damaged or no state.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state"
        file.write_bytes(data)
        try:
            stored = TensorFile(file)
            said = stored.metadata
            if "fingerprint" in said and said["fingerprint"] != fingerprint:
                raise Refusal(
                    409,
                    f"the state is of another model ({said['fingerprint'][:40]}); this one is {fingerprint}",
                    code="fingerprint_mismatch",
                )
            stored.verify()
            state = unpack({name: each for name, each in stored.items() if name != "hidden"}, said)
            hidden = stored["hidden"][...]
            if said.get("said") not in (None, _sum(said)):
                raise FileError("its position or its last tokens are not what was written")
            position, tail = _place(said, vocabulary)
            if strange := not_finite({"hidden": hidden, **pack(state)[0]}):
                raise FileError(f"{strange} is not finite")
        except (FileError, KeyError) as error:
            words = str(error).replace(str(file), "it") if isinstance(error, FileError) else "something is missing"
            raise invalid(f"this is no complete state ({words}); download it again", code="invalid_state") from error
    if not (_alike(state, like.state) and hidden.shape == like.hidden.shape and hidden.dtype == like.hidden.dtype):
        raise invalid("the state has other shapes than this model's; it is of another model", code="invalid_state")
    device = like.hidden.device
    return Snapshot(state.to(device), hidden.to(device), position, tail)


def _sum(said: Mapping[str, str]) -> str:
    """A checksum of what a file says besides its tensors, which have their own."""
    return str(zlib.crc32(" ".join(said.get(name, "") for name in ("position", "tail", "fingerprint")).encode()))


def _place(said: dict[str, str], vocabulary: int) -> tuple[int, tuple[int, ...]]:
    """Position and tail, as the file says; raises FileError."""
    try:
        position = int(said["position"])
        tail = tuple(int(each) for each in said["tail"].split(",") if each)
    except (KeyError, ValueError) as error:
        raise FileError("it does not say its position and its last tokens") from error
    if not 0 < position < 1 << 40 or len(tail) > TAIL or any(not 0 <= each < vocabulary for each in tail):
        raise FileError("its position or its last tokens cannot be")
    return position, tail


def _alike(state: State, like: State) -> bool:
    """Whether a state of one row is one of the same model; what grows may have any length."""
    if len(state.mixers) != len(like.mixers) or state.batch_size > 1:
        return False
    kinds = {kind.state_type: kind for kind in KINDS.values()}
    for own, other in zip(state.mixers, like.mixers, strict=True):
        if type(own) is not type(other):
            return False
        kind = kinds[type(own)]
        length = kind.length(own)
        like_own = kind.take(kind.allocate(1, max(length, 1), other), slice(0, 1), length)
        for a, b in zip(own, like_own, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                return False
    return True
