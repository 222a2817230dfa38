"""InternVL with ViCO's second connector and router: policy, reference and served model are all this class.

Shapes: N tiles, S tile side in pixels, P vision tokens per tile, v vision width, F tokens of a tile at the
full rate (P / 4), C at the compressed rate (P / 16), L tokens of a packed row, A answer tokens, D language
width, B = 1 row. Published 448 px tiles have P = 1,024, F = 256, C = 64.
"""

import torch
from torch import nn
from transformers import InternVLForConditionalGeneration, InternVLVisionConfig, PreTrainedConfig

from vico.losses import KLHead
from vico.model.connectors import CompressedConnector, pixel_shuffle
from vico.model.pixels import normalised
from vico.model.router import Router
from vico.model.segments import IMPLEMENTATION
from vico.model.shared_keys import SharedKeys
from vico.packing import PackedRow
from vico.settings import ModelSettings


class VicoModel(nn.Module):
    """The Hugging Face InternVL `base`, with `compressed_connector` and `router` (None until added)."""

    def __init__(self, base: InternVLForConditionalGeneration, settings: ModelSettings):
        super().__init__()
        self.base, self.settings = base, settings
        self.compressed_connector: CompressedConnector | None = None
        self.router: Router | None = None
        base.lm_head.__class__ = KLHead  # same parameters and names, and a forward that can compute the KL
        base.model.language_model.set_attn_implementation(IMPLEMENTATION)

    @property
    def vision_width(self) -> int:
        """The width v of the vision tower."""
        vision = self.base.config.vision_config
        assert isinstance(vision, InternVLVisionConfig)
        return vision.hidden_size

    @property
    def language_width(self) -> int:
        """The width D of the language model."""
        text = self.base.config.text_config
        assert isinstance(text, PreTrainedConfig)
        return text.hidden_size

    @property
    def lm_head(self) -> KLHead:
        """The language model head; its forward can also compute the consistency loss."""
        return self.base.lm_head

    def add_compressed_connector(self, generator_seed: int) -> None:
        """Add a compressed connector with torch's default initialisation, drawn from `generator_seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_seed)
            connector = CompressedConnector(self.vision_width, self.language_width)
        self.compressed_connector = connector.to(self.lm_head.weight).train(self.training)

    def add_router(self, generator_seed: int) -> None:
        """Add a router with torch's default initialisation, drawn from `generator_seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_seed)
            router = Router(self.vision_width)
        self.router = router.to(self.lm_head.weight).train(self.training)

    def drop_language_layers(self) -> None:
        """Free the layers of the language model, for a process that only makes input embeddings."""
        self.base.model.language_model.layers = nn.ModuleList()

    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the vision tokens [N, P, v] of tiles [N, 3, S, S], without the class token.

        Tiles are bytes as `vico.tiling.tile_pixels` returns them, or already normalised floats.
        """
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalised(pixel_values)
        tower = self.base.model.vision_tower
        return tower(pixel_values=pixel_values.to(self.lm_head.weight.dtype)).last_hidden_state[:, 1:]

    def full_tokens(self, features_NPv: torch.Tensor) -> torch.Tensor:
        """Return tokens [N, F, D] of the pretrained connector, rate 1/4."""
        factor = round(1 / self.base.config.downsample_ratio)
        return self.base.model.multi_modal_projector(pixel_shuffle(features_NPv, factor))

    def compressed_tokens(self, features_NPv: torch.Tensor) -> torch.Tensor:
        """Return tokens [N, C, D] of the compressed connector, rate 1/16."""
        assert self.compressed_connector is not None, "call add_compressed_connector first"
        factor = round(1 / self.base.config.downsample_ratio) ** 2
        return self.compressed_connector(pixel_shuffle(features_NPv, factor))

    def visual_tokens(
        self, features_NPv: torch.Tensor, row: PackedRow
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return (tokens of the row's full tiles, tokens of its compressed tiles, a zero that ties them).

        The tokens are [tiles, F, D] and [tiles, C, D] (None without a compressed connector). Each connector
        runs once, on its tiles plus one tile of zeros. So ranks and steps call the same modules in the same
        order whatever their tiles are, which ZeRO-2 and ZeRO-3 rely on. The tie keeps both connectors in
        the graph.
        """
        zero_tile = features_NPv.new_zeros(1, *features_NPv.shape[1:])
        full = self.full_tokens(torch.cat([features_NPv[row.full_tiles], zero_tile]))
        tie = full[-1].sum() * 0
        if self.compressed_connector is None:
            return full[:-1], None, tie
        compressed = self.compressed_tokens(torch.cat([features_NPv[row.compressed_tiles], zero_tile]))
        return full[:-1], compressed[:-1], tie + compressed[-1].sum() * 0

    def embedded_row(
        self, row: PackedRow, full_tokens: torch.Tensor, compressed_tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the input embeddings [L, D] of a packed row, with the tokens of its tiles in their slots.

        Raises ValueError if the row compresses a tile and the model has no compressed connector.
        """
        embeds_LD = self.base.model.get_input_embeddings()(row.input_ids)
        embeds_LD = embeds_LD.index_copy(0, row.full_slots, full_tokens.reshape(-1, embeds_LD.shape[-1]))
        if compressed_tokens is not None:
            tokens = compressed_tokens.reshape(-1, embeds_LD.shape[-1])
            embeds_LD = embeds_LD.index_copy(0, row.compressed_slots, tokens)
        elif len(row.compressed_slots):
            raise ValueError("the row compresses a tile, but the model has no compressed connector")
        return embeds_LD

    def answer_hidden_states(
        self,
        row: PackedRow,
        full_tokens: torch.Tensor,
        compressed_tokens: torch.Tensor | None,
        shared_keys: SharedKeys | None = None,
    ) -> torch.Tensor:
        """Return the hidden states [A, D] that predict the answer tokens of the row.

        With `shared_keys`, the row holds ends of sequences, whose beginnings those keys describe.
        """
        embeds_BLD = self.embedded_row(row, full_tokens, compressed_tokens).unsqueeze(0)
        hidden_BLD = self.base.model.language_model(
            inputs_embeds=embeds_BLD,
            # Attention by segment needs no mask. Without one, transformers would look for sequences in the
            # positions, and for that the host waits until the device has finished all queued work.
            attention_mask=embeds_BLD.new_zeros(1, 1, 1, 1),
            position_ids=row.position_ids.unsqueeze(0),
            use_cache=False,
            segment_lengths=list(row.lengths),
            shared_keys=shared_keys,
        ).last_hidden_state
        return hidden_BLD[0, row.answer_index]
