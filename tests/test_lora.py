"""Adapters: what is trained, what the reference and the sampler see of them, and what a run leaves."""

import sys

import pytest
import torch
from conftest import TINY, same, weights
from peft import PeftModel
from test_core import MODULES, quick
from transformers import AutoModelForCausalLM

import grpo
from common import kl
from common.generation import Sampler
from common.tokenizer import Segment, pack

IDS = [5, 9, 8, 30, 31, 7]


def adapted(rank: int = 4, **settings):
    """The embedded model with adapters that change what it computes."""
    model = kl.load_model(str(TINY), "cpu", lora_rank=rank, **settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def logprobs_of(model) -> torch.Tensor:
    with torch.no_grad():
        return kl.token_logprobs(model, pack([Segment(IDS, [True] * len(IDS))]))[0]


def test_adapters_alone_are_trained_and_at_first_change_nothing():
    plain, model = kl.load_model(str(TINY), "cpu"), kl.load_model(str(TINY), "cpu", lora_rank=4)
    assert torch.equal(logprobs_of(plain), logprobs_of(model))
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    layers = sum(isinstance(m, torch.nn.Linear) for m in plain.model.modules())
    assert len(trained) == 2 * layers and all(".lora_" in name for name in trained)
    first, second = (layer.lora_A["default"].weight for layer in (model.model.layers[0].mlp.up_proj,) * 2)
    assert torch.equal(first, second) and kl.supports_layout(model)


def test_the_reference_is_the_policy_without_adapters_and_leaves_them_on():
    plain, model = kl.load_model(str(TINY), "cpu"), adapted()
    reference, before = kl.frozen(model, "cpu", 1), logprobs_of(model)
    assert torch.equal(logprobs_of(reference), logprobs_of(plain)) and reference.config is model.config
    assert torch.equal(logprobs_of(model), before) and (before - logprobs_of(plain)).abs().max() > 0.05
    assert all(weight.requires_grad == (".lora_" in name) for name, weight in model.named_parameters())
    other = kl.frozen(model, "cpu", 1, str(TINY))  # a reference that is named is loaded
    assert torch.equal(logprobs_of(other), logprobs_of(plain)) and not hasattr(other, "peft_config")


def test_the_sampler_draws_from_merged_weights():
    model = adapted()
    ((sample,),) = Sampler(model, [0]).generate([IDS], 12)
    scores, _ = kl.completion_logprobs(model, [0], [IDS], [sample.ids])
    torch.testing.assert_close(scores[0].detach(), torch.tensor(sample.logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_leaves_a_merged_model_and_an_adapter_that_peft_reads(dtype, tmp_path):
    row = quick("grpo", tmp_path, lora_rank=2, beta=0.1, dtype=dtype, learning_rate=1e-2, warmup_steps=0, batch_size=8,
                num_samples=4, advantage="dr_grpo")  # fmt: skip
    assert abs(row["policy/kl"]) < 1e-9 and row["optim/grad_norm"] > 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert not {*merged.state_dict()} ^ {*base.state_dict()}
    changed = [name for name, weight in merged.state_dict().items() if not torch.equal(weight, base.state_dict()[name])]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} >= {"q_proj", "down_proj"}
    read = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    same(merged.state_dict(), read.state_dict(), 1e-6 if dtype == "float32" else 0.02)
    held = sum(path.stat().st_size for path in next((tmp_path / "checkpoints").iterdir()).iterdir())
    assert held < 0.6 * (tmp_path / "model" / "model.safetensors").stat().st_size  # no frozen weights


@pytest.mark.parametrize("script", MODULES)
def test_every_script_trains_adapters(script, tmp_path):
    changes = {"ppo": {"reward_model": None}, "dapo": {"dynamic_sampling": False}, "dpo": {"iterations": 0}}
    row = quick(script, tmp_path, lora_rank=2, **changes.get(script, {}))
    assert row["optim/grad_norm"] >= 0 and (tmp_path / "adapter" / "adapter_config.json").exists()
    assert not any("lora" in name for name in weights(tmp_path))


def test_the_learning_rate_is_ten_times_the_default_unless_it_is_given(monkeypatch):
    def parsed(*flags):
        monkeypatch.setattr(sys, "argv", ["grpo.py", *flags])
        return grpo.parse_args(grpo.Args, grpo.EMBEDDED)

    usual = grpo.EMBEDDED.learning_rate
    assert parsed("--lora-rank", "8").learning_rate == parsed("--lora_rank=8").learning_rate == 10 * usual
    assert parsed("--lora-rank", "0").learning_rate == usual
    assert parsed("--lora-rank", "8", "--learning-rate", "1e-5").learning_rate == 1e-5
