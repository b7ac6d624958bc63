"""What a client is told when its request cannot be answered: OpenAI's form of an error, in one sentence."""

from collections.abc import Mapping
from typing import Any


class Refusal(Exception):
    """An answer with a status of 400 or more.

    Attributes:
        headers: besides; clients repeat 408, 409, 429 and 5xx of their own accord unless told not to.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def of(self, status: int, code: str) -> "Refusal":
        """The same with another status."""
        self.status, self.code = status, code
        return self

    def with_headers(self, headers: Mapping[str, str]) -> "Refusal":
        """The same with more headers."""
        self.headers |= headers
        return self

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """The request itself is wrong."""
    return Refusal(400, message, param=param, code=code)


def busy(message: str, code: str = "queue_full") -> Refusal:
    """There is no room now; clients come again."""
    return Refusal(429, message, "rate_limit_error", code=code, headers={"retry-after": "1"})


def unavailable(message: str, code: str) -> Refusal:
    """The server loads its model, or is about to stop."""
    return Refusal(503, message, "service_unavailable", code=code, headers={"retry-after": "2"})


def failed(message: str) -> Refusal:
    """The server could not do it, and would fail again."""
    return Refusal(500, message, "server_error", code="internal_error", headers={"x-should-retry": "false"})


def late(seconds: float) -> Refusal:
    """The request took longer than one may."""
    message = f"the request took longer than the {seconds:g} seconds that one may take here; ask for fewer tokens"
    return Refusal(408, message, "timeout_error", code="timeout", headers={"x-should-retry": "false"})
