"""A request as a conversation with pictures, or the 4xx error that the client gets.

`pipeline/serving/app.py` calls this outside the event loop. A waiting request holds its pictures encoded;
`pipeline/serving/answer.py` decodes them when it is their turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.serving.limits import Limits, RequestError
from pipeline.serving.pictures import Picture, check_pixels, picture_of_url
from pipeline.serving.request_body import ChatRequest, ImagePart, Message, TextPart, parsed_request
from vico.inference.sampling import GREEDY, Sampling
from vico.special_tokens import IMAGE_MARK
from vico.turn_tokenizer import Turn

_SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}


@dataclass(frozen=True)
class Chat:
    """A checked request: turns in the form of `PromptFormat.encode`, pictures in order.

    `request` has its messages removed; they would hold the pictures a second time.
    """

    request: ChatRequest
    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...]
    max_new_tokens: int | None
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()


def parsed_chat(body: bytes | bytearray, limits: Limits, control_tokens: Sequence[str]) -> Chat:
    """Return the conversation in a request's body; raise RequestError if something is wrong with it.

    No text may spell one of `control_tokens`: with it a client could end its own turn.
    """
    request = parsed_request(body, limits)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise RequestError("max_tokens and max_completion_tokens are both given; give one", "max_tokens")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is given without stream: true", "stream_options")
    max_new_tokens = request.max_tokens or request.max_completion_tokens
    if max_new_tokens is not None and max_new_tokens > limits.new_tokens:
        message = f"max_tokens={max_new_tokens} is above this server's limit of {limits.new_tokens}"
        raise RequestError(message, "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs is given without logprobs: true", "top_logprobs")
    parser = _TurnParser(limits, control_tokens)
    turns = tuple(
        {"from": _SPEAKERS[message.role], "value": parser.text(message, f"messages.{number}")}
        for number, message in enumerate(request.messages)
    )
    if request.messages[-1].role != "user":
        raise RequestError("the last message must be the user's", "messages")
    without_messages = request.model_copy(update={"messages": []})
    pictures, stop = tuple(parser.pictures), tuple(request.stop or ())
    return Chat(without_messages, turns, pictures, max_new_tokens, _sampling(request), stop)


def _sampling(request: ChatRequest) -> Sampling:
    return Sampling(
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


@dataclass
class _TurnParser:
    """Turns messages into text, and collects their pictures."""

    limits: Limits
    control_tokens: Sequence[str]
    pictures: list[Picture] = field(default_factory=list)
    num_text_bytes: int = 0

    def text(self, message: Message, param: str) -> str:
        """Return the text of a message, with a mark for each picture."""
        self._check_length(message, param)
        if isinstance(message.content, str):
            return self._checked(message.content, f"{param}.content")
        value = ""
        for number, part in enumerate(message.content):
            part_param = f"{param}.content.{number}"
            if isinstance(part, TextPart):
                value += self._checked(part.text, part_param)
                continue
            if message.role != "user":
                raise RequestError("only a user's message may have pictures", part_param)
            self._add_picture(part, part_param)
            value += f"{IMAGE_MARK}\n"
        num_pictures = sum(isinstance(part, ImagePart) for part in message.content)
        return self._checked(value, f"{param}.content", num_pictures)  # two parts may spell a mark together

    def _check_length(self, message: Message, param: str) -> None:
        """Raise RequestError if the texts are too long to be worth tokenising, which takes time and
        memory."""
        content = message.content
        texts = (
            [content]
            if isinstance(content, str)
            else [part.text for part in content if isinstance(part, TextPart)]
        )
        self.num_text_bytes += sum(len(text.encode()) for text in texts)
        if self.num_text_bytes > self.limits.text_bytes:
            error = (
                f"the texts have at least {self.num_text_bytes} bytes, above the {self.limits.text_bytes} "
                f"bytes that this server reads for its limit of {self.limits.total_tokens} tokens"
            )
            raise RequestError(error, param, code="context_length_exceeded")

    def _add_picture(self, part: ImagePart, param: str) -> None:
        if len(self.pictures) >= self.limits.pictures:
            raise RequestError(f"more than {self.limits.pictures} pictures, this server's limit", param)
        self.pictures.append(picture_of_url(part.image_url, f"{param}.image_url", self.limits))
        check_pixels(self.pictures, param, self.limits)

    def _checked(self, text: str, param: str, num_pictures: int = 0) -> str:
        """Return the text; raise RequestError if it spells a control token, or a picture's mark besides those
        of its pictures."""
        spelled = [token for token in self.control_tokens if token in text and token != IMAGE_MARK]
        if text.count(IMAGE_MARK) != num_pictures:
            spelled.append(IMAGE_MARK)
        if spelled:
            message = f"the text spells {spelled[0]}, which only the prompt may write; leave it out"
            raise RequestError(message, param)
        return text
