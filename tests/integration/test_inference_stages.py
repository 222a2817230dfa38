"""Ratio, label, evaluate and export on real shards and real Ray, without a pipeline: contracts, resume, tiles
that the router stage did not score.
"""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from cluster.ray_session import ray_session
from data_prep.records.config import RecordsConfig
from data_prep.shards.index import load_index
from data_prep.shards.reader import SampleReader
from stages.evaluate import stage as evaluate
from stages.evaluate.scores import rate_text
from stages.evaluate.table import evaluation_table
from stages.evaluate.tile_measures.pixel_rule import fitted_pixel_rule
from stages.evaluate.wanted_quality import threshold_for_quality
from stages.export import stage as export
from stages.inference import inference_settings
from stages.label import stage as label
from stages.outputs import part_name
from stages.parts import Parts
from stages.ratio import stage as ratio
from stages.ratio.actor import RatioActor
from stages.ratio.samples import shards_of
from stages.shard import stage as shard
from tests.stage_context import stage_context
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model
from vico.errors import UserError
from vico.inference.branches import RatedSample
from vico.inference.calibration import placed_threshold
from vico.inference.tile_losses import encoded_tiles, rate_losses
from vico.prompt import load_prompt_format

STAGES = ("shard", "consistency", "ratio", "label", "router", "evaluate")
RECORDS = RecordsConfig(format="demo", num_samples=160, seed=4)
EVALUATE = evaluate.EvaluateConfig(seed=1, max_samples=24, shares=(0.3, 0.6), max_new_tokens=6)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """Return a store with shards of demo records, a policy and a router with random weights, and the outputs
    of all other stages."""
    folder = tmp_path_factory.mktemp("store")
    model = make_tiny_model(folder / "start")
    with ray_session(stage_context("shard", folder, {}).site):
        inputs = {"records": RECORDS, "heldout": None, "tokenizer": model}
        shard_config = shard.ShardConfig(samples_per_shard=40, calib_share=0.2, test_share=0.2)
        shard.run(shard_config, stage_context("shard", folder, inputs))
        write_policy_and_router(folder)
        ratio.run(ratio.RatioConfig(seed=1), context_of(folder, "ratio", ratio))
        label.run(label.LabelConfig(seed=1), context_of(folder, "label", label))
        write_router_scores(folder)
        evaluate.run(EVALUATE, context_of(folder, "evaluate", evaluate))
        export.run(export.ExportConfig(), context_of(folder, "export", export))
        yield folder


def context_of(folder, stage, module, attempt=1):
    outputs = {name: folder / name / "output" for name in STAGES} | {"model": folder / "start"}
    outputs |= {"records": RECORDS, "heldout": None}
    return stage_context(stage, folder, {name: outputs[name] for name in module.INPUTS}, attempt)


def write_policy_and_router(folder):
    model = load_model(folder / "start")
    model.add_compressed_connector(3)
    model.add_router(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.01)
    router = {f"router.{name}": tensor.clone() for name, tensor in model.router.state_dict().items()}
    policy = {name: t for name, t in model.state_dict().items() if not name.startswith("router.")}
    save_model(policy, folder / "start", folder / "consistency" / "output" / "policy")
    (folder / "router" / "output").mkdir(parents=True)
    save_file(router, folder / "router" / "output" / "router.safetensors")
    steps = np.arange(1, 31)
    curve = pa.table({"step": steps, "name": ["loss"] * 30, "value": np.exp(-steps / 9)})
    for stage in ("consistency", "router"):
        pq.write_table(curve, folder / stage / "output" / "curve.parquet")


def write_router_scores(folder):
    """Write scores near the labels for calib tiles and half of the test samples; evaluate must score the
    rest."""
    table = pq.read_table(folder / "label" / "output" / "labels.parquet")
    table = table.filter(pc.not_equal(table["split"], "train"))
    noise = np.random.default_rng(0).standard_normal(len(table))
    p_compress = 1 / (1 + np.exp(3 * table["label"].to_numpy() - 1.5 + noise))
    table = table.append_column("p_compress", pa.array(p_compress))
    calib = table.filter(pc.equal(table["split"], "calib"))
    threshold = placed_threshold(calib["p_compress"].to_numpy(), 0.5).value
    test_keys = sorted(set(table.filter(pc.equal(table["split"], "test"))["key"].to_pylist()))
    unscored = pa.array(test_keys[::2])
    output = folder / "router" / "output"
    pq.write_table(table.filter(pc.invert(pc.is_in(table["key"], unscored))), output / "scores.parquet")
    metrics = {"absolute_threshold": threshold, "auc": 0.9, "num_test": len(table) - len(calib)}
    (output / "metrics.json").write_text(json.dumps(metrics))


