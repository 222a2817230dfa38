"""A request of OpenAI's chat form as a conversation with pictures, or the 4xx error that it gets.

What this server cannot do is refused by name, never left aside. `pipeline/serving/app.py` calls it off the
event loop. A request that waits holds its pictures as they were sent: `pipeline/serving/engine.py` decodes them
when it is their turn.
"""

import base64
import binascii
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vico.prompt import IMAGE_MARK
from vico.settings import IMAGE_END, IMAGE_START, IMAGE_TOKEN, TURN_END, TURN_START

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
_SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
_MARKS = (IMAGE_MARK, IMAGE_START, IMAGE_END, IMAGE_TOKEN, TURN_START, TURN_END)
_MAX_ITEMS = (
    1000  # messages of a request, and parts of a message: each takes some kilobytes while it is checked
)


@dataclass(frozen=True)
class Limits:
    """Of one request: bytes of its body, pixels of one picture and of all together, pictures, and new tokens.
    `total_tokens` bounds prompt and answer together; `waiting` how many requests are in the server at once.
    """

    body_bytes: int
    picture_pixels: int
    request_pixels: int
    pictures: int
    new_tokens: int
    total_tokens: int
    waiting: int


class RequestError(Exception):
    """What a client did wrong: an HTTP status and OpenAI's error fields."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def one_unknown_field(cls, value: Any) -> Any:
        """The known fields and the first unknown one, for which it is refused: pydantic would make an error
        of each, and a body may have millions.
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
    """Our own field `vico`: how tiles are routed, and whether the answer says so."""

    rule: Literal["absolute", "published", "full"] | None = None
    threshold: Annotated[float, Field(ge=0, le=1, strict=False)] | None = None
    report: bool = False


class ChatRequest(_Part):
    """The fields that are read. A literal is the one value under which a field changes nothing here."""

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
    seed: int | None = None  # the most likely token is taken, so every seed gives this answer
    user: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    vico: Routing = Routing()


@dataclass(frozen=True)
class Picture:
    """A picture as it was sent, with its size by the header and the client's own limit of tiles; `param`
    names it in errors.
    """

    content: bytes
    width: int
    height: int
    max_tiles: int | None
    param: str

    def decoded(self) -> Image.Image:
        """The RGB picture; RequestError where only the header was good."""
        with (
            _picture_errors(self.param),
            Image.open(io.BytesIO(self.content), formats=PICTURE_FORMATS) as image,
        ):
            return image.convert("RGB")


@dataclass(frozen=True)
class Chat:
    """A checked request: turns in the form of `PromptFormat.encode`, pictures in their order. `request` has
    no messages any more, which would hold the pictures a second time.
    """

    request: ChatRequest
    turns: tuple[Mapping[str, str], ...]
    pictures: tuple[Picture, ...]
    max_new_tokens: int | None


def chat_of(body: bytes, limits: Limits) -> Chat:
    """The conversation of a request's body; RequestError says what is wrong with it."""
    request = _request(body)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise RequestError("max_tokens and max_completion_tokens are both given; give one", "max_tokens")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is given without stream: true", "stream_options")
    wanted = request.max_tokens or request.max_completion_tokens
    if wanted is not None and wanted > limits.new_tokens:
        raise RequestError(
            f"max_tokens={wanted} is above this server's limit of {limits.new_tokens}", "max_tokens"
        )
    turns, pictures = [], []
    for number, message in enumerate(request.messages):
        turns.append(
            {"from": _SPEAKERS[message.role], "value": _turn(message, f"messages.{number}", pictures, limits)}
        )
    if request.messages[-1].role != "user":
        raise RequestError("the last message must be the user's", "messages")
    return Chat(request.model_copy(update={"messages": []}), tuple(turns), tuple(pictures), wanted)


