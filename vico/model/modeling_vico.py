"""ViCO's model for plain transformers: an exported folder opens with it, given `trust_remote_code=True`.

`vico export --layout hf` copies this file, `connectors.py` and `router.py` into the folder. So it imports
only torch, transformers and these two, and computes what `vico/model/internvl.py` computes.

Shapes: B rows, L tokens of the padded rows, N tiles, S tile side in pixels, F tokens of a tile at the full
rate, C at the compressed rate, D language width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.utils.generic import ModelOutput

from .connectors import CompressedConnector, pixel_shuffle
from .router import Router


@dataclass
class RoutedInputs(ModelOutput):
    """Left-padded embeddings [B, L, D] at the routed rates, and their mask int64 [B, L].

    `compressed` bool [N] and `compress_probability` float32 [N] are about all tiles, in order.
    """

    inputs_embeds: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    compressed: torch.Tensor | None = None
    compress_probability: torch.Tensor | None = None


@dataclass
class VicoOutput(ModelOutput):
    """Logits [B, L, V] of the routed rows, with their mask; L is at most the length of the given ids."""

    logits: torch.Tensor | None = None
    past_key_values: Any = None
    attention_mask: torch.Tensor | None = None
    compressed: torch.Tensor | None = None
    compress_probability: torch.Tensor | None = None


class VicoForConditionalGeneration(InternVLForConditionalGeneration):
    """InternVL with a compressed connector and a router.

    A tile whose P(compress) reaches `threshold` gets a quarter of its tokens. Ids hold the image token as
    often as the full rate needs (`VicoProcessor` writes them so); those that a compressed tile does not need
    are dropped.
    """

    def __init__(self, config: InternVLConfig):
        super().__init__(config)
        settings = config.vico
        self.threshold = float(settings["absolute_threshold"])
        self.shuffle = round(1 / config.downsample_ratio)
        vision: Any = config.vision_config
        text: Any = config.text_config
        vision_width = vision.hidden_size
        self.compressed_connector = CompressedConnector(vision_width, text.hidden_size)
        self.router = Router(vision_width)
        epsilon = getattr(vision, "qk_norm_eps", None)
        if epsilon is not None:  # transformers has a fixed one
            for layer in self.model.vision_tower.encoder.layer:
                layer.attention.q_norm.variance_epsilon = layer.attention.k_norm.variance_epsilon = epsilon
        self.post_init()

    @torch.no_grad()
    def routed_inputs(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        threshold: float | None = None,
    ) -> RoutedInputs:
        """Route the tiles, float [N, 3, S, S], and return the rows of ids [B, L] with their visual tokens.

        `threshold` above 1 compresses no tile. Raises ValueError if ids and tiles do not belong together.
        """
        tower = self.model.vision_tower
        dtype = self.lm_head.weight.dtype
        features = tower(pixel_values=pixel_values.to(dtype)).last_hidden_state[:, 1:]
        probability_N = self.router.compress_probability(features)
        compressed_N = probability_N >= (self.threshold if threshold is None else threshold)
        tokens_NFD = self.model.multi_modal_projector(pixel_shuffle(features, self.shuffle)).clone()
        num_full = tokens_NFD.shape[1]
        num_compressed = num_full // self.shuffle**2
        if compressed_N.any():
            shuffled = pixel_shuffle(features[compressed_N], self.shuffle**2)
            tokens_NFD[compressed_N, :num_compressed] = self.compressed_connector(shuffled)
        is_image_BL = input_ids == self.config.image_token_id
        if int(is_image_BL.sum()) != len(tokens_NFD) * num_full:
            num_places = int(is_image_BL.sum())
            raise ValueError(
                f"the ids have {num_places} image tokens; {len(tokens_NFD)} tiles need {num_full} each"
            )
        embeds_BLD = self.get_input_embeddings()(input_ids).to(dtype)
        embeds_BLD[is_image_BL] = tokens_NFD.flatten(0, 1)
        is_kept_BL = torch.ones_like(is_image_BL) if attention_mask is None else attention_mask.bool()
        slot_NF = torch.arange(num_full, device=input_ids.device).expand(len(tokens_NFD), -1)
        is_kept_BL = is_kept_BL.clone()
        is_kept_BL[is_image_BL] &= (~compressed_N[:, None] | (slot_NF < num_compressed)).flatten()
        rows = [row_LD[kept_L] for row_LD, kept_L in zip(embeds_BLD, is_kept_BL, strict=True)]
        longest = max(map(len, rows))
        padded = embeds_BLD.new_zeros(len(rows), longest, embeds_BLD.shape[-1])
        mask = torch.zeros(len(rows), longest, dtype=torch.int64, device=input_ids.device)
        for b, row_LD in enumerate(rows):
            padded[b, longest - len(row_LD) :] = row_LD
            mask[b, longest - len(row_LD) :] = 1
        return RoutedInputs(padded, mask, compressed_N, probability_N)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        threshold: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the logits; with pixels those of the routed rows, as VicoOutput."""
        if pixel_values is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        assert input_ids is not None, "pixels need the ids of their prompts"
        if kwargs.get("labels") is not None:
            raise ValueError("labels with pixels are not supported: routing drops positions; train with vico")
        routed = self.routed_inputs(input_ids, pixel_values, attention_mask, threshold)
        mask = routed.attention_mask
        assert mask is not None
        kwargs = {
            name: value for name, value in kwargs.items() if name not in ("position_ids", "return_dict")
        }
        outputs = super().forward(
            inputs_embeds=routed.inputs_embeds,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            **kwargs,
        )
        return VicoOutput(
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            attention_mask=mask,
            compressed=routed.compressed,
            compress_probability=routed.compress_probability,
        )

    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        threshold: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the given ids with the new ones after them, as transformers does.

        Lengths (`max_length`) count routed tokens; `max_new_tokens` is the clearer limit.
        """
        plain: Any = super()  # `generate` is declared for a `self` that no model class is
        if pixel_values is None:
            return plain.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        assert input_ids is not None, "pixels need the ids of their prompts"
        routed = self.routed_inputs(input_ids, pixel_values, attention_mask, threshold)
        generated: Any = plain.generate(
            inputs_embeds=routed.inputs_embeds, attention_mask=routed.attention_mask, **kwargs
        )
        if torch.is_tensor(generated):
            return _joined(input_ids, generated)
        generated.sequences = _joined(input_ids, generated.sequences)
        return generated


def _joined(input_ids: torch.Tensor, new_ids: torch.Tensor) -> torch.Tensor:
    """Return the new ids, one or several rows of each given row, with the given ones before them."""
    num_each = len(new_ids) // len(input_ids)  # num_return_sequences
    return torch.cat([input_ids.repeat_interleave(num_each, dim=0), new_ids], dim=1)
