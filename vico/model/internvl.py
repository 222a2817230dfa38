"""An InternVL with a second connector and a router: the policy, the reference and the served model are all
this class."""

import torch
from torch import nn
from transformers import InternVLForConditionalGeneration

from vico.losses import KLHead
from vico.model.connectors import CompressedConnector, pixel_shuffle
from vico.model.router import Router
from vico.model.segments import IMPLEMENTATION
from vico.packing import PackedRow
from vico.settings import ModelSettings


class VicoModel(nn.Module):
    """`base` is the Hugging Face InternVL; `compressed_connector` and `router` are None until they exist."""

    def __init__(self, base: InternVLForConditionalGeneration, settings: ModelSettings):
        super().__init__()
        self.base, self.settings = base, settings
        self.compressed_connector: CompressedConnector | None = None
        self.router: Router | None = None
        base.lm_head.__class__ = KLHead  # same parameters and keys, one more thing it can compute
        base.model.language_model.set_attn_implementation(IMPLEMENTATION)

    @property
    def vision_width(self) -> int:
        return self.base.config.vision_config.hidden_size

    @property
    def language_width(self) -> int:
        return self.base.config.text_config.hidden_size

    @property
    def lm_head(self) -> KLHead:
        return self.base.lm_head

    def add_compressed_connector(self, generator_seed: int) -> None:
        """A new compressed connector, initialised by torch's defaults from `generator_seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_seed)
            connector = CompressedConnector(self.vision_width, self.language_width)
        self.compressed_connector = connector.to(self.lm_head.weight).train(self.training)

    def add_router(self, generator_seed: int) -> None:
        """A new router, initialised by torch's defaults from `generator_seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_seed)
            router = Router(self.vision_width)
        self.router = router.to(self.lm_head.weight).train(self.training)

    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float [N, 3, S, S] -> vision tokens [N, P, v], class token dropped, before the pixel shuffle."""
        tower = self.base.model.vision_tower
        return tower(pixel_values=pixel_values.to(self.lm_head.weight.dtype)).last_hidden_state[:, 1:]

    def full_tokens(self, features_NPv: torch.Tensor) -> torch.Tensor:
        """[N, P, v] -> [N, F, D] by the pretrained connector, rate 1/4."""
        factor = round(1 / self.base.config.downsample_ratio)
        return self.base.model.multi_modal_projector(pixel_shuffle(features_NPv, factor))

    def compressed_tokens(self, features_NPv: torch.Tensor) -> torch.Tensor:
        """[N, P, v] -> [N, C, D] by the new connector, rate 1/16."""
        factor = round(1 / self.base.config.downsample_ratio) ** 2
        return self.compressed_connector(pixel_shuffle(features_NPv, factor))

    def visual_tokens(
        self, features_NPv: torch.Tensor, row: PackedRow
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(full tokens of `row.full_tiles`, compressed tokens of `row.compressed_tiles`, a zero that ties
        them).

        Each connector runs once, on its tiles plus one zero tile: ranks and steps then call the same
        modules in the same order whatever their tiles, which ZeRO-2 and 3 rely on. Add the tie to the
        loss.
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
        """Input embeddings [L, D] of a packed row, tiles' tokens in their slots."""
        embeds_LD = self.base.model.get_input_embeddings()(row.input_ids)
        embeds_LD = embeds_LD.index_copy(0, row.full_slots, full_tokens.reshape(-1, embeds_LD.shape[-1]))
        if compressed_tokens is not None:
            tokens = compressed_tokens.reshape(-1, embeds_LD.shape[-1])
            embeds_LD = embeds_LD.index_copy(0, row.compressed_slots, tokens)
        elif len(row.compressed_slots):
            raise ValueError("a tile is to be compressed, but the model has no compressed connector")
        return embeds_LD

    def answer_hidden_states(
        self, row: PackedRow, full_tokens: torch.Tensor, compressed_tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states [A, D] that predict the row's answer tokens."""
        embeds_BLD = self.embedded_row(row, full_tokens, compressed_tokens).unsqueeze(0)
        hidden_BLD = self.base.model.language_model(
            inputs_embeds=embeds_BLD,
            # Segments keep tokens apart and read no mask. Without one transformers looks for the sequences
            # in the positions, for which the host waits until the device has done all it was given.
            attention_mask=embeds_BLD.new_zeros(1, 1, 1, 1),
            position_ids=row.position_ids.unsqueeze(0),
            use_cache=False,
            segment_lengths=list(row.lengths),
        ).last_hidden_state
        return hidden_BLD[0, row.answer_index]
