"""Formulas against known answers, enumeration and TRL. T1, T2, … in names are known cases; details are a script's."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY

import dapo
import grpo
import rlvr_math
import sft
from common import kl
from common.kl import AdaptiveKLController, LogitShape, head_logprobs, kl_estimate, whiten
from common.tokenizer import Segment, encode_conversation, pack


def close(value, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(value).float(), torch.tensor(expected).float(), atol=tolerance, rtol=0)


def identity_head(vocabulary: int) -> torch.nn.Linear:
    head = torch.nn.Linear(vocabulary, vocabulary, bias=False)
    head.weight.data = torch.eye(vocabulary)
    return head


# ---------------------------------------------------------------------------------------------- log-probabilities


def test_t1_temperature_divides_logits():
    logprobs, _ = head_logprobs(identity_head(2), torch.tensor([[1.0, 0.0]]), torch.tensor([0]), 0.5)
    close(logprobs, [-0.126928])


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


P, REF = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])


def test_t3_kl_values_by_enumeration():
    logp, logr = P.log(), REF.log()
    expected = {name: float((P * kl_estimate(logp, logr, name)).sum()) for name in ("k1", "k2", "k3")}
    close(expected["k1"], 0.130812)
    close(expected["k3"], 0.130812)
    close(expected["k2"], 0.121707)
    close(float((P * kl_estimate(logr, logp, "k3")).sum()), 0.119188)  # what an inverted ratio would give
    _, entropy = head_logprobs(identity_head(2), logp[None], torch.tensor([0]))
    close(entropy, [0.562335])


@pytest.mark.parametrize("name,in_loss,in_reward", [("k1", 0.0, 0.205990), ("k2", 0.205990, -0.029630),
                                                    ("k3", 0.25, -0.044010)])  # fmt: skip
def test_t4_kl_gradients_by_enumeration(name, in_loss, in_reward):
    z = torch.tensor(math.log(3.0), requires_grad=True)
    logp = torch.stack([z, torch.zeros(())]).log_softmax(0)
    weight = logp.detach().exp()
    loss = (weight * kl_estimate(logp, REF.log(), name)).sum()  # expectation over samples, sampling not differentiated
    close(torch.autograd.grad(loss, z, retain_graph=True)[0], in_loss)
    value = kl_estimate(logp, REF.log(), name).detach()
    close(torch.autograd.grad((weight * value * logp).sum(), z, retain_graph=True)[0], in_reward)
    truth = (logp.exp() * (logp - REF.log())).sum()
    close(torch.autograd.grad(truth, z, retain_graph=True)[0], 0.205990)
    if name == "k3":  # weighted by the ratio to the sampling policy, not detached, k3 has the right gradient too
        ratio = (logp - logp.detach()).exp()
        loss = (weight * ratio * kl_estimate(logp, REF.log(), name)).sum()
        close(torch.autograd.grad(loss, z)[0], 0.205990)


def test_t5_sequence_kl_needs_return_to_go():
    """A second step whose KL depends on the first: the token-wise loss misses it, k1 in the reward does not."""
    z = torch.tensor(math.log(3.0), requires_grad=True)
    logp = torch.stack([z, torch.zeros(())]).log_softmax(0)
    later = torch.tensor([0.130812, 0.0])  # KL of step 2 after each branch
    truth = (logp.exp() * (logp - REF.log() + later)).sum()
    close(torch.autograd.grad(truth, z, retain_graph=True)[0], 0.230517)
    d = (logp - REF.log()).detach()
    reinforce = (logp.detach().exp() * (d + later) * logp).sum()
    close(torch.autograd.grad(reinforce, z, retain_graph=True)[0], 0.230517)
    token_loss = (logp.detach().exp() * kl_estimate(logp, REF.log(), "k2")).sum()
    close(torch.autograd.grad(token_loss, z)[0], 0.205990)


def test_t14_whiten():
    values, mask = torch.tensor([1.0, 2.0, 3.0, 99.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    close(whiten(values, mask), [-1.224745, 0, 1.224745, 0], 1e-4)
    close(whiten(values, mask, shift_mean=False), [0.775255, 2, 3.224745, 0], 1e-4)


def test_t17_controller():
    controller = AdaptiveKLController(0.1, target=6, horizon=10_000)
    close(controller.update(9.0, 64) / 0.1, 1.00128)
    assert controller.update(0.0, 64) < controller.update(100.0, 64)


# ---------------------------------------------------------------------------------------------- sft


def test_t2_neftune_and_flan():
    noise = sft.neftune_noise(torch.full((4,), 4), 16, 5.0)
    assert noise.shape == (4, 16) and float(noise.abs().max()) <= 0.625 and float(noise.abs().max()) > 0.4
    close(torch.tensor(sft.mixture_weights([100, 3000, 30_000], 3000)), [0.0164, 0.4918, 0.4918], 1e-4)


def test_sft_detail_6_neftune_uses_each_documents_length():
    noise = sft.neftune_noise(torch.tensor([1] * 200 + [100] * 200), 64, 10.0)
    assert float(noise[:200].abs().max()) == pytest.approx(10 / 8, rel=0.05)
    assert float(noise[200:].abs().max()) == pytest.approx(10 / 80, rel=0.05)


def test_sft_detail_5_training_order_mixes_by_weight_and_extends():
    long = sft.training_order([10, 1000], torch.tensor([0.25, 0.75]), 4000, seed=1)
    assert torch.equal(long[:1000], sft.training_order([10, 1000], torch.tensor([0.25, 0.75]), 1000, seed=1))
    assert float((long < 10).float().mean()) == pytest.approx(0.25, abs=0.03)
    first = long[long < 10][:20].tolist()  # the small set comes round and round, each time in another order
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10)) and first[:10] != first[10:]
    single = sft.training_order([7], torch.ones(1), 14, seed=3).tolist()
    assert sorted(single[:7]) == sorted(single[7:]) == list(range(7))


def test_t6_sft_detail_4_token_normalisation():
    one, three = torch.tensor([-1.0]), torch.tensor([-1.0, -2.0, -3.0])
    together = sft.sft_loss(torch.cat([one, three]), 4)
    close(together, 1.75)
    close(sft.sft_loss(one, 4) + sft.sft_loss(three, 4), 1.75)


# ---------------------------------------------------------------------------------------------- grpo


def test_t15_grpo_detail_6_clipped_objective():
    rho = torch.tensor([[1.5], [1.5], [0.5], [0.5]])
    logprobs = rho.log().requires_grad_(True)
    advantages, mask = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.ones(4, 1)
    losses, _ = grpo.policy_loss(logprobs, torch.zeros(4, 1), advantages, mask, "ppo", 0.2, 0.2)
    close(losses[:, 0].detach(), [-1.2, 1.5, -0.5, 0.8])
    gradient = torch.autograd.grad(losses.sum(), logprobs)[0][:, 0]
    assert gradient[0] == 0 and gradient[3] == 0 and gradient[1] != 0 and gradient[2] != 0


def test_t24_dapo_detail_9_clip_higher():
    arguments = (torch.tensor([[1.25]]).log(), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), "ppo", 0.2)
    close(grpo.policy_loss(*arguments, 0.28)[0], [[-1.25]])
    close(grpo.policy_loss(*arguments, 0.2)[0], [[-1.2]])


def test_t21_grpo_detail_1_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    close(grpo.group_advantages(rewards, "grpo"), [[1.5, -0.5, -0.5, -0.5]], 1e-4)
    close(grpo.group_advantages(rewards, "dr_grpo"), [[0.75, -0.25, -0.25, -0.25]])
    close(grpo.group_advantages(rewards, "rloo"), [[1.0, -1 / 3, -1 / 3, -1 / 3]])
    for kind in ("grpo", "dr_grpo", "rloo"):
        assert (grpo.group_advantages(torch.full((3, 8), 0.1), kind) == 0).all()


def test_t22_aggregation():
    losses = torch.tensor([[1.0, 9.0, 9.0], [2.0, 2.0, 2.0]])
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    for how, expected in (("sequence", 1.5), ("token", 1.75), ("constant", 0.875), ("completion", 3.5)):
        for aggregate in (grpo.aggregate, rlvr_math.mean_loss)[how == "completion" :]:
            close(aggregate(losses, mask, how, 2, 4, 4), expected)
            parts = [aggregate(losses[i : i + 1], mask[i : i + 1], how, 2, 4, 4) for i in range(2)]
            close(sum(parts), expected)


def test_t25_dapo_detail_13_soft_overlong_punishment():
    lengths = torch.tensor([1, 16384, 18432, 20480, 20481])
    close(dapo.overlong_punishment(lengths, 20480, 4096), [0, 0, -0.5, -1, -1])
    close(dapo.overlong_punishment(lengths, 20480, 0), [0, 0, 0, 0, 0])


def test_cispo_keeps_the_gradient_of_every_token():
    """−sg(min(ρ, 1+ε))·A·log π: a ratio beyond the bound weighs less, and is not silenced as PPO's would be."""
    logprobs = torch.tensor([[1.5], [0.5]]).log().requires_grad_(True)
    arguments = (logprobs, torch.zeros(2, 1), torch.ones(2, 1), torch.ones(2, 1), "cispo", 0.2, 0.2)
    losses, ratio = grpo.policy_loss(*arguments)
    close(torch.autograd.grad(losses.sum(), logprobs)[0], [[-1.2], [-0.5]])
    close(ratio, [[1.5], [0.5]])


