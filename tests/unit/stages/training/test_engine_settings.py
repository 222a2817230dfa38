"""Which keys a site's DeepSpeed JSON may set."""

from dataclasses import replace

import pytest
import torch

from cluster.train_settings import TrainSettings
from stages.training.engine_settings import EngineSettings, check_engine_settings, offloading
from vico.errors import UserError


def settings(zero_stage: int = 2, dtype: torch.dtype = torch.float32, **deepspeed: object) -> EngineSettings:
    return EngineSettings(
        num_micro_steps=4,
        dtype=dtype,
        grad_clip=1.0,
        betas=(0.9, 0.999),
        zero_stage=zero_stage,
        offload="none",
        deepspeed=deepspeed,
    )


def test_parameters_in_host_memory_need_zero_3():
    assert offloading("parameters", 3).keys() == {"offload_optimizer", "offload_param"}
    with pytest.raises(
        UserError, match=r"train\.memory\.offload=parameters needs train\.memory\.zero_stage=3, it is 2"
    ):
        offloading("parameters", 2)


def test_the_sites_settings_are_merged_under_ours():
    merged = settings(zero_optimization={"reduce_bucket_size": 1000}, wall_clock_breakdown=True).as_dict()
    assert merged["zero_optimization"]["reduce_bucket_size"] == 1000
    assert merged["zero_optimization"]["stage"] == 2
    assert merged["wall_clock_breakdown"] is True
    assert merged["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize(
    ("deepspeed", "named"),
    [
        ({"communication_data_type": "bf16"}, "communication_data_type"),
        ({"gradient_clipping": 0.1}, "gradient_clipping"),
        ({"optimizer": {"type": "Lion"}}, "optimizer"),
        ({"progressive_layer_drop": {"enabled": True}}, "progressive_layer_drop"),
        (
            {"zero_optimization": {"zero_quantized_gradients": True}},
            "zero_optimization.zero_quantized_gradients",
        ),
    ],
)
def test_a_key_that_changes_the_result_is_refused_by_name(deepspeed, named):
    with pytest.raises(UserError, match=rf"train\.deepspeed\.{named} in the site file"):
        settings(**deepspeed).as_dict()


@pytest.mark.parametrize("key", ["aio", "activation_checkpointing"])
def test_a_key_without_effect_is_refused_by_name(key):
    refusal = rf"train\.deepspeed\.{key} in the site file has no effect; .*train\."
    with pytest.raises(UserError, match=refusal):
        settings(**{key: {}}).as_dict()


@pytest.mark.parametrize(
    "site",
    [
        {"memory": {"offload": "parameters"}},
        {"deepspeed": {"zero_optimization": {"stage": 1}}},
        {"deepspeed": {"optimizer": {}}},
        {"deepspeed": {"aio": {}}},
    ],
)
def test_the_driver_refuses_before_a_rank_is_started(site):
    check_engine_settings(TrainSettings())
    with pytest.raises(UserError, match=r"train\."):
        check_engine_settings(TrainSettings.model_validate(site))


def test_two_zero_stages_that_differ_are_refused():
    with pytest.raises(UserError, match=r"stage=3 and train\.memory\.zero_stage=2"):
        settings(zero_optimization={"stage": 3}).as_dict()


def test_a_key_that_the_pipeline_file_sets_is_refused_with_its_name():
    with pytest.raises(UserError, match=r"set optimizer\.gradient_sums of the stage in the pipeline file"):
        settings(communication_data_type="bf16").as_dict()
    sums = [replace(settings(), gradient_sums=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert [setting.as_dict()["communication_data_type"] for setting in sums] == ["fp32", "bf16"]


def test_bfloat16_sums_gradients_in_float32():
    assert settings(dtype=torch.bfloat16).as_dict()["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in settings().as_dict()
