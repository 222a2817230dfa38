"""What an answer depends on besides the decoder: the prompt of a conversation, and the routing of its tiles.

Shapes: L tokens of a prompt, D language width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.serving.conversation import Chat
from pipeline.serving.limits import Limits, RequestError
from pipeline.serving.routing import RoutedTiles, Thresholds, routed_tiles
from vico.errors import one_line
from vico.inference.picture_encoding import EncodedPicture, as_encoded_tiles, joined_pictures, no_pictures
from vico.inference.tile_losses import num_tokens
from vico.model.internvl import VicoModel
from vico.packing import TiledSequence
from vico.prompt import PromptFormat, Skeleton
from vico.tiling import Tiling, num_tiles
from vico.turn_tokenizer import SpelledToken


@dataclass(frozen=True)
class Prompt:
    """A conversation as ids, with the tiling of each picture and its number of tiles.

    `most_tokens` are those of the prompt if no tile is compressed, and of the longest answer.
    """

    skeleton: Skeleton
    tilings: tuple[Tiling, ...]
    num_tiles: tuple[int, ...]
    most_tokens: int


@dataclass(frozen=True)
class RoutedPrompt:
    """A prompt as the decoder takes it: embeddings [L, D], with the counts and the report of its routing."""

    embeds_LD: torch.Tensor
    max_new_tokens: int
    num_visual_tokens: int
    routed: RoutedTiles


@dataclass(frozen=True)
class ServedModel:
    """A model with all that its answers depend on besides the request."""

    model: VicoModel
    prompts: PromptFormat
    limits: Limits
    thresholds: Thresholds

    def prompt(self, chat: Chat) -> Prompt:
        """Return the prompt of a conversation. No picture is decoded.

        Raises RequestError if the conversation cannot be answered.
        """
        settings, limits = self.model.settings, self.limits
        tilings = tuple(settings.tiling(picture.max_tiles) for picture in chat.pictures)
        counts = tuple(
            num_tiles(picture.width, picture.height, tiling)
            for picture, tiling in zip(chat.pictures, tilings, strict=True)
        )
        skeleton = self._skeleton(chat, counts)
        fewest = settings.tokens_compressed if self.model.router is not None else settings.tokens_full
        least = skeleton.num_text_tokens + sum(counts) * fewest
        if least >= limits.total_tokens:
            raise _too_long(f"at least {least} prompt tokens", limits)
        most = skeleton.num_text_tokens + sum(counts) * settings.tokens_full
        most += chat.max_new_tokens or limits.new_tokens
        return Prompt(skeleton, tilings, counts, min(most, limits.total_tokens))

    def _skeleton(self, chat: Chat, counts: Sequence[int]) -> Skeleton:
        try:
            return self.prompts.encode(chat.turns, counts, add_generation_prompt=True)
        except SpelledToken as error:  # in a form that `parsed_chat` does not search for
            message = f"the text spells {error.token}, which only the prompt may write; leave it out"
            raise RequestError(message, f"messages.{error.turn}.content") from error
        except BaseException as error:  # a tokenizer written in Rust panics with a BaseException
            message = f"the text cannot be tokenised ({one_line(error)})"
            raise RequestError(message, "messages", code="invalid_text") from error

    def routed_prompt(self, chat: Chat, prompt: Prompt, pictures: Sequence[EncodedPicture]) -> RoutedPrompt:
        """Route the tiles of the encoded pictures, and return the prompt with their tokens.

        Raises RequestError if the prompt is then too long, or asks for a rule that the model does not have.
        """
        settings, limits = self.model.settings, self.limits
        encoded = joined_pictures(pictures) if pictures else no_pictures(self.model)
        routed = routed_tiles(
            chat.request.vico, encoded.p_compress_N, prompt.num_tiles, self.thresholds, settings
        )
        sequence = TiledSequence(prompt.skeleton, routed.compressed_N, 0)
        num_prompt = num_tokens(sequence, settings)
        room = limits.total_tokens - num_prompt
        max_new_tokens = chat.max_new_tokens or max(min(limits.new_tokens, room), 1)
        if max_new_tokens > room:
            raise _too_long(f"{num_prompt} prompt tokens and max_tokens={max_new_tokens}", limits)
        [embeds_LD] = as_encoded_tiles(self.model, encoded).embeddings([sequence])
        num_visual = num_prompt - prompt.skeleton.num_text_tokens
        return RoutedPrompt(embeds_LD, max_new_tokens, num_visual, routed)


def _too_long(lengths: str, limits: Limits) -> RequestError:
    message = (
        f"{lengths} are more than the {limits.total_tokens} tokens that prompt and answer may have together"
    )
    return RequestError(message, "messages", code="context_length_exceeded")