def test_every_tile_has_its_losses(storage):
    ratios = pq.read_table(storage / "ratio" / "output" / "ratios.parquet")
    index = load_index(storage / "shard" / "output").table()
    expected = [
        (indexed["key"], indexed["split"], image, tile, count)
        for indexed in index.to_pylist()
        for image, count in enumerate(indexed["tiles"])
        for tile in range(count)
    ]
    columns = ("key", "split", "image", "tile", "num_tiles")
    assert list(zip(*(ratios[name].to_pylist() for name in columns), strict=True)) == expected
    full, compressed = ratios["loss_full"].to_numpy(), ratios["loss_compressed"].to_numpy()
    assert (full > 0).all() and (compressed > 0).all()
    np.testing.assert_allclose(ratios["ratio"].to_numpy(), (compressed + 0.01) / (full + 0.01))


def test_losses_are_the_same_for_a_sample_alone(storage):
    """The actors compute them in packed rows of many samples; here each variant is computed alone."""
    ratios = pq.read_table(storage / "ratio" / "output" / "ratios.parquet")
    reader = SampleReader(storage / "shard" / "output", load_prompt_format(storage / "start"))
    policy = load_model(storage / "consistency" / "output" / "policy")
    reference = load_model(storage / "start")
    all_rows = reader.index.table().to_pylist()
    for indexed in [row for row in all_rows if row["num_tiles"] == 3][:3]:
        sample = reader.sample(indexed["row"])
        tiles = [encoded_tiles(model, sample.pixels, 1) for model in (policy, reference)]
        tile_rows = ratios.filter(pc.equal(ratios["key"], indexed["key"])).to_pylist()
        for tile, row in enumerate(tile_rows):
            flags = np.arange(3) == tile
            for rates, column in ((np.zeros(3, bool), "loss_full"), (flags, "loss_compressed")):
                rated = [RatedSample(sample.skeleton, 0, [rates])]
                (value,) = rate_losses(*tiles, rated, row_tokens=1, kl_chunk_rows=10_000)
                assert row[column] == pytest.approx(value[0], rel=1e-4)


def test_isolation_image_shares_the_loss_of_all_tiles(storage, tmp_path):
    context = context_of(storage, "ratio", ratio)
    config = ratio.RatioConfig(seed=1, isolation="image", splits=("train",), max_samples=9)
    shards = shards_of(config, storage / "shard" / "output")
    assert sum(len(chosen.rows) for chosen in shards) == 9
    actor = RatioActor(inference_settings(context, "float32"), config, Parts(tmp_path, 1))
    for chosen in shards:
        actor.write_part(chosen)
        table = pq.read_table(tmp_path / "output" / part_name(chosen.shard))
        assert set(table["split"].to_pylist()) == {"train"}
        by_image = table.group_by(["key", "image"]).aggregate([("loss_compressed", "count_distinct")])
        assert set(by_image["loss_compressed_count_distinct"].to_pylist()) == {1}


def test_evaluation_is_complete(storage):
    output = storage / "evaluate" / "output"
    metrics = json.loads((output / "metrics.json").read_text())
    predictions = pq.read_table(output / "predictions.parquet")
    assert (
        metrics["num_samples"] == 24
        and metrics["ratios_known"]
        and metrics["num_answers"] == len(predictions)
    )
    listed = ("routed", "random", "shuffled", "pixel_rule", "blind_oracle", "seeing_oracle", "oracle")
    assert [len(metrics[name]) for name in listed] == [3] * 7
    fewer = metrics["fewer_tiles"]
    assert [point["max_tiles"] for point in fewer] == sorted(point["max_tiles"] for point in fewer)
    assert fewer[0]["max_tiles"] == 1 and fewer[0]["tokens_saved"] > fewer[-1]["tokens_saved"] > 0
    assert metrics["full"]["tokens_saved"] == metrics["reference"]["kl"] == 0
    assert (
        metrics["compressed"]["tokens_saved"] == 0.75
        and metrics["compressed"]["kl"] > metrics["full"]["kl"] > 0
    )
    shares = [point["share_compressed"] for point in metrics["routed"]]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] < 1
    assert metrics["served"][0]["share_compressed"] < 1
    for name in listed[1:]:
        assert [point["visual_tokens"] for point in metrics[name]] == [
            point["visual_tokens"] for point in metrics["routed"]
        ]
    for name in ("quality_against_tokens", "routed_pictures", "training_curves", "ratios_by_content"):
        with Image.open(output / "figures" / f"{name}.png") as figure:
            assert figure.width > 400


