"""A request of OpenAI's chat form as a conversation with decoded pictures, or the 4xx error that it gets.

What this server cannot do is refused by name, never left aside. `pipeline/serve_app.py` calls it off the
event loop.
"""

import base64
import binascii
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vico.prompt import IMAGE_MARK
from vico.settings import IMAGE_END, IMAGE_START, IMAGE_TOKEN, TURN_END, TURN_START

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
_SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
_MARKS = (IMAGE_MARK, IMAGE_START, IMAGE_END, IMAGE_TOKEN, TURN_START, TURN_END)


@dataclass(frozen=True)
class Limits:
    """Of one request: bytes of its body, pixels of one picture, pictures, and new tokens. `total_tokens`
    bounds prompt and answer together; `waiting` how many requests are in the server at once.
    """

    body_bytes: int
    picture_pixels: int
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
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
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
    messages: Annotated[list[Message], Field(min_length=1)]
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
    """A decoded RGB picture, with the client's own limit of tiles."""

    image: Image.Image
    max_tiles: int | None


@dataclass(frozen=True)
class Chat:
    """A checked request: turns in the form of `PromptFormat.encode`, pictures in their order."""

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
    return Chat(request, tuple(turns), tuple(pictures), wanted)


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
        value += f"{IMAGE_MARK}\n"
    return value


def _text(text: str, param: str) -> str:
    """The text, unless it spells a token that marks turns or pictures: it could end its own turn with it."""
    for mark in _MARKS:
        if mark in text:
            raise RequestError(f"the text spells {mark}, which marks turns and pictures in the prompt", param)
    return text


def _picture(given: ImageUrl, param: str, limits: Limits) -> Picture:
    head, comma, data = given.url.partition(",")
    if not head.startswith("data:"):
        raise RequestError(
            "only data URLs (data:image/png;base64,...) are taken; this server fetches nothing", param
        )
    if not comma or not head.endswith(";base64"):
        raise RequestError("the data URL must be base64: data:image/png;base64,...", param)
    try:
        content = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise RequestError(f"the data URL is not valid base64 ({error})", param) from error
    try:
        with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as image:
            pixels = image.width * image.height  # from the header, before anything is decoded
            if pixels > limits.picture_pixels:
                raise RequestError(
                    f"a picture of {image.width} x {image.height} is above this server's limit of "
                    f"{limits.picture_pixels} pixels",
                    param,
                    code="image_too_large",
                )
            return Picture(image.convert("RGB"), given.max_dynamic_patch)
    except RequestError:
        raise
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
