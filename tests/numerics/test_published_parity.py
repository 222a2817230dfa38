"""Results equal those of the published Flash forward: `--golden DIR` checks every case folder in DIR.

A case holds `config.json`, `model.safetensors` (published layout), `case.json` (token ids, thresholds) and
`expected.safetensors`. Tensors agree within 2e-5 x max(1, largest expected), decisions and tokens exactly.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vico.checkpoints import load_model
from vico.inference.generation import greedy_answers
from vico.inference.routing import published_rule
from vico.inference.tile_losses import EncodedTiles
from vico.packing import TiledSequence, packed_row
from vico.prompt import Skeleton

DEFAULT = Path(__file__).parents[1] / "data" / "golden"


def pytest_generate_tests(metafunc):
    if "folder" in metafunc.fixturenames:
        root = Path(metafunc.config.getoption("--golden") or DEFAULT)
        folders = sorted(path.parent for path in root.glob("*/case.json"))
        if not folders:
            raise pytest.UsageError(f"--golden {root}: no folder with a case.json in it")
        metafunc.parametrize("folder", folders, ids=lambda path: path.name, scope="module")


@pytest.fixture(scope="module")
def case(folder):
    """Return the model of a case, its inputs, the expected results, and its vision tokens."""
    inputs, expected = (
        json.loads((folder / "case.json").read_text()),
        load_file(folder / "expected.safetensors"),
    )
    model = load_model(folder)
    model.settings = dataclasses.replace(model.settings, image_token_id=inputs["image_token_id"])
    with torch.no_grad():
        features = model.vision_features(expected["pixel_values"].float())
        tiles = EncodedTiles(model, model.full_tokens(features), model.compressed_tokens(features))
    return SimpleNamespace(model=model, inputs=inputs, expected=expected, features=features, tiles=tiles)


def skeleton(case) -> Skeleton:
    """Return the prompt of the case with one slot per tile."""
    image, width = case.inputs["image_token_id"], case.model.settings.tokens_full
    ids = case.expected["input_ids"][0].numpy()
    is_image = ids == image
    number = np.cumsum(is_image) - 1  # of the image token among image tokens
    kept = ids[~is_image | (number % width == 0)]
    return Skeleton(kept, np.zeros(len(kept), bool), len(case.features))


def decisions(case) -> torch.Tensor:
    probability = case.model.router.compress_probability(case.features)
    rule = case.inputs["flash_relative_threshold"], case.inputs["flash_absolute_threshold"]
    return published_rule(probability, *rule)


def assert_agree(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.shape == expected.shape
    bound = 2e-5 * max(1.0, expected.abs().max().item())
    assert (result - expected.to(result.dtype)).abs().max().item() <= bound


def test_vision_tokens(case):
    assert_agree(case.features.mean(1), case.expected["vit_mean"])


@torch.no_grad()
def test_both_connectors(case):
    assert_agree(case.tiles.full_NFD, case.expected["v256"])
    assert_agree(case.tiles.compressed_NCD, case.expected["v64"])


@torch.no_grad()
def test_router_probabilities_and_decisions(case):
    assert_agree(case.model.router(case.features).softmax(-1), case.expected["prob"])
    assert torch.equal(decisions(case), case.expected["compress"])


@torch.no_grad()
@pytest.mark.parametrize("routed", [True, False], ids=["routed", "full"])
def test_logits_of_the_last_positions(case, routed):
    rates = case.expected["compress"].numpy() if routed else np.zeros(len(case.features), bool)
    row = packed_row([TiledSequence(skeleton(case), rates, 0)], case.model.settings)
    if routed:
        assert torch.equal(row.input_ids, case.expected["compressed_ids"])
    expected = case.expected["logits_tail" if routed else "logits_full_tail"]
    last = torch.arange(len(row.input_ids))[-len(expected) :]
    hidden = case.model.answer_hidden_states(
        dataclasses.replace(row, answer_index=last),
        case.tiles.full_NFD[row.full_tiles],
        case.tiles.compressed_NCD[row.compressed_tiles],
    )
    assert_agree(case.model.lm_head(hidden), expected)


def test_greedy_continuation(case):
    expected = case.expected["greedy"].numpy()
    prompt = TiledSequence(skeleton(case), case.expected["compress"].numpy(), 0)
    [answer] = greedy_answers(
        case.tiles,
        [prompt],
        end_of_turn_id=case.model.settings.vocab_size,  # never occurs, so that no answer ends early
        max_new_tokens=len(expected),
        batch_tokens=1,
    )
    assert answer.ids.tolist() == expected.tolist()