def test_the_pixel_rule_and_what_tiles_show(storage):
    """The rule is fitted to the labels of calib, from the pixels that the model sees; the demo knows what
    tiles show."""
    output = storage / "evaluate" / "output"
    metrics = json.loads((output / "metrics.json").read_text())
    measured = pq.read_table(output / "tiles.parquet")
    fit = metrics["pixel_rule_fit"]
    scores = pq.read_table(storage / "router" / "output" / "scores.parquet").to_pylist()
    labelled = [tile for tile in scores if tile["label"] in (0, 1)]
    tile_labels = {(tile["key"], tile["image"], tile["tile"]): tile["label"] for tile in labelled}
    assert fit == fitted_pixel_rule(measured, tile_labels)[0] and fit["weights"] is not None
    labels = pq.read_table(storage / "label" / "output" / "labels.parquet")
    joined = measured.join(labels, ["key", "image", "tile"], right_suffix="_labels")
    calib = joined.filter(pc.equal(joined["split"], "calib"))
    keep = calib["label"].to_numpy() == 1
    for name in fit["weights"]:
        expected = roc_auc_score(keep, calib[name].to_numpy())
        assert fit["auc_calib"][name] == pytest.approx(expected)
    assert measured["content"].null_count == 0
    plain = pc.equal(measured["content"], "plain")
    assert pc.max(measured.filter(plain)["gray_deviation"]).as_py() < 9
    shown = {name: ratio["tiles"] for name, ratio in metrics["ratio_by_content"].items()}
    both = shown.pop("plain and photograph")
    assert sum(shown.values()) == metrics["num_tiles"] and both == shown["plain"] + shown["photograph"]


def test_comparisons_between_points_have_intervals(storage):
    output = storage / "evaluate" / "output"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["intervals"]["unit"] == "sample" and metrics["intervals"]["num_units"] == 24
    assert 1 < metrics["intervals"]["num_groups"] < 20
    assert metrics["router"]["num_tiles"] > 0
    for where in ("at_point", "over_curve"):
        assert set(metrics["gap_closed"][where]) >= {"routed", "random", "oracle", "share", "interval"}
        assert set(metrics["routed_minus"][where]) >= {"random", "shuffled", "pixel_rule", "oracle"}
        split = metrics["oracle_split"][where]
        routed_minus = metrics["routed_minus"][where]
        assert set(split) >= {"better_router", "question"}
        for difference in (split["better_router"], routed_minus["blind_oracle"]):
            # the random model answers no question, so no quality is defined
            assert difference == {"difference": None, "interval": None}
    table = (output / "table.md").read_text()
    assert table == evaluation_table(metrics)
    assert table.count("pixel rule |") == table.count("| **router**") >= 2


def test_each_answer_is_generated_once(storage):
    predictions = pq.read_table(storage / "evaluate" / "output" / "predictions.parquet")
    columns = (predictions[name].to_pylist() for name in ("key", "model", "rates"))
    answered = list(zip(*columns, strict=True))
    assert len(answered) == len(set(answered))
    reference = predictions.filter(pc.equal(predictions["model"], "reference"))
    assert set(reference["rates"].to_pylist()) <= {"0" * n for n in range(14)} and len(reference) == 24


def test_the_ratios_of_other_questions_are_those_of_the_earlier_turns(storage):
    table = pq.read_table(storage / "evaluate" / "output" / "question_ratios.parquet")
    reader = SampleReader(storage / "shard" / "output", load_prompt_format(storage / "start"))
    policy = load_model(storage / "consistency" / "output" / "policy")
    reference = load_model(storage / "start")
    rows = {indexed["key"]: indexed["row"] for indexed in reader.index.table(["key"]).to_pylist()}
    by_key: dict[str, list[dict]] = {}
    for tile in table.to_pylist():
        by_key.setdefault(tile["key"], []).append(tile)
    several = 0
    for key, tiles in by_key.items():
        turns = reader.record(rows[key])["conversations"]
        assert tiles[0]["scored"] == turns[-2]["value"].replace("<image>", "").strip()
        if len(turns) == 2:
            assert {tile["log_ratio"] for tile in tiles} == {None}
            continue
        several += 1
        sample = reader.sample(rows[key])
        skeleton = reader.prompt_format.encode(turns[:-2], sample.tiles_per_image)
        encoded = [encoded_tiles(model, sample.pixels, 4) for model in (policy, reference)]
        rates = [np.zeros(len(tiles), bool), *np.eye(len(tiles), dtype=bool)]
        (losses,) = rate_losses(
            *encoded, [RatedSample(skeleton, 0, rates)], row_tokens=10_000, kl_chunk_rows=100
        )
        expected = np.log((losses[1:] + 0.01) / (losses[0] + 0.01))
        np.testing.assert_allclose([tile["log_ratio"] for tile in tiles], expected, rtol=1e-3, atol=1e-5)
    assert several > 3


