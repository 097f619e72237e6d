"""Any ordinary model: tiny random ones of many architectures through sft, grpo and dpo, and through the sampler."""

import pytest
import torch
import transformers
from conftest import TINY, fails, first_rows, metrics, same, weights
from test_common import check_sampler, logprobs_alone
from test_core import quick

from common import kl
from common.generation import Sampler
from common.kl import has_known_logits, supports_layout, token_logprobs, use_layout
from common.tokenizer import Segment, load_tokenizer, pack, pack_completions

VOCABULARY = len(load_tokenizer(str(TINY)))
SIZES = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0}
COMMON = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
# Biases, untied heads, scaled positions, windows shorter than a prompt, partial rotation, experts, shaped logits.
ARCHITECTURES = {
    "Llama": {**COMMON, "rope_parameters": ROPE, "attention_bias": True, "mlp_bias": True},
    "Qwen2": {**COMMON, "tie_word_embeddings": True},
    "Qwen3": {**COMMON, "head_dim": 16},
    "Gemma3": {**COMMON, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
               "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {**COMMON, "sliding_window": None, "partial_rotary_factor": 0.5},
    "Mistral": {**COMMON, "sliding_window": 4},
    "Olmo2": COMMON,
    "GPT2": {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "Qwen3Moe": {**COMMON, **EXPERTS},
    "Granite": {**COMMON, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "Cohere": {**COMMON, "logit_scale": 0.25},
}  # fmt: skip
FALLS_BACK = {
    "Gemma2": {**COMMON, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "GptOss": {**COMMON, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "Bamba": {**COMMON, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "DeepseekV3": {**COMMON, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
                   "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 2},
    "Qwen2Moe": {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 24, "use_sliding_window": True,
                 "sliding_window": 4, "max_window_layers": 2},  # its masks alone know of the window
    "Mamba": {**SIZES, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
}  # fmt: skip
SHORT = {
    "sft": {"dataset": (str(first_rows("demonstrations_train.jsonl", 24)),)},
    "grpo": {"dataset": str(first_rows("maths_train.jsonl", 24)), "num_samples": 8, "reference": str(TINY), "beta": 1},
    "dpo": {"dataset": str(first_rows("preferences_train.jsonl", 24)), "max_completion_tokens": 24},
}


def build(kind: str):
    """A random model of that architecture, its norms and biases moved off their starting values, in which they hide."""
    torch.manual_seed(0)
    name = {"GPT2": "GPT2LMHeadModel", "Gemma3": "Gemma3ForCausalLM"}.get(kind, f"{kind}ForCausalLM")
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    model = getattr(transformers, name)(config(**{**ARCHITECTURES, **FALLS_BACK}[kind])).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_samples_and_packed_rows_score_as_transformers_scores_them(kind, sharing):
    model = build(kind)
    document = torch.randint(VOCABULARY, (20,)).tolist()
    expected = logprobs_alone(model, document)  # by transformers' own attention and head
    assert has_known_logits(model)
    use_layout(model)
    assert supports_layout(model)
    found, _ = token_logprobs(model, pack([Segment(document[:9], [True] * 9), Segment(document, [True] * 20)]))
    torch.testing.assert_close(found.detach()[-19:], expected, atol=1e-5, rtol=1e-4)
    check_sampler(model, Sampler(model, [0]), [document[:7], document[3:5]], 12)


@pytest.mark.parametrize("kind", FALLS_BACK)
def test_models_without_plain_attention_fall_back_to_generate(kind, capsys):
    model, prompt = build(kind), [5, 6, 7]
    use_layout(model)
    sampler = Sampler(model, [0])
    assert "model.generate instead" in capsys.readouterr().err
    check_sampler(model, sampler, [prompt, [8, 9]], 6)
    for temperature, samples in ((0.7, 2), (0.0, 1)):
        for completion in sampler.generate([prompt], 6, samples, temperature)[0]:
            ids = torch.tensor(completion.ids)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion.ids]), use_cache=False).logits[0, 2:-1].double()
            expected = (logits / (temperature or 1)).log_softmax(-1).gather(1, ids[:, None])[:, 0].float()
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-4)
            assert temperature or torch.equal(ids, logits.argmax(-1))
    completions = [[3, 4, 5], [6, 7]]
    found, _ = token_logprobs(model, pack_completions([prompt] * 2, completions))
    expected = torch.cat([logprobs_alone(model, prompt + c)[2:] for c in completions])
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-5)


def saved(kind: str, folder, tokenizer):
    build(kind).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("script,kind", [
    ("dpo", "Gemma3"), ("sft", "Phi3"), ("grpo", "GPT2"), ("dpo", "GPT2"), ("sft", "Qwen3Moe"), ("grpo", "Granite"),
    ("sft", "Bamba"), ("grpo", "Gemma2"), ("dpo", "Gemma2"),
])  # fmt: skip
def test_two_steps_with_any_model(script, kind, tmp_path, tokenizer, capsys):
    start = str(saved(kind, tmp_path / "start", tokenizer))
    quick(script, tmp_path / "run", model=start, steps=2, warmup_steps=1, **SHORT[script])
    assert ("model.generate instead" in capsys.readouterr().err) == (kind in FALLS_BACK)
    first, last = metrics(tmp_path / "run")[1:]
    assert first["optim/grad_norm"] > 0 and last["step"] == 2 and first.get("policy/sampler_gap", 0) < 1e-5
    before, after = weights(tmp_path / "start"), weights(tmp_path / "run")
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)


def test_what_a_model_cannot_do_is_told(tmp_path, tokenizer, capsys, monkeypatch):
    flags = ["--dataset", TINY / "demonstrations_test.jsonl", "--model", saved("Gemma2", tmp_path, tokenizer)]
    assert "those of this gemma2 model are padded" in fails("sft", *flags, processes=2)
    kl.load_model(str(saved("Qwen3Moe", tmp_path / "moe", tokenizer)), "cpu")
    assert "load-balancing loss" in capsys.readouterr().out
    monkeypatch.setattr(kl, "logit_shape", lambda model: kl.PLAIN)
    with pytest.raises(SystemExit, match="GraniteForCausalLM makes its logits in a way"):
        kl.load_model(str(saved("Granite", tmp_path / "granite", tokenizer)), "cpu")


def test_the_samplers_copy_has_the_buffers_of_the_model():
    """The biases by which a router chooses its experts are no parameters."""
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 24, "head_dim": 8,
             "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}  # fmt: skip
    model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**COMMON, **sizes)).eval()
    sampler = Sampler(model, [0], torch.bfloat16)
    biases = {name: buffer.normal_() for name, buffer in model.named_buffers() if "bias" in name}
    sampler.sync()
    copied = dict(sampler.model.named_buffers())
    same(biases, {name: copied[name].float() for name in biases}, 0.02)
    assert len(biases) == 2


@pytest.mark.parametrize("rope,longest", [
    ({"rope_type": "default", "rope_theta": 1e4}, 256),
    ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}, 128),
    ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4,
      "original_max_position_embeddings": 64}, 64),
])  # fmt: skip
def test_rotations_that_change_with_the_longest_text_limit_the_context(rope, longest, tmp_path):
    """Beyond that length a text's log-probabilities would depend on what else is in its batch."""
    transformers.LlamaConfig(**COMMON, rope_parameters=rope).save_pretrained(tmp_path / "llama")
    transformers.MambaConfig(**FALLS_BACK["Mamba"]).save_pretrained(tmp_path / "mamba")
    assert kl.context_length(str(tmp_path / "llama")) == longest
    assert kl.context_length(str(tmp_path / "mamba")) > 10**9
