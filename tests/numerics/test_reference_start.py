"""The reference must be the policy's start model: other sizes are refused, heads that differ by padding are
not. One vision pass gives the same loss as two."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.inference import InferenceSettings, load_models
from tests.numerics.consistency_case import consistency_task, samples, sharp_model
from tests.tiny_model import VOCABULARY, make_tiny_model
from vico.checkpoints import load_model
from vico.errors import UserError
from vico.inference.branches import RatedSample
from vico.inference.tile_losses import encoded_tiles, rate_losses
from vico.model.internvl import VicoModel
from vico.objectives.consistency import ConsistencyTask, answer_hidden_states
from vico.packing import packed_batch
from vico.prompt import check_same_tokens, load_prompt_format


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("start") / "m")


def a_pack(prompt_format):
    chosen = [samples(prompt_format, number, shape) for number, shape in enumerate([(3,), (2, 1), ()])]
    random = np.random.default_rng(5)
    rates = [random.random(sample.skeleton.num_tiles) < 0.5 for sample in chosen]
    return packed_batch(chosen, rates, prompt_format.settings, "sample")


def test_a_reference_with_other_tiles_is_refused(folder, tmp_path):
    other = make_tiny_model(tmp_path / "larger", tile_size=112)
    with pytest.raises(UserError, match="reference: tile_size=112, but the policy has tile_size=56"):
        ConsistencyTask(load_model(folder), load_model(other), 5)


def test_another_vocabulary_is_refused_and_padding_is_not(folder, tmp_path):
    other = make_tiny_model(tmp_path / "padded", text={"vocab_size": VOCABULARY + 8})
    with pytest.raises(UserError, match=f"vocab_size={VOCABULARY + 8}, but the policy has vocab_size="):
        ConsistencyTask(load_model(folder), load_model(other), 5, num_token_ids=VOCABULARY + 1)
    task = ConsistencyTask(load_model(folder), load_model(other), 5, num_token_ids=VOCABULARY - 20)
    assert task.num_ids == VOCABULARY


def test_a_policy_from_elsewhere_is_compared_with_the_model_of_the_run(folder, tmp_path):
    """The stages ratio and evaluate may get a policy that another run has trained."""
    padded = make_tiny_model(tmp_path / "padded", text={"vocab_size": VOCABULARY + 8})
    larger = make_tiny_model(tmp_path / "larger", tile_size=112)
    reader = SimpleNamespace(prompt_format=load_prompt_format(folder))
    limits = {"num_threads": 1, "row_tokens": 512, "generation_tokens": 512, "batch_tiles": 4}

    def opened(policy):
        folders = {"policy_folder": policy, "reference_folder": folder, "shard_folder": tmp_path}
        settings = InferenceSettings(**folders, **limits, dtype="float32", device="cpu", kl_chunk_rows=8)
        return load_models(settings, reader)

    with pytest.raises(UserError, match="reference: tile_size=56, but the policy has tile_size=112"):
        opened(larger)
    policy, reference = opened(padded)
    prompt_format = reader.prompt_format
    sample = samples(prompt_format, 0, (2,))
    tiles = [encoded_tiles(model, sample.pixels, 4) for model in (policy, reference)]
    asked = [RatedSample(sample.skeleton, 0, [np.zeros(2, bool)])]
    ((loss,),) = rate_losses(*tiles, asked, row_tokens=512, kl_chunk_rows=8)
    assert np.isfinite(loss)


def test_a_policy_with_another_tokenizer_of_the_same_size_is_refused(folder, tmp_path):
    """Two tokens are exchanged, as in a tokenizer that was trained again: only the words would be wrong."""
    other = shutil.copytree(folder, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted((token for token in vocabulary if token.isalpha()), key=vocabulary.get)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    check_same_tokens(load_prompt_format(folder), load_prompt_format(folder))
    with pytest.raises(
        UserError, match=rf"tokenizer of {other} gives the token '{second}' the id 38.* 39 \(2 tokens"
    ):
        check_same_tokens(load_prompt_format(other), load_prompt_format(folder))
    folders = {"policy_folder": other, "reference_folder": folder, "shard_folder": tmp_path}
    limits = {"num_threads": 1, "row_tokens": 512, "generation_tokens": 512, "batch_tiles": 4}
    settings = InferenceSettings(**folders, **limits, dtype="float32", device="cpu", kl_chunk_rows=8)
    with pytest.raises(UserError, match="2 tokens differ"):
        load_models(settings, SimpleNamespace(prompt_format=load_prompt_format(folder)))


def frozen(task, folder):
    """Return the task with a frozen vision tower, and so with one vision pass."""
    task.policy.base.model.vision_tower.requires_grad_(False)
    reference = sharp_model(folder, torch.float32)
    task = ConsistencyTask(task.policy, reference, task.kl_chunk_rows)
    assert reference.base.model.vision_tower is None
    return task


def test_one_vision_pass_equals_two_in_loss_and_gradients(folder):
    prompt_format = load_prompt_format(folder)
    pack = a_pack(prompt_format)
    two_passes = consistency_task(folder).train()
    one_pass = frozen(consistency_task(folder), folder).train()
    for task in (two_passes, one_pass):
        task.policy.compressed_connector.eval()  # its dropout would be drawn again
    calls = []
    one_pass.policy.base.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    expected, loss = two_passes(pack)[0], one_pass(pack)[0]
    assert len(calls) == 1
    assert loss.item() == expected.item() > 0
    expected.backward()
    loss.backward()
    gradients = dict(two_passes.named_parameters())
    for name, parameter in one_pass.named_parameters():
        if "vision_tower" in name:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-6, atol=1e-9)


def with_other_tower(task: ConsistencyTask) -> VicoModel:
    """Change the policy's tower, as an earlier training of it does; return the policy."""
    with torch.no_grad():
        for parameter in task.policy.base.model.vision_tower.parameters():
            parameter.mul_(1.1)
    return task.policy


