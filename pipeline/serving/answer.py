"""Computes the answer to one conversation: prompt, visual tokens, routing, greedy decoding.

Shapes: N tiles, P vision tokens per tile, v their width, S pixels per side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.serving.conversation import Chat
from pipeline.serving.growing_text import GrowingText
from pipeline.serving.job import Event
from pipeline.serving.limits import Limits, RequestError
from pipeline.serving.routing import RoutedTiles, Thresholds, routed_tiles
from vico.inference.generation import streamed_answer
from vico.inference.tile_losses import EncodedTiles, num_tokens
from vico.model.internvl import VicoModel
from vico.packing import TiledSequence
from vico.prompt import PromptFormat, Skeleton, SpelledToken
from vico.tiling import Tiling, num_tiles, pixel_values

_BATCH_TILES = 16


@dataclass(frozen=True)
class ServedModel:
    """A model with all that its answers depend on besides the request."""

    model: VicoModel
    prompts: PromptFormat
    limits: Limits
    thresholds: Thresholds

    @torch.no_grad()
    def answer(self, chat: Chat, send: Callable[[Event], object], check: Callable[[], None]) -> None:
        """Send the events of the answer, token by token.

        `check` is called often and raises if the answer is no longer wanted. Raises RequestError if the
        conversation cannot be answered.
        """
        check()
        tilings = [self.model.settings.tiling(picture.max_tiles) for picture in chat.pictures]
        skeleton, counts = self._skeleton(chat, tilings)
        tiles, p_compress_N = self._encoded(chat, tilings, check)
        routed = routed_tiles(chat.request.vico, p_compress_N, counts, self.thresholds, self.model.settings)
        prompt = TiledSequence(skeleton, routed.compressed_N, 0)
        self._generate(chat, tiles, prompt, routed, send, check)

    def _generate(
        self,
        chat: Chat,
        tiles: EncodedTiles,
        prompt: TiledSequence,
        routed: RoutedTiles,
        send: Callable[[Event], object],
        check: Callable[[], None],
    ) -> None:
        num_prompt = num_tokens(prompt, self.model.settings)
        room = self.limits.total_tokens - num_prompt
        max_new_tokens = chat.max_new_tokens or max(min(self.limits.new_tokens, room), 1)
        if max_new_tokens > room:
            raise _too_long(f"{num_prompt} prompt tokens and max_tokens={max_new_tokens}", self.limits)
        end_of_turn_id = self.prompts.end_of_turn_id
        text = GrowingText(self.prompts.tokenizer)
        finish_reason = "length"

        def on_token(token_id: int) -> bool:
            nonlocal finish_reason
            check()
            is_end = token_id == end_of_turn_id
            finish_reason = "stop" if is_end else "length"
            new_text = text.add(None if is_end else token_id)
            if new_text:
                send(Event(new_text))
            return False

        streamed_answer(
            tiles, prompt, end_of_turn_id=end_of_turn_id, max_new_tokens=max_new_tokens, on_token=on_token
        )
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": text.num_tokens,
            "total_tokens": num_prompt + text.num_tokens,
            "prompt_tokens_details": {"image_tokens": num_prompt - prompt.skeleton.num_text_tokens},
        }
        send(Event(text.rest(), finish_reason, usage, routed.report))

    def _skeleton(self, chat: Chat, tilings: Sequence[Tiling]) -> tuple[Skeleton, list[int]]:
        """Return the prompt's skeleton and the number of tiles of each picture, by the sizes of the
        pictures."""
        settings = self.model.settings
        counts = [
            num_tiles(picture.width, picture.height, tiling)
            for picture, tiling in zip(chat.pictures, tilings, strict=True)
        ]
        try:
            skeleton = self.prompts.encode(chat.turns, counts, add_generation_prompt=True)
        except SpelledToken as error:  # in a form that `parsed_chat` does not search for
            raise RequestError(str(error), "messages") from error
        fewest = settings.tokens_compressed if self.model.router is not None else settings.tokens_full
        least = skeleton.num_text_tokens + sum(counts) * fewest
        if least >= self.limits.total_tokens:  # before any picture is decoded
            raise _too_long(f"at least {least} prompt tokens", self.limits)
        return skeleton, counts

    def _encoded(
        self, chat: Chat, tilings: Sequence[Tiling], check: Callable[[], None]
    ) -> tuple[EncodedTiles, torch.Tensor | None]:
        """Return the visual tokens of all tiles, and P(compress) float32 [N] if there is a router.

        Pictures are decoded one at a time.
        """
        model, weight = self.model, self.model.lm_head.weight
        router = model.router if model.compressed_connector is not None else None
        full = [weight.new_zeros(0, model.settings.tokens_full, model.language_width)]
        compressed = [weight.new_zeros(0, model.settings.tokens_compressed, model.language_width)]
        p_compress = [torch.zeros(0)]
        for picture, tiling in zip(chat.pictures, tilings, strict=True):
            check()
            pixels_N3SS = pixel_values(picture.decoded(), tiling)
            for start in range(0, len(pixels_N3SS), _BATCH_TILES):
                check()
                batch = torch.from_numpy(pixels_N3SS[start : start + _BATCH_TILES]).to(weight.device)
                features_NPv = model.vision_features(batch)
                full.append(model.full_tokens(features_NPv))
                if router is not None:
                    compressed.append(model.compressed_tokens(features_NPv))
                    p_compress.append(router.compress_probability(features_NPv).cpu())
        if router is None:
            return EncodedTiles(model, torch.cat(full), None), None
        return EncodedTiles(model, torch.cat(full), torch.cat(compressed)), torch.cat(p_compress)


def _too_long(lengths: str, limits: Limits) -> RequestError:
    message = (
        f"{lengths} are more than the {limits.total_tokens} tokens that prompt and answer may have together"
    )
    return RequestError(message, "messages", code="context_length_exceeded")