def answers_by_rates(shards):
    """Return a function that answers as if the reference knew everything, and the policy half of it with all
    tiles compressed."""
    row_keys = {row["row"]: row["key"] for row in load_index(shards).table().to_pylist()}

    def answers(blocks):
        rows = []
        for row, rates in ((r, v) for block in blocks for r, v in zip(block.rows, block.rates, strict=True)):
            of_row = [("reference", rates[0] & False), *(("policy", flags) for flags in rates)]
            rows += [
                {"key": row_keys[row], "model": model, "rates": rate_text(flags), "exact_match": False}
                | {"similarity": 1 - flags.mean() / 2, "kl": 0.0, "truncated": False}
                for model, flags in of_row
            ]
        return pa.Table.from_pylist(rows)

    return answers


def test_the_threshold_for_a_wanted_quality_is_the_one_that_saves_most_on_calib(storage):
    context = context_of(storage, "evaluate", evaluate)
    scores = pq.read_table(storage / "router" / "output" / "scores.parquet")
    scores = scores.filter(pc.equal(scores["split"], "calib"))
    keys = np.asarray(scores["key"].to_pylist())
    p_compress = scores["p_compress"].to_numpy().astype(np.float32)
    answers = answers_by_rates(storage / "shard" / "output")
    thresholds = [0.2, 0.4, 0.6, 0.8]
    kept = [
        np.mean([1 - np.mean(p_compress[keys == key] >= threshold) / 2 for key in set(keys.tolist())])
        for threshold in thresholds
    ]
    assert kept == sorted(kept) and kept[0] < kept[2] < 1
    for wanted, chosen in ((0.99 * kept[0], 0), (kept[2] - 1e-6, 2), (1.0, 3)):
        config = EVALUATE.model_copy(update={"wanted_quality": wanted, "max_samples": 0})
        choice = threshold_for_quality(config, context, thresholds, answers)
        assert choice["threshold"] == thresholds[chosen] and choice["reached"] == (wanted < 1.0)
        assert choice["quality_kept"] == pytest.approx(kept[chosen], abs=1e-6)
        assert choice["num_samples"] == len(set(keys.tolist()))


def test_calib_tiles_that_the_router_did_not_score_are_scored_for_a_wanted_quality(storage, tmp_path):
    """Without them the quality would be that of another mix of samples: those without tiles all stay."""
    shutil.copytree(storage / "router" / "output", tmp_path / "router")
    scores = pq.read_table(tmp_path / "router" / "scores.parquet")
    calib = sorted(set(scores.filter(pc.equal(scores["split"], "calib"))["key"].to_pylist()))
    unscored = pa.array(calib[::2])
    pq.write_table(
        scores.filter(pc.invert(pc.is_in(scores["key"], unscored))), tmp_path / "router" / "scores.parquet"
    )
    context = context_of(storage, "evaluate", evaluate)
    context.parts = stage_context("evaluate", tmp_path, {}).parts
    context.inputs["router"] = tmp_path / "router"
    config = EVALUATE.model_copy(update={"wanted_quality": 0.5, "max_samples": 0})
    choice = threshold_for_quality(config, context, [0.5], answers_by_rates(storage / "shard" / "output"))
    assert choice["num_samples"] == len(calib)
    computed = pq.read_table(context.parts.output / "calib_scores.parquet")
    assert set(computed["key"].to_pylist()) == set(unscored.to_pylist())


def test_no_threshold_is_chosen_for_a_reference_that_answers_nothing(storage, tmp_path):
    context = context_of(storage, "evaluate", evaluate)
    context.parts = stage_context("evaluate", tmp_path, {}).parts
    with pytest.raises(UserError, match=r"^evaluate\.wanted_quality: the reference answers no calibration"):
        evaluate.run(EVALUATE.model_copy(update={"wanted_quality": 0.9}), context)
    parts = [path.name for path in (context.parts.output / "parts").glob("*")]
    assert parts and all(name.startswith("calib-") for name in parts), "calibration samples come first"


