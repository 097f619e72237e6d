"""What only a GPU can break: `pytest -m cuda`. Without one, `REHEARSE=1 pytest -m cuda` plays it on the CPU."""

import copy
import os

import pytest
import torch
from conftest import TINY, metrics, weights
from test_common import CALLS, drawn, some_prompts
from test_core import MODULES, quick
from test_models import build

from common import kl
from common.generation import Sampler
from common.tokenizer import stop_token_ids

pytestmark = pytest.mark.cuda


@pytest.fixture()
def device(request) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not os.environ.get("REHEARSE"):
        pytest.skip("no GPU here; with REHEARSE=1 the CPU plays one")
    request.getfixturevalue("graphs_on_a_cpu")
    return torch.device("cpu")


@torch.no_grad()
def gaps(model, prompts, groups) -> torch.Tensor:
    """How far each token's log-probability is from that of a plain forward of transformers over one text."""
    found = []
    for prompt, group in zip(prompts, groups):
        for completion in group:
            ids = torch.tensor([prompt + completion.ids], device=model.device)
            logprobs = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
            found.append((torch.tensor(completion.logprobs) - expected).abs())
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_score_as_a_fresh_forward_scores_them(dtype, device, tokenizer):
    sampler = Sampler(kl.load_model(str(TINY), device), stop_token_ids(tokenizer), dtype)
    found = gaps(copy.deepcopy(sampler.model).float(), some_prompts(tokenizer) * 8,
                 sampler.generate(some_prompts(tokenizer) * 8, 60, 4, seed=1))  # fmt: skip
    assert found.max() < 1e-4 if dtype == torch.float32 else found.mean() < 0.02 and found.max() < 0.5


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Gemma3", "GPT2", "Gemma2"])
def test_other_models_score_as_a_fresh_forward_scores_them(kind, device):
    """Experts, windows, no rotations; and Gemma 2 from `model.generate`."""
    model, prompts = build(kind).to(device), [[5, 6, 7, 8, 9, 10], [8, 9]]
    plain = copy.deepcopy(model)
    kl.use_layout(model)
    sampler = Sampler(model, [0])
    assert sampler.is_served == (kind != "Gemma2")
    for temperature, samples in ((1.0, 3), (0.0, 1)):
        assert gaps(plain, prompts, sampler.generate(prompts, 20, samples, temperature)).max() < 1e-3


def test_a_gpu_draws_the_samples_of_a_cpu_with_graphs_and_without_whatever_it_drew_before(device, tokenizer):
    """One shape after the other, also where rows wait for memory."""
    graphs, plain, cpu = (Sampler(kl.load_model(str(TINY), where), [37]) for where in (device, device, "cpu"))
    plain.can_capture = cpu.uses_graphs = False
    expected, *found = [[drawn(sampler, tokenizer, *call) for call in CALLS] for sampler in (cpu, graphs, plain)]
    assert found == [expected] * 2 and graphs.can_capture and graphs.slots.graphs and not plain.slots.graphs
    graphs.memory_gb, graphs.slots = 5.5 * graphs.slots.keys[:, :1].nbytes * 2 / 1e9, None
    assert [drawn(graphs, tokenizer, *call) for call in CALLS] == expected and graphs.slots.capacity == 5


def test_an_agents_turns_go_on_from_kept_keys_and_values(device, tokenizer):
    model, prompts = kl.load_model(str(TINY), device), some_prompts(tokenizer)
    sampler = Sampler(model, stop_token_ids(tokenizer))
    for turn in range(3):
        groups = sampler.generate(prompts, [20, 9, 14], seed=turn, keep=True)
        assert gaps(model, prompts, groups).max() < 1e-4 and len(sampler.kept) == 3
        prompts = [prompt + group[0].ids + [13 + turn, 20] for prompt, group in zip(prompts, groups)]


def test_memory_after_an_evaluation_is_within_the_bound_and_then_free(device, tokenizer):
    prompts, bound = [[*prompt, 13 + i] for i, prompt in enumerate(some_prompts(tokenizer) * 20)], 0.03e9

    def evaluate(sampler) -> None:
        for temperature in (1.0, 0.0):
            sampler.generate(prompts, 100, 4, temperature, keep=True)

    def allocated() -> int:
        torch.cuda.synchronize() if device.type == "cuda" else None
        return torch.cuda.memory_allocated() if device.type == "cuda" else 0

    model = kl.load_model(str(TINY), device)
    evaluate(Sampler(model, [37], torch.bfloat16, bound / 1e9))  # libraries take their workspaces
    before = allocated()
    sampler = Sampler(model, [37], torch.bfloat16, bound / 1e9)
    evaluate(sampler)
    slots = sampler.slots
    kept = sum(memory.nbytes for memory in sampler.kept.values())
    assert 0 < kept and 1 < slots.capacity < 240 and slots.keys.nbytes + slots.values.nbytes + kept <= bound
    assert allocated() - before <= bound + 20e6  # the copy of the weights, samples, what graphs hold
    del sampler, slots
    assert allocated() - before < 1e6


@pytest.mark.parametrize("script", MODULES)
def test_a_training_step_in_bfloat16(script, device, tmp_path):
    more = {"batch_size": 8, "num_samples": 4} if hasattr(MODULES[script].EMBEDDED, "minibatches") else {}
    more |= {"ppo": {"reward_model": None}, "agentic": {"max_completion_tokens": 96}}.get(script, {})  # room for a call
    found = {}
    for where, dtype in ((device, "bfloat16"), ("cpu", "float32")):
        quick(script, tmp_path / dtype, device=str(where), dtype=dtype, warmup_steps=0, **more)
        found[dtype] = metrics(tmp_path / dtype)[-1]
        assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / dtype).values())
        assert found[dtype]["optim/grad_norm"] > 0
    assert found["bfloat16"].get("policy/sampler_gap", 0) < 0.05
    if not more:  # the same rows
        assert found["bfloat16"]["optim/grad_norm"] == pytest.approx(found["float32"]["optim/grad_norm"], rel=0.03)