def test_t23_gspo_ratio_is_the_geometric_mean():
    logprobs = torch.tensor([[0.2, -0.1, 0.2, 5.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    _, rho = grpo.policy_loss(logprobs, torch.zeros(1, 4), torch.ones(1, 1), mask, "gspo", 10, 10)
    close(rho[0], [1.105171] * 4)


def enumerate_gradient(advantage: str, aggregation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Average gradient of the policy loss over every group of 2 single-token completions, and the true gradient."""
    z = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 0.5])
    probabilities = z.detach().softmax(0)
    total = torch.zeros(3)
    for a in range(3):
        for b in range(3):
            logprobs = z.log_softmax(0)[torch.tensor([[a], [b]])]
            advantages = grpo.group_advantages(rewards[torch.tensor([[a, b]])], advantage).view(2, 1)
            losses, _ = grpo.policy_loss(logprobs, logprobs.detach(), advantages, torch.ones(2, 1), "ppo", 0.2, 0.2)
            loss = grpo.aggregate(losses, torch.ones(2, 1), aggregation, 2, 2, 1)
            total += probabilities[a] * probabilities[b] * torch.autograd.grad(loss, z)[0]
    truth = torch.autograd.grad((z.softmax(0) * rewards).sum(), z)[0]
    return -total, truth


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_policy_gradient_by_enumeration(aggregation):
    gradient, truth = enumerate_gradient("rloo", aggregation)
    torch.testing.assert_close(gradient, truth, atol=1e-6, rtol=1e-5)  # unbiased
    gradient, truth = enumerate_gradient("dr_grpo", aggregation)
    torch.testing.assert_close(gradient, truth / 2, atol=1e-6, rtol=1e-5)  # (G − 1)/G of it


def test_bandit_reaches_the_known_optimum():
    """One prompt, three tokens: with β·KL(π‖ref) in the loss (k2) the policy approaches ref·exp(r/β)."""
    torch.manual_seed(0)
    rewards, ref, beta = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.2, 0.5, 0.3]), 0.5
    optimum = ref * (rewards / beta).exp() / (ref * (rewards / beta).exp()).sum()
    z = ref.log().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=0.02)
    for _ in range(600):
        actions = torch.multinomial(z.detach().softmax(0), 256, replacement=True)
        logprobs = z.log_softmax(0)[actions][:, None]
        advantages = grpo.group_advantages(rewards[actions][None], "rloo").view(-1, 1)
        mask = torch.ones(256, 1)
        losses, _ = grpo.policy_loss(logprobs, logprobs.detach(), advantages, mask, "ppo", 0.2, 0.2)
        losses = losses + beta * kl_estimate(logprobs, ref.log()[actions][:, None], "k2")
        optimizer.zero_grad()
        grpo.aggregate(losses, mask, "token", 256, 256, 1).backward()
        optimizer.step()
    assert float((z.detach().softmax(0) - optimum).abs().max()) < 0.03


# ---------------------------------------------------------------------------------------------- rlvr_math


def test_t21_rlvr_math_detail_1_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    expected = {"grpo": [1.5, -0.5, -0.5, -0.5], "dr_grpo": [0.75, -0.25, -0.25, -0.25]}
    expected |= {"rloo": [1, -1 / 3, -1 / 3, -1 / 3], "reinforce": [1, 0, 0, 0], "expert_iteration": [1, 0, 0, 0]}
    for name, (advantage, *_) in rlvr_math.ALGORITHMS.items():
        close(advantage(rewards), [expected[name]], 1e-4)
        if name in ("grpo", "dr_grpo", "rloo"):
            assert (advantage(torch.full((3, 8), 0.1)) == 0).all()


def test_t23_rloos_ratio_is_of_the_whole_completion():
    logprobs, mask = torch.tensor([[0.2, -0.1, 0.2, 5.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    for clip_high, expected in ((9.0, math.exp(0.3)), (0.2, 1.2)):  # clipped once, not token by token
        arguments = (logprobs, torch.zeros(1, 4), torch.ones(1, 1), mask, "sequence", 0.2, clip_high)
        losses, rho = rlvr_math.token_losses(*arguments)
        close(rho[0], [math.exp(0.3)] * 4)
        close((losses * mask).sum(), -expected)


@pytest.mark.parametrize("name,share", [("reinforce", 1.0), ("rloo", 1.0), ("dr_grpo", 0.5)])
def test_policy_gradients_by_enumeration(name, share):
    """Over every group of 2 single-token completions: reinforce and rloo are unbiased, dr_grpo (G − 1)/G of it."""
    z, rewards = torch.tensor([0.3, -0.2, 0.1], requires_grad=True), torch.tensor([1.0, 0.0, 0.5])
    (advantage, ratio, mean_over), total, mask = rlvr_math.ALGORITHMS[name], torch.zeros(3), torch.ones(2, 1)
    for a in range(3):
        for b in range(3):
            logprobs = z.log_softmax(0)[torch.tensor([[a], [b]])]
            advantages = advantage(rewards[torch.tensor([[a, b]])]).view(2, 1)
            losses, _ = rlvr_math.token_losses(logprobs, logprobs.detach(), advantages, mask, ratio, 0.2, 0.2)
            weight = z.detach().softmax(0)
            loss = rlvr_math.mean_loss(losses, mask, mean_over, 2, 2, 1)
            total -= weight[a] * weight[b] * torch.autograd.grad(loss, z)[0]
    truth = torch.autograd.grad((z.softmax(0) * rewards).sum(), z)[0]
    torch.testing.assert_close(total, share * truth, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- parity with TRL


def test_parity_with_trl_selective_log_softmax_and_entropy():
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    torch.manual_seed(0)
    logits, targets = torch.randn(11, 40) * 3, torch.randint(40, (11,))
    logprobs, entropy = head_logprobs(identity_head(40), logits, targets)
    torch.testing.assert_close(logprobs, selective_log_softmax(logits, targets), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, entropy_from_logits(logits), atol=1e-5, rtol=1e-5)


def trl_grpo_loss(new, old, ref, advantages, mask, beta: float, surrogate: str, loss_type: str):
    """TRL's own `_compute_loss` on given tensors [B, T], clipped to 1−0.2 and 1+0.28, budget 12 tokens."""
    from collections import defaultdict
    from types import SimpleNamespace
    from unittest.mock import MagicMock

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


@pytest.mark.parametrize("ours,theirs", [("sequence", "grpo"), ("constant", "dr_grpo"), ("token", "bnpo")])
@pytest.mark.parametrize("surrogate", ["ppo", "gspo"])
def test_parity_with_trl_grpo_loss(ours, theirs, surrogate):
    """Two-sided clip and k3 included."""
    new, old, ref, advantages, mask = random_rollout()
    expected = trl_grpo_loss(new, old, ref, advantages, mask, 0.04, surrogate, theirs)
    wanted = torch.autograd.grad(expected, new)[0]
    losses, _ = grpo.policy_loss(new, old, advantages[:, None], mask, surrogate, 0.2, 0.28)
    losses = losses + 0.04 * kl.kl_estimate(new, ref, "k3")
    loss = grpo.aggregate(losses, mask, ours, 6, float(mask.sum()), 12)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], wanted, atol=1e-6, rtol=1e-4)


def our_loss(name: str, new, old, advantages, mask, clip_high: float):
    _, ratio, mean_over = rlvr_math.ALGORITHMS[name]
    losses, _ = rlvr_math.token_losses(new, old, advantages[:, None], mask, ratio, 0.2, clip_high)
    return rlvr_math.mean_loss(losses, mask, mean_over, 6, float(mask.sum()), 12)


def test_parity_with_trl_rloo_loss():
    from collections import defaultdict
    from unittest.mock import MagicMock

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
    wanted = torch.autograd.grad(expected, new)[0]
    ratio = (((new - old) * mask).sum(1)).exp()
    assert (ratio > 1.2).any() and (ratio < 0.8).any()  # the clip has something to do
    loss = our_loss("rloo", new, old, advantages, mask, 0.2)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_parity_with_trl_grpo_losses(name):
    new, old, ref, advantages, mask = random_rollout()
    expected = trl_grpo_loss(new, old, ref, advantages, mask, 0.0, "ppo", name)
    torch.testing.assert_close(our_loss(name, new, old, advantages, mask, 0.28), expected, atol=1e-6, rtol=1e-5)


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


def test_parity_with_transformers_sft_loss():
    """The loss that TRL's SFTTrainer asks transformers for: cross-entropy over `num_items_in_batch` targets."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 7, 30), torch.randint(30, (2, 7))
    labels[0, :3] = -100
    count = int((labels[:, 1:] != -100).sum())
    expected = ForCausalLMLoss(logits, labels, 30, num_items_in_batch=torch.tensor(count))
    scored = labels[:, 1:] != -100
    logprobs, _ = head_logprobs(identity_head(30), logits[:, :-1][scored], labels[:, 1:][scored])
    torch.testing.assert_close(sft.sft_loss(logprobs, count), expected, atol=1e-6, rtol=1e-6)


def test_enumeration_is_independent_of_torch():
    """T3 once more in float64 NumPy, so that the expectations above do not rest on the code under test."""
    p, q = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    assert (p * np.log(p / q)).sum() == pytest.approx(0.130812, abs=1e-6)
