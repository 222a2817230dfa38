"""The parity test on cases of our own: sizes, norms, biases, heads and language models that the golden case
lacks.

They run with the same command as the golden folder, and a case with one wrong number fails.
"""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from tests.numerics import test_published_parity
from tests.numerics.published_cases import Case, write_case

TEST = Path(__file__).with_name("test_published_parity.py")
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
CASES = {
    "rms_norm_qk_norm_no_bias": Case(
        vision={"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
    ),
    # the published q/k norm also takes its epsilon from the config
    "rms_norm_qk_norm_coarse_epsilon": Case(
        vision={"norm_type": "rms_norm", "qk_normalization": True, "layer_norm_eps": 1e-3}
    ),
    "layer_norm_qk_norm": Case(vision={"qk_normalization": True, "num_hidden_layers": 3}, relative=0.5),
    "tied_head_other_sizes": Case(
        tied=True,
        vision={"hidden_size": 96, "num_attention_heads": 6, "image_size": 168, "qkv_bias": False},
        text={"hidden_size": 64, "num_hidden_layers": 3, "head_dim": 24},
        tiles=(1, 3, 1),
    ),
    "qwen2": Case(architecture="Qwen2ForCausalLM"),
    "qwen2_tied_one_tile": Case(architecture="Qwen2ForCausalLM", tied=True, tiles=(1,)),
    "llama": Case(
        architecture="LlamaForCausalLM",
        text={"attention_bias": True, "mlp_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    # dynamic scaling changes nothing up to the length that the model was made for
    "internlm2": Case(
        architecture="InternLM2ForCausalLM",
        text={"bias": False, "rms_norm_eps": 1e-5, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "internlm2_biases_one_key_head": Case(
        architecture="InternLM2ForCausalLM",
        text={"bias": True, "rms_norm_eps": 1e-3, "num_attention_heads": 6, "num_key_value_heads": 1},
        tiles=(1, 3),
    ),
    "internlm3": Case(
        architecture="InternLM3ForCausalLM",
        text={"bias": True, "qkv_bias": True, "head_dim": 16, "rms_norm_eps": 1e-5},
    ),
    "mixture_of_experts": Case(architecture="Qwen3MoeForCausalLM", text=MOE, tiles=(5,)),
}


def parity(root: Path) -> tuple[int, str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(TEST),
        "--golden",
        str(root),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TEST.parents[2])
    return done.returncode, done.stdout


def test_every_case_passes_and_a_wrong_one_fails(tmp_path):
    for number, (name, case) in enumerate(CASES.items()):
        write_case(tmp_path / name, replace(case, seed=number))
    wrong = shutil.copytree(tmp_path / "qwen2", tmp_path / "wrong")
    expected = load_file(wrong / "expected.safetensors")
    expected["v64"][0, 0, 0] += 1e-3
    save_file(expected, wrong / "expected.safetensors")
    code, output = parity(tmp_path)
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert code == 1 and len(failed) == 1 and "test_both_connectors[wrong]" in failed[0], output
    assert f"1 failed, {6 * (len(CASES) + 1) - 1} passed" in output, output


def test_a_folder_without_cases_is_an_error(tmp_path):
    """Call the hook of the parity test with an empty folder, as pytest does, without a process."""
    config = SimpleNamespace(getoption=lambda name: str(tmp_path))
    asked = SimpleNamespace(fixturenames=["folder"], config=config)
    with pytest.raises(pytest.UsageError, match=f"--golden {tmp_path}: no folder with a case.json"):
        test_published_parity.pytest_generate_tests(asked)
