"""Formulas against known answers, enumeration and TRL."""

import inspect
import json
import math
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import TINY

import agentic
import dapo
import grpo
import rlvr_math
import sft
from common import kl
from common.kl import LogitShape, head_logprobs, kl_estimate
from common.tokenizer import Segment, encode_conversation, pack


def close(value, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(value).float(), torch.tensor(expected).float(), atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("shape", [LogitShape(), LogitShape(scale=0.25), LogitShape(scale=2.0, cap=1.5)])
def test_head_in_chunks_equals_full_softmax_with_gradients(shape, monkeypatch):
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(8, 50), torch.randint(50, (37,))
    hidden = torch.randn(37, 8, requires_grad=True)
    upstream = torch.randn(37)
    logits = shape.scale * head(hidden)
    logits = logits if shape.cap is None else shape.cap * (logits / shape.cap).tanh()
    expected = (logits / 0.7).log_softmax(-1)
    (expected.gather(1, targets[:, None])[:, 0] * upstream).sum().backward()
    reference = hidden.grad.clone(), head.weight.grad.clone(), head.bias.grad.clone()
    hidden.grad = None
    head.zero_grad()
    monkeypatch.setattr(kl, "_chunks", lambda hidden, weight: [slice(i, i + 5) for i in range(0, len(hidden), 5)])
    logprobs, entropy = head_logprobs(head, hidden, targets, 0.7, shape)
    (logprobs * upstream).sum().backward()
    torch.testing.assert_close(logprobs, expected.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    for found, wanted in zip((hidden.grad, head.weight.grad, head.bias.grad), reference):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_autocast_rounds_the_factors_of_logits_and_nothing_else(monkeypatch):
    """With factors that are bfloat16 numbers already, log-probabilities, entropies and gradients are float32's."""
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(64, 3000, bias=False), torch.randint(3000, (37,))
    hidden = (4 * torch.randn(37, 64)).bfloat16().float()
    head.weight.data = head.weight.data.bfloat16().float()
    monkeypatch.setattr(kl, "_chunks", lambda hidden, weight: [slice(i, i + 5) for i in range(0, len(hidden), 5)])
    found = {}
    for is_on in (False, True):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            logprobs, entropy = head_logprobs(head, leaf, targets)
            logprobs.sum().backward()
        found[is_on] = logprobs, entropy, leaf.grad
    for plain, rounded, tolerance in zip(*found.values(), (1e-5, 1e-5, 1e-2)):  # the gradient's factors are rounded
        torch.testing.assert_close(rounded, plain, atol=tolerance, rtol=tolerance)


def test_head_never_holds_all_logits():
    """Peak extra memory of scoring does not grow with rows × vocabulary: the saved tensors are small."""
    head, hidden = torch.nn.Linear(4, 30_000, bias=False), torch.randn(2000, 4, requires_grad=True)
    saved = 0

    def pack(tensor):
        nonlocal saved
        saved += tensor.numel() if tensor.data_ptr() != head.weight.data_ptr() else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        head_logprobs(head, hidden, torch.zeros(2000, dtype=torch.long))
    assert saved < 2000 * 30_000 / 100


# ---------------------------------------------------------------------------------------------- KL


@pytest.mark.parametrize("name,mean,in_loss,in_reward", [
    ("k1", 0.130812, 0.0, 0.205990), ("k2", 0.121707, 0.205990, -0.029630), ("k3", 0.130812, 0.25, -0.044010),
])  # fmt: skip
def test_t3_t4_kl_values_and_gradients_by_enumeration(name, mean, in_loss, in_reward):
    """Expectations over samples, whose drawing is not differentiated."""
    z, ref = torch.tensor(math.log(3.0), requires_grad=True), torch.tensor([0.5, 0.5]).log()
    logp = torch.stack([z, torch.zeros(())]).log_softmax(0)
    weight, found = logp.detach().exp(), kl_estimate(logp, ref, name)
    close((weight * found).sum().detach(), mean)
    close(torch.autograd.grad((weight * found).sum(), z, retain_graph=True)[0], in_loss)
    close(torch.autograd.grad((weight * found.detach() * logp).sum(), z, retain_graph=True)[0], in_reward)
    if name == "k3":  # weighted by the ratio to the sampling policy, not detached, k3 has the right gradient too
        ratio = (logp - logp.detach()).exp()
        close(torch.autograd.grad((weight * ratio * kl_estimate(logp, ref, name)).sum(), z)[0], 0.205990)


# ---------------------------------------------------------------------------------------------- sft


def test_sft_detail_6_neftune_uses_each_documents_length():
    noise = sft.neftune_noise(torch.tensor([1] * 200 + [100] * 200), 64, 10.0)
    assert noise.shape == (400, 64) and float(noise[:200].abs().max()) == pytest.approx(10 / 8, rel=0.05)
    assert float(noise[200:].abs().max()) == pytest.approx(10 / 80, rel=0.05)


def test_sft_detail_5_training_order_mixes_by_weight_and_extends():
    close(sft.mixture_weights([100, 3000, 30_000], 3000), [0.0164, 0.4918, 0.4918], 1e-4)
    long = sft.training_order([10, 1000], torch.tensor([0.25, 0.75]), 4000, seed=1)
    assert torch.equal(long[:1000], sft.training_order([10, 1000], torch.tensor([0.25, 0.75]), 1000, seed=1))
    assert float((long < 10).float().mean()) == pytest.approx(0.25, abs=0.03)
    first = long[long < 10][:20].tolist()  # the small set comes round and round, each time in another order
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10)) and first[:10] != first[10:]
    single = sft.training_order([7], torch.ones(1), 14, seed=3).tolist()
    assert sorted(single[:7]) == sorted(single[7:]) == list(range(7))


