"""The body of an OpenAI chat request: its fields, and the error that names the first fault.

Fields and values that this server does not support are refused by name, never ignored.
"""

import json
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.serving.limits import RequestError

_MAX_ITEMS = 1000
"""Messages of a request, and parts of a message: each takes some kilobytes while it is checked."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def one_unknown_field(cls, value: Any) -> Any:
        """Keep the known fields and the first unknown one, which is then refused.

        pydantic would make an error of each unknown field, and a body may have millions.
        """
        if not isinstance(value, dict):
            return value
        unknown = list(islice((name for name in value if name not in cls.model_fields), 1))
        return {name: value[name] for name in (*cls.model_fields, *unknown) if name in value}


class ImageUrl(_Part):
    url: str
    detail: Literal["auto", "high"] = "auto"
    max_dynamic_patch: Annotated[int, Field(ge=1)] | None = None


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Part):
    type: Literal["text"]
    text: str


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
            Field(fail_fast=True, max_length=_MAX_ITEMS),
        ]
    )
    name: None = None


class StreamOptions(_Part):
    include_usage: bool = False


class Routing(_Part):
    """Our own field `vico`: how tiles are routed, and whether the answer reports it."""

    rule: Literal["absolute", "published", "full"] | None = None
    threshold: Annotated[float, Field(ge=0, le=1, strict=False)] | None = None
    report: bool = False


class ChatRequest(_Part):
    """The fields that are accepted. A field with a single allowed value is one that has no effect here."""

    model: str
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=_MAX_ITEMS)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=0, strict=False)] | None = None
    top_p: Annotated[float, Field(ge=1, le=1, strict=False)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0, strict=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0, strict=False)] | None = None
    logprobs: Literal[False] | None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    seed: int | None = None  # decoding is greedy, so every seed gives the same answer
    user: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    vico: Routing = Routing()


def parsed_request(body: bytes) -> ChatRequest:
    """Return the request in a body; raise RequestError with the first fault."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON ({error})") from error
    try:
        return ChatRequest.model_validate(value)
    except ValidationError as error:
        raise _request_error(error) from error


def _request_error(error: ValidationError) -> RequestError:
    faults = error.errors(include_url=False, include_context=False)
    # A content is text or parts, and pydantic reports a fault of both: the deeper one is meant.
    fault = max(faults, key=lambda fault: len(fault["loc"]))
    branches = ("str", "image_url", "text")  # pydantic's names of the alternatives
    names = [str(name) for name in fault["loc"] if name not in branches]
    param = ".".join(name for name in names if "[" not in name)
    reason = "is not supported by this server" if fault["type"] == "extra_forbidden" else fault["msg"]
    value = fault["input"] if isinstance(fault["input"], str | int | float | bool) else None
    shown = "" if value is None or fault["type"] == "missing" else f"={str(value)[:60]!s}"
    return RequestError(f"{param or 'the body'}{shown}: {reason}", param or None)
