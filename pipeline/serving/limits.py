"""The limits of a request, and the error that a client gets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

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
    """How many requests are in the server at once, being read, waiting or answered."""


class RequestError(Exception):
    """What the client gets: an HTTP status and OpenAI's error fields. `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