# ---------------------------------------------------------------------------------------------- grpo, dapo, rlvr_math


def test_agentic_detail_6_agentic_detail_7_the_mathematics_of_dapo_and_agentic_is_that_of_grpo():
    for module, names in (
        (dapo, ("group_advantages", "aggregate", "policy_loss")),
        (agentic, ("group_advantages", "aggregate")),
    ):
        for name in names:
            assert inspect.getsource(getattr(module, name)) == inspect.getsource(getattr(grpo, name))
    new, old, _, advantages, mask = random_rollout()
    ours = agentic.clipped_loss(new, old, advantages[:, None], mask, 0.2, 0.3)
    assert all(map(torch.equal, ours, grpo.policy_loss(new, old, advantages[:, None], mask, "ppo", 0.2, 0.3)))


def test_t21_grpo_detail_1_rlvr_math_detail_1_advantages():
    rewards, equal = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.full((3, 8), 0.1)
    expected = {"grpo": [1.5, -0.5, -0.5, -0.5], "dr_grpo": [0.75, -0.25, -0.25, -0.25]}
    expected |= {"rloo": [1, -1 / 3, -1 / 3, -1 / 3], "reinforce": [1, 0, 0, 0], "expert_iteration": [1, 0, 0, 0]}
    for name, (advantage, *_) in rlvr_math.ALGORITHMS.items():
        close(advantage(rewards), [expected[name]], 1e-4)
        if name in ("grpo", "dr_grpo", "rloo"):
            close(grpo.group_advantages(rewards, name), [expected[name]], 1e-4)
            assert not advantage(equal).any() and not grpo.group_advantages(equal, name).any()


def test_t22_aggregation():
    losses = torch.tensor([[1.0, 9.0, 9.0], [2.0, 2.0, 2.0]])
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    for how, expected in (("sequence", 1.5), ("token", 1.75), ("constant", 0.875), ("completion", 3.5)):
        for aggregate in (grpo.aggregate, rlvr_math.mean_loss)[how == "completion" :]:
            parts = [aggregate(losses[i : i + 1], mask[i : i + 1], how, 2, 4, 4) for i in range(2)]
            close([aggregate(losses, mask, how, 2, 4, 4), sum(parts)], [expected] * 2)


def test_t25_dapo_detail_13_soft_overlong_punishment():
    lengths = torch.tensor([1, 16384, 18432, 20480, 20481])
    close(dapo.overlong_punishment(lengths, 20480, 4096), [0, 0, -0.5, -1, -1])
    close(dapo.overlong_punishment(lengths, 20480, 0), [0, 0, 0, 0, 0])