def test_the_last_question_is_asked_with_its_history(storage):
    reader = SampleReader(storage / "shard" / "output", load_prompt_format(storage / "start"))
    predictions = pq.read_table(storage / "evaluate" / "output" / "predictions.parquet")
    by_key = {row["key"]: row for row in predictions.to_pylist()}
    num_turns = []
    for indexed in reader.index.table(["key"]).to_pylist():
        if indexed["key"] in by_key:
            turns = reader.record(indexed["row"])["conversations"]
            num_turns.append(len(turns))
            assert by_key[indexed["key"]]["answer"] == turns[-1]["value"]
            assert by_key[indexed["key"]]["question"] == turns[-2]["value"].replace("<image>", "").strip()
    assert max(num_turns) > 2


def test_tiles_that_the_router_did_not_score_are_scored(storage):
    computed = pq.read_table(storage / "evaluate" / "output" / "scores.parquet")
    from_router = pq.read_table(storage / "router" / "output" / "scores.parquet")
    assert len(computed) and not set(computed["key"].to_pylist()) & set(from_router["key"].to_pylist())
    reader = SampleReader(storage / "shard" / "output", load_prompt_format(storage / "start"))
    model = load_model(storage / "export" / "output" / "model")
    row = {indexed["key"]: indexed["row"] for indexed in reader.index.table(["key"]).to_pylist()}
    first = computed["key"][0].as_py()
    with torch.no_grad():
        features = model.vision_features(torch.from_numpy(reader.sample(row[first]).pixels))
        expected = model.router.compress_probability(features).numpy()
    scores = computed.filter(pc.equal(computed["key"], first))["p_compress"].to_numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_killed_stage_resumes_from_its_parts(storage, tmp_path):
    """The outputs are as after a kill: some parts published, one half written, nothing merged."""
    for stage, module, config in (
        ("ratio", ratio, ratio.RatioConfig(seed=1)),
        ("evaluate", evaluate, EVALUATE),
    ):
        before = storage / stage / "output"
        after = tmp_path / stage / "output"
        (after / "parts").mkdir(parents=True)
        names = sorted(path.name for path in (before / "parts").iterdir())
        kept = names[:-1]
        for name in kept:
            shutil.copy2(before / "parts" / name, after / "parts" / name)
        (after / "parts" / f".{names[-1]}.partial-1").write_bytes(b"half")
        if stage == "evaluate":
            for name in ("scores.parquet", "tiles.parquet"):
                shutil.copy2(before / name, after / name)
        times = {name: (after / "parts" / name).stat().st_mtime_ns for name in kept}
        context = context_of(storage, stage, module, attempt=2)
        context.parts = stage_context(stage, tmp_path, {}, attempt=2).parts
        module.run(config, context)
        assert {name: (after / "parts" / name).stat().st_mtime_ns for name in kept} == times
        merged = "ratios.parquet" if stage == "ratio" else "predictions.parquet"
        a, b = (pq.read_table(folder / merged) for folder in (before, after))
        assert a.schema == b.schema
        for name in a.column_names:
            if pa.types.is_floating(a.schema.field(name).type):
                np.testing.assert_allclose(a[name].to_numpy(), b[name].to_numpy(), rtol=1e-4, atol=1e-7)
            else:
                assert a[name].equals(b[name])


def test_the_exported_folder_contains_policy_and_router(storage):
    folder = storage / "export" / "output" / "model"
    model = load_model(folder)
    policy = load_model(storage / "consistency" / "output" / "policy").state_dict()
    exported = model.state_dict()
    assert all(exported[name].equal(tensor) for name, tensor in policy.items())
    assert {name.split(".")[0] for name in set(exported) - set(policy)} == {"router"}
    evaluation = json.loads((storage / "evaluate" / "output" / "metrics.json").read_text())
    threshold = evaluation["absolute_threshold"]
    table = json.loads((folder / "thresholds.json").read_text())["thresholds"]
    assert [row["threshold"] for row in table if row["is_default"]] == [threshold]
    assert json.loads((folder / "config.json").read_text())["vico"]["absolute_threshold"] == threshold
    card = (folder / "README.md").read_text()
    assert card.count("\n| ") > 6 and f"{threshold:.6g}" in card and str(storage) not in card
    assert load_prompt_format(folder).end_of_turn_id == load_prompt_format(storage / "start").end_of_turn_id
