"""The body of an OpenAI chat request: its fields, and the error that names the first fault.

Fields and values that this server does not support are refused by name, never ignored. A field that is null
counts as left out: clients send null for what they do not set, and answers come back with `refusal: null`.
"""

from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from pipeline.serving.limits import Limits, RequestError

_MAX_ITEMS = 1000
"""Messages of a request, and parts of a message: each takes some kilobytes while it is checked."""

_MAX_VALUES = 100_000
"""Values and keys of a body, beside those that are written in its texts: each takes some 100 bytes."""
_SHOWN_CHARS = 60
"""How much of a value, or of the name of a field, an error repeats."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def one_unknown_field(cls, value: Any) -> Any:
        """Keep the known fields and the first unknown one, which is then refused; drop those that are null.

        pydantic would make an error of each unknown field, and a body may have millions.
        """
        if not isinstance(value, dict):
            return value
        given = {name: value[name] for name in cls.model_fields if value.get(name) is not None}
        unknown = (name for name in value if name not in cls.model_fields and value[name] is not None)
        return {**given, **{name: value[name] for name in islice(unknown, 1)}}


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


class StreamOptions(_Part):
    include_usage: bool = False


class Routing(_Part):
    """Our own field `vico`: how tiles are routed, and whether the answer reports it."""

    rule: Literal["absolute", "published", "full"] | None = None
    threshold: Annotated[float, Field(ge=0, le=1, strict=False)] | None = None
    report: bool = False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ChatRequest(_Part):
    """The fields that are accepted. A field with a single allowed value is one that has no effect here.

    Left out, `temperature` is 0 (greedy), in which it differs from OpenAI's API.
    """

    model: str
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=_MAX_ITEMS)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=False)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0, strict=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0, strict=False)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=1000)]],
            Field(fail_fast=True, max_length=4),
            BeforeValidator(_as_list),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    vico: Routing = Routing()


def parsed_request(body: bytes | bytearray, limits: Limits) -> ChatRequest:
    """Return the request in a body; raise RequestError with the first fault.

    The body must be UTF-8 and JSON as RFC 8259 has it: no NaN, and no lone surrogate, which no text can hold.
    """
    num_values = sum(map(body.count, (b",", b":", b"{", b"[")))
    if num_values > _MAX_VALUES + limits.text_bytes:
        message = f"the body has about {num_values} JSON values, more than this server reads; send fewer"
        raise RequestError(message, status=413, code="body_too_large")
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="none")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON ({error})") from error
    try:
        return ChatRequest.model_validate(value)
    except ValidationError as error:
        raise _request_error(error) from error


def _request_error(error: ValidationError) -> RequestError:
    faults = error.errors(include_url=False, include_context=False)
    # A content is text or parts, and pydantic reports a fault of both: the one that is not about the type is
    # meant, and of several the deepest.
    fault = max(faults, key=lambda fault: (fault["type"] != "string_type", len(fault["loc"])))
    branches = ("str", "image_url", "text")  # pydantic's names of the alternatives
    names = [_shown(str(name)) for name in fault["loc"] if name not in branches]
    param = ".".join(name for name in names if not name.startswith("list["))
    reason = "is not supported by this server" if fault["type"] == "extra_forbidden" else fault["msg"]
    value = fault["input"] if isinstance(fault["input"], str | int | float | bool) else None
    shown = "" if value is None or fault["type"] == "missing" else f"={_shown(str(value))}"
    return RequestError(f"{param or 'the body'}{shown}: {reason}", param or None)


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
