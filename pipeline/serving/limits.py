"""The limits of the server and of a request, and the error that a client gets."""

from dataclasses import dataclass

_MIB = 2**20
TEXT_BYTES_PER_TOKEN = 8
"""Texts of more bytes per token of the limit are refused before they are tokenised. English has 4 to 5, so
only texts that hardly fit anyhow are refused by it, such as long runs of spaces."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much the server takes on at once."""

    body_bytes: int
    picture_pixels: int
    """Of one picture."""
    request_pixels: int
    """Of all pictures of a request together."""
    pictures: int
    new_tokens: int
    total_tokens: int
    """Of prompt and answer together."""
    waiting: int
    """How many whole requests are in the server at once, waiting or answered."""
    per_client: int = 0
    """How many requests of one client are in the server, being read, waiting or answered; 0: three quarters
    of `waiting`."""
    held_bytes: int = 256 * _MIB
    """Of the bodies of all requests in the server together, whole or in part."""
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 10.0
    """How long a client may neither send more of its body nor take more of its answer."""
    batch: int = 16
    """How many answers are decoded at once."""
    cache_tokens: int = 0
    """Of all prompts and answers that are decoded at once; 0: 32768, or `total_tokens` if that is more."""
    picture_cache_bytes: int = 256 * _MIB
    drain_s: float = 10.0
    """How long running answers may go on after a signal."""

    @property
    def client_requests(self) -> int:
        return self.per_client or (3 * self.waiting + 3) // 4

    @property
    def decoded_tokens(self) -> int:
        return self.cache_tokens or max(32768, self.total_tokens)

    @property
    def text_bytes(self) -> int:
        """Of all texts of a request together, in UTF-8."""
        return TEXT_BYTES_PER_TOKEN * self.total_tokens


class RequestError(Exception):
    """What the client gets: an HTTP status and OpenAI's error fields. `param` is the field at fault.

    `retry_after_s` says when the same request may succeed.
    """

    # seven parameters: the fields of OpenAI's error, and when to try again
    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def server_error(error: BaseException) -> RequestError:
    """Return the error that a client gets for a fault of the server."""
    return RequestError(f"the server failed ({type(error).__name__}); see its log", status=500)


def stopping_error() -> RequestError:
    """Return the error of a request that the server no longer answers."""
    return RequestError("the server is stopping", status=503, code="stopping", retry_after_s=10)