def test_a_frozen_tower_of_its_own_is_not_given_to_the_reference(folder):
    """A joint training may freeze a tower that the first training has changed."""
    pack = a_pack(load_prompt_format(folder))
    trained = consistency_task(folder)
    with_other_tower(trained)
    trained.eval()
    policy = with_other_tower(consistency_task(folder))
    policy.base.model.vision_tower.requires_grad_(False)
    reference = sharp_model(folder, torch.float32)
    frozen_task = ConsistencyTask(policy, reference, trained.kl_chunk_rows)
    assert reference.base.model.vision_tower is not None
    loss, counts = frozen_task.eval()(pack)
    expected, expected_counts = trained(pack)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and loss.item() > 0
    loss.backward()
    named = dict(frozen_task.named_parameters())
    assert all(named[name].grad is None for name in named if "vision_tower" in name)
    assert any(parameter.grad is not None for parameter in named.values())
    assert counts["flops"] < expected_counts["flops"], "no gradient of the tower"
    assert not frozen_task.train().policy.base.model.vision_tower.training


def test_against_the_answers_the_loss_is_their_cross_entropy_and_no_reference_runs(folder):
    prompt_format = load_prompt_format(folder)
    pack, task = a_pack(prompt_format), consistency_task(folder)
    reference = sharp_model(folder, torch.float32)
    calls: list[int] = []
    reference.base.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    answers = ConsistencyTask(task.policy, reference, task.kl_chunk_rows, learns_answers=True)
    answers.train().policy.compressed_connector.eval()  # its dropout would be drawn again
    loss, counts = answers(pack)
    assert not calls
    policy = task.policy
    with torch.no_grad():
        hidden_AD, _ = answer_hidden_states(policy, policy.vision_features(pack.tiles), pack.policy)
        logits_AV = hidden_AD.double() @ policy.lm_head.weight.double().T
        expected_A = torch.nn.functional.cross_entropy(
            logits_AV[:, : answers.num_ids], pack.policy.answer_ids, reduction="none"
        )
    assert loss.item() == pytest.approx(float((expected_A * pack.weights_A).sum()), rel=1e-5)
    assert float(counts["kl_sum"]) == pytest.approx(float(expected_A.sum()), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters() if parameter.requires_grad)
    kl, _ = answers.eval()(pack)
    assert calls and kl.item() == pytest.approx(task.eval()(pack)[0].item(), rel=1e-6)