def test_cispo_keeps_the_gradient_of_every_token():
    """−sg(min(ρ, 1+ε))·A·log π: a ratio beyond the bound weighs less, and is not silenced as PPO's would be."""
    logprobs = torch.tensor([[1.5], [0.5]]).log().requires_grad_(True)
    losses, ratio = grpo.policy_loss(logprobs, torch.zeros(2, 1), torch.ones(2, 1), torch.ones(2, 1), "cispo", 0.2, 0.2)
    close(torch.autograd.grad(losses.sum(), logprobs)[0], [[-1.2], [-0.5]])
    close(ratio, [[1.5], [0.5]])


def of_grpo(name: str, aggregation: str, new, old, advantages, mask, *counts, clip_high=0.2):
    losses, _ = grpo.policy_loss(new, old, advantages, mask, "ppo", 0.2, clip_high)
    return grpo.aggregate(losses, mask, aggregation, *counts)


def of_rlvr_math(name: str, aggregation, new, old, advantages, mask, *counts, clip_high=0.2):
    _, ratio, mean_over = rlvr_math.ALGORITHMS[name]
    losses, _ = rlvr_math.token_losses(new, old, advantages, mask, ratio, 0.2, clip_high)
    return rlvr_math.mean_loss(losses, mask, mean_over, *counts)