def _request(body: bytes) -> ChatRequest:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON ({error})") from error
    try:
        return ChatRequest.model_validate(value)
    except ValidationError as error:
        # of a content that is text or parts pydantic tells both faults: the deeper one is meant
        first = max(error.errors(include_url=False, include_context=False), key=lambda one: len(one["loc"]))
        skipped = ("str", "image_url", "text")  # pydantic's names of the branches
        parts = [str(part) for part in first["loc"] if part not in skipped]
        param = ".".join(part for part in parts if "[" not in part)
        reason = "is not supported by this server" if first["type"] == "extra_forbidden" else first["msg"]
        given = first["input"] if isinstance(first["input"], str | int | float | bool) else None
        shown = "" if given is None or first["type"] == "missing" else f"={str(given)[:60]!s}"
        raise RequestError(f"{param or 'the body'}{shown}: {reason}", param or None) from error


def _turn(message: Message, param: str, pictures: list[Picture], limits: Limits) -> str:
    """The text of a turn with a mark for each picture, which is added to `pictures`."""
    if isinstance(message.content, str):
        return _text(message.content, f"{param}.content")
    value = ""
    for number, part in enumerate(message.content):
        where = f"{param}.content.{number}"
        if isinstance(part, TextPart):
            value += _text(part.text, where)
            continue
        if message.role != "user":
            raise RequestError("only a user's message may hold pictures", where)
        if len(pictures) >= limits.pictures:
            raise RequestError(f"more than {limits.pictures} pictures, this server's limit", where)
        pictures.append(_picture(part.image_url, f"{where}.image_url", limits))
        _check_pixels(pictures, where, limits)
        value += f"{IMAGE_MARK}\n"
    num_pictures = sum(isinstance(part, ImagePart) for part in message.content)
    return _text(value, f"{param}.content", num_pictures)  # parts may spell a mark together


def _text(text: str, param: str, num_pictures: int = 0) -> str:
    """The text, unless it spells a token that marks turns or pictures besides the marks of its own pictures:
    it could end its own turn with it."""
    for mark in _MARKS:
        if text.count(mark) != (num_pictures if mark == IMAGE_MARK else 0):
            raise RequestError(f"the text spells {mark}, which marks turns and pictures in the prompt", param)
    return text


def _picture(given: ImageUrl, param: str, limits: Limits) -> Picture:
    """The picture behind a data URL, by its header; nothing is decoded."""
    content = _content(given.url, param)
    with _picture_errors(param), Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as image:
        width, height = image.size
    if width * height > limits.picture_pixels:
        raise RequestError(
            f"a picture of {width} x {height} is above this server's limit of {limits.picture_pixels} pixels",
            param,
            code="image_too_large",
        )
    return Picture(content, width, height, given.max_dynamic_patch, param)


def _content(url: str, param: str) -> bytes:
    head, comma, data = url.partition(",")
    if not head.startswith("data:"):
        raise RequestError(
            "only data URLs (data:image/png;base64,...) are taken; this server fetches nothing", param
        )
    if not comma or not head.endswith(";base64"):
        raise RequestError("the data URL must be base64: data:image/png;base64,...", param)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise RequestError(f"the data URL is not valid base64 ({error})", param) from error


def _check_pixels(pictures: list[Picture], param: str, limits: Limits) -> None:
    pixels = sum(one.width * one.height for one in pictures)
    if pixels > limits.request_pixels:
        raise RequestError(
            f"the pictures have {pixels} pixels together, above this server's limit of "
            f"{limits.request_pixels} pixels a request; send fewer or smaller ones",
            param,
            code="image_too_large",
        )


@contextmanager
def _picture_errors(param: str) -> Iterator[None]:
    """What Pillow raises on a picture as the 400 that the client gets."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise RequestError(
            f"a picture has too many pixels ({error})", param, code="image_too_large"
        ) from error
    except Exception as error:  # decoders raise what they like on broken bytes
        reason = " ".join(str(error).split())[:120]
        raise RequestError(
            f"a picture does not decode as one of {', '.join(PICTURE_FORMATS)} ({reason})",
            param,
            code="invalid_image",
        ) from error
