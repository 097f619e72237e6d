"""Adapters: what is trained, what the reference and the sampler see of them, and what a run leaves."""

import sys

import pytest
import torch
from conftest import TINY, first_rows, same, weights
from peft import PeftModel
from test_core import quick
from transformers import AutoModelForCausalLM

import grpo
from common import kl
from common.generation import Sampler
from common.tokenizer import Segment, pack

IDS = [5, 9, 8, 30, 31, 7]


def logprobs_of(model) -> torch.Tensor:
    with torch.no_grad():
        return kl.token_logprobs(model, pack([Segment(IDS, [True] * len(IDS))]))[0]


def test_adapters_alone_are_trained_and_the_reference_is_the_policy_without_them(model):
    plain, adapted = logprobs_of(model), kl.load_model(str(TINY), "cpu", lora_rank=4)
    assert torch.equal(logprobs_of(adapted), plain)  # at first they change nothing
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * sum(isinstance(m, torch.nn.Linear) for m in model.model.modules())
    assert all(".lora_" in name for name in trained) and kl.supports_layout(adapted)
    with torch.no_grad():
        for name in trained:
            if ".lora_B." in name:
                adapted.get_parameter(name).normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    reference, before = kl.frozen(adapted, "cpu", 1), logprobs_of(adapted)
    assert torch.equal(logprobs_of(reference), plain) and reference.config is adapted.config
    assert torch.equal(logprobs_of(adapted), before) and (before - plain).abs().max() > 0.05
    assert trained == [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    other = kl.frozen(adapted, "cpu", 1, str(TINY))  # a reference that is named is loaded
    assert torch.equal(logprobs_of(other), plain) and not hasattr(other, "peft_config")
    ((sample,),) = Sampler(adapted, [0]).generate([IDS], 12)  # draws from merged weights
    scores, _ = kl.completion_logprobs(adapted, [0], [IDS], [sample.ids])
    torch.testing.assert_close(scores[0].detach(), torch.tensor(sample.logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_leaves_a_merged_model_and_an_adapter_that_peft_reads(dtype, tmp_path):
    row = quick("grpo", tmp_path, lora_rank=2, beta=0.1, dtype=dtype, learning_rate=1e-2, warmup_steps=0, batch_size=8,
                num_samples=4, advantage="dr_grpo")  # fmt: skip
    assert abs(row["policy/kl"]) < 1e-9 and row["optim/grad_norm"] > 0
    merged, base = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path / "model", TINY)
    )
    merged, before = merged.state_dict(), base.state_dict()
    changed = " ".join(name for name, weight in merged.items() if not torch.equal(weight, before[name]))
    assert "q_proj" in changed and "down_proj" in changed
    read = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    same(merged, read.state_dict(), 1e-6 if dtype == "float32" else 0.02)
    held = sum(path.stat().st_size for path in next((tmp_path / "checkpoints").iterdir()).iterdir())
    assert held < 0.6 * (tmp_path / "model" / "model.safetensors").stat().st_size  # no frozen weights


@pytest.mark.parametrize("script,changes", [
    ("dapo", {"dynamic_sampling": False}), ("rlvr_math", {}), ("agentic", {}),
    ("dpo", {"iterations": 0, "dataset": str(first_rows("preferences_train.jsonl", 40))}),
])  # fmt: skip
def test_the_scripts_that_the_tests_of_resuming_leave_out_train_adapters(script, changes, tmp_path):
    quick(script, tmp_path, lora_rank=2, **changes)
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert not any("lora" in name for name in weights(tmp_path))


def test_the_learning_rate_is_ten_times_the_default_unless_it_is_given(monkeypatch):
    for flags, rate in ((["--lora-rank", "8"], 3e-3), (["--lora_rank=8"], 3e-3), (["--lora-rank", "0"], 3e-4),
                        (["--lora-rank", "8", "--learning-rate", "1e-5"], 1e-5)):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["grpo.py", *flags])
        assert grpo.parse_args(grpo.Args, grpo.EMBEDDED).learning_rate == pytest.approx(rate)