@pytest.mark.parametrize("loss_of,name,aggregation,share", [
    (of_grpo, "rloo", "sequence", 1), (of_grpo, "rloo", "token", 1), (of_grpo, "dr_grpo", "constant", 0.5),
    (of_rlvr_math, "reinforce", None, 1), (of_rlvr_math, "rloo", None, 1), (of_rlvr_math, "dr_grpo", None, 0.5),
])  # fmt: skip
def test_policy_gradients_by_enumeration(loss_of, name, aggregation, share):
    """Over every group of 2 single-token completions: reinforce and rloo are unbiased, dr_grpo (G − 1)/G of it."""
    z, rewards = torch.tensor([0.3, -0.2, 0.1], requires_grad=True), torch.tensor([1.0, 0.0, 0.5])
    total, weight = torch.zeros(3), z.detach().softmax(0)
    for a in range(3):
        for b in range(3):
            logprobs, group = z.log_softmax(0)[torch.tensor([[a], [b]])], rewards[torch.tensor([[a, b]])]
            advantages = grpo.group_advantages(group, name) if aggregation else rlvr_math.ALGORITHMS[name][0](group)
            arguments = (logprobs, logprobs.detach(), advantages.view(2, 1), torch.ones(2, 1), 2, 2, 1)
            gradient = torch.autograd.grad(loss_of(name, aggregation, *arguments), z)[0]
            total -= weight[a] * weight[b] * gradient
    truth = torch.autograd.grad((z.softmax(0) * rewards).sum(), z)[0]
    torch.testing.assert_close(total, share * truth, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- parity with TRL


def trl_grpo_loss(new, old, ref, advantages, mask, beta: float, surrogate: str, loss_type: str):
    """TRL's own `_compute_loss` on given tensors [B, T], clipped to 1−0.2 and 1+0.28, budget 12 tokens."""
    from trl import GRPOTrainer

    rows, width = mask.shape
    trainer = MagicMock()
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (new, torch.zeros(rows, width), None)
    trainer.beta, trainer.epsilon_low, trainer.epsilon_high = beta, 0.2, 0.28
    trainer.importance_sampling_level = "sequence" if surrogate == "gspo" else "token"
    trainer.loss_type = loss_type
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.use_vllm, trainer.max_completion_length, trainer.aux_loss_enabled = False, 12, False
    trainer.use_adaptive_entropy = trainer._entropy_bonus_enabled = False
    trainer.current_gradient_accumulation_steps, trainer.model.training = 1, True
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, num_loss_aggregations=None)
    trainer.args.steps_per_generation = 1
    trainer.accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    inputs = {
        "prompt_ids": torch.zeros(rows, 2, dtype=torch.long), "prompt_mask": torch.ones(rows, 2),
        "completion_ids": torch.zeros(rows, width, dtype=torch.long), "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


def random_rollout():
    """New and old log-probabilities, those of a reference, all [6, 9], advantages [6] and a mask."""
    torch.manual_seed(1)
    old = -torch.rand(6, 9) - 0.1
    new = (old + 0.4 * torch.randn(6, 9)).requires_grad_(True)
    ref, advantages = old + 0.2 * torch.randn(6, 9), torch.randn(6)
    return new, old, ref, advantages, (torch.arange(9) < torch.tensor([9, 3, 1, 7, 5, 9])[:, None]).float()


def same_loss_and_gradient(loss, expected, new):
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(value, new, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("ours,theirs", [("sequence", "grpo"), ("constant", "dr_grpo"), ("token", "bnpo")])
@pytest.mark.parametrize("surrogate", ["ppo", "gspo"])
def test_t15_t23_t24_grpo_detail_6_dapo_detail_9_parity_with_trl_grpo_loss(ours, theirs, surrogate):
    """The two-sided clip and k3 included."""
    new, old, ref, advantages, mask = random_rollout()
    losses, ratio = grpo.policy_loss(new, old, advantages[:, None], mask, surrogate, 0.2, 0.28)
    for sign in (-1, 1) if surrogate == "ppo" else ():  # both bounds bind for both signs
        assert all(((advantages[:, None] * sign > 0) & (mask > 0) & out).any() for out in (ratio > 1.28, ratio < 0.8))
    losses = losses + 0.04 * kl.kl_estimate(new, ref, "k3")
    loss = grpo.aggregate(losses, mask, ours, 6, float(mask.sum()), 12)
    same_loss_and_gradient(loss, trl_grpo_loss(new, old, ref, advantages, mask, 0.04, surrogate, theirs), new)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_parity_of_rlvr_math_with_trl_grpo_losses(name):
    new, old, ref, advantages, mask = random_rollout()
    loss = of_rlvr_math(name, None, new, old, advantages[:, None], mask, 6, float(mask.sum()), 12, clip_high=0.28)
    same_loss_and_gradient(loss, trl_grpo_loss(new, old, ref, advantages, mask, 0.0, "ppo", name), new)


def test_parity_with_trl_rloo_loss():
    from trl import RLOOTrainer

    new, old, _, advantages, mask = random_rollout()
    trainer = MagicMock()
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (new, torch.zeros(6, 9), None)
    trainer.epsilon_low, trainer.epsilon_high, trainer.beta, trainer.aux_loss_enabled = 0.2, 0.2, 0.0, False
    trainer.model.training = True
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    trainer.accelerator.reduce = lambda x, reduction: x
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    inputs = {
        "prompt_ids": torch.zeros(6, 2, dtype=torch.long), "prompt_mask": torch.ones(6, 2),
        "completion_ids": torch.zeros(6, 9, dtype=torch.long), "completion_mask": mask, "advantages": advantages,
        "old_logps": (old * mask).sum(1),
    }  # fmt: skip
    expected = RLOOTrainer._compute_loss(trainer, trainer.model, inputs)
    ratio = (((new - old) * mask).sum(1)).exp()
    assert (ratio > 1.2).any() and (ratio < 0.8).any()  # the clip has something to do
    loss = of_rlvr_math("rloo", None, new, old, advantages[:, None], mask, 6, float(mask.sum()), 12)
    same_loss_and_gradient(loss, expected, new)


def test_parity_with_trl_sft_trainer(tmp_path, tokenizer, model):
    """TRL's own batch, masks and loss on demonstrations against ours, from the rows to the number."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in (TINY / "demonstrations_train.jsonl").read_text().splitlines()[:5]]
    data = Dataset.from_list([{"prompt": r["prompt"], "completion": r["completion"]} for r in rows])
    config = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=5, use_cpu=True, bf16=False, report_to="none"
    )
    trainer = SFTTrainer(str(TINY), args=config, train_dataset=data)
    batch = next(iter(trainer.get_train_dataloader()))
    count = int((batch["labels"][:, 1:] != -100).sum())
    expected = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(count))
    segments = [encode_conversation(tokenizer, dict(row), 512, "assistant") for row in rows]
    logprobs, _ = kl.token_logprobs(model, pack([Segment(s["ids"], s["mask"]) for s in segments]))
    assert len(logprobs) == count
    close(sft.sft_loss(logprobs, count).detach(), expected.item())
