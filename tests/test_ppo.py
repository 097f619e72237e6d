"""ppo.py: known answers, GAE against a direct sum, its details, and bad input."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import test_core
import torch
from conftest import TINY, first_rows, jsonl, metrics
from test_dpo import close, t, watch

import ppo
from common.generation import Completion
from common.kl import AdaptiveKLController, RewardModel, load_scalar_model, whiten
from common.tokenizer import encode_answered

CPU = torch.device("cpu")


def test_t12_ppo_detail_5_ppo_detail_6_kl_in_the_reward_and_the_score_at_the_last_action():
    logprobs, ref, mask = t(-1, -2, -9)[None], t(-1.5, -1.5, -1)[None], t(1, 1, 0)[None]
    close(ppo.token_rewards(logprobs, ref, t(2), mask, 0.1)[0], -0.05, 2.05, 0)  # nothing for padding


def test_t13_ppo_detail_4_gae_equals_the_direct_sum_and_reads_nothing_behind_the_last_action():
    known = t(0, 0, 1)[None], t(0.5, 0.6, 0.8)[None]
    close(torch.cat(ppo.gae(*known, torch.ones(1, 3), 1.0, 0.95)), [0.4705, 0.39, 0.2], [0.9705, 0.99, 1])
    close(ppo.gae(*known, t(1, 0, 1)[None], 1.0, 0.95)[0][0], 0.49, 0, 0.2)
    rewards, values = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths, gamma, lam = [9, 1, 4, 7, 2], 0.97, 0.9
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    advantages, returns = ppo.gae(*(x.masked_fill(~mask, math.nan) for x in (rewards, values)), mask, gamma, lam)
    for i, n in enumerate(lengths):
        v = [*values[i, :n].tolist(), 0.0]
        delta = [rewards[i, k].item() + gamma * v[k + 1] - v[k] for k in range(n)]
        direct = [sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, n)) for k in range(n)]
        close(advantages[i], *direct, *[0] * (9 - n))
        close(returns[i], *(a + b for a, b in zip(direct, v)), *[0] * (9 - n))


def test_t14_ppo_detail_8_ppo_detail_9_whitening():
    close(whiten(t(1, 2, 3, 50), t(1, 1, 1, 0)), -1.224745, 0, 1.224745, 0)
    close(whiten(t(1, 2, 3), torch.ones(3), shift_mean=False), 2 - 1.224745, 2, 2 + 1.224745)
    others = iter([[3.0, 1.0], [1.0]])  # two processes with [1, 2] and [3] find what one finds
    found = whiten(t(1, 2), torch.ones(2), add_up=lambda sums: [a + b for a, b in zip(sums, next(others))])
    close(found, -1.224745, 0)


def test_t15_clipped_policy_loss_and_its_gradient():
    ratio, advantages = t(1.5, 1.5, 0.5, 0.5), t(1, -1, 1, -1)
    logprobs = ratio.log().requires_grad_()
    losses, found = ppo.clipped_policy_loss(logprobs, t(0, 0, 0, 0), advantages, torch.ones(4), 0.2)
    close(losses.detach(), -1.2, 1.5, -0.5, 0.8)
    close(found, *ratio.tolist())
    losses.sum().backward()
    close(logprobs.grad, 0, 1.5, -0.5, 0)
    close(ppo.clipped_policy_loss(t(0, 900), t(0, 0), t(2, 0), t(1, 0), 0.2)[0], -2, 0)  # e^900 is no number


def test_t16_ppo_detail_10_value_clipping():
    for start, loss, slope in ((0.5, 0.32, 0), (-0.5, 1.125, -1.5)):  # the clipped value's is larger, or its own
        values = t(start).requires_grad_()
        found = ppo.clipped_value_loss(values, t(0), t(1), 0.2)
        found.sum().backward()
        close(torch.cat([found.detach(), values.grad]), loss, slope)


SMALL = {"batch_size": 4, "eval_rows": 4, "max_completion_tokens": 12, "update_epochs": 2, "warmup_steps": 1}
SMALL |= {"dataset": str(first_rows("maths_train.jsonl", 240)), "reward_model": None, "lr_schedule": "constant"}
quick = partial(test_core.quick, "ppo", **SMALL)


@pytest.fixture()
def scorer(tokenizer, tmp_path) -> str:
    """The folder of a reward model, whose normalisation is not the identity."""
    model = load_scalar_model(str(TINY), CPU, head_seed=0)
    model.config.reward_mean, model.config.reward_std = 0.4, 0.7
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "scorer")
    return str(tmp_path / "scorer")


def test_ppo_detail_1_a_cut_completion_pays_the_proxy_which_needs_no_answers(scorer, tmp_path, monkeypatch):
    asked = jsonl(tmp_path / "asked.jsonl", *({"prompt": f"{a}+{a}=?"} for a in range(20, 28)))
    given, drawn = watch(monkeypatch, ppo, "token_rewards", "draw_overoptimisation")
    settings, evaluated = {"dataset": asked, "eval_dataset": asked, "batch_size": 8, "eval_rows": 8}, []
    for penalty in (0.0, 0.7):
        folder = tmp_path / str(penalty)
        row = quick(folder, **settings, reward_model=scorer, missing_eos_penalty=penalty)
        evaluated.append(metrics(folder)[0])
    (_, _, free, mask, _), (_, _, paid, _, _) = (args for args, *_ in given)
    was_cut = (free - paid - 0.7).abs() < 1e-6
    assert ((free == paid) | was_cut).all() and (mask.sum(1)[was_cut] == 12).all()
    assert 0 < was_cut.double().mean().item() == row["completions/truncated_fraction"] < 1
    cost = evaluated[0]["eval/reward"] - evaluated[1]["eval/reward"]
    assert cost == pytest.approx(0.7 * evaluated[0]["eval/truncated_fraction"]) and 0 < cost < 0.7
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    proxies = [sample["reward"] for sample in samples if sample["step"] == 0]  # one sample of each question
    assert len(proxies) == 8 and sum(proxies) / 8 == pytest.approx(evaluated[1]["eval/reward"], abs=1e-5)
    sample = next(s for s in samples if s["completion"].endswith("</answer>"))
    (expected,) = RewardModel(scorer, CPU, False, 4096)({"prompt": sample["prompt"]}, [sample["completion"]])
    assert sample["reward"] == pytest.approx(expected.item(), abs=1e-4)
    assert len(drawn) == 2 and "eval/accuracy" not in row


def test_ppo_detail_2_before_the_first_update_every_ratio_is_1_and_the_kl_is_0(tmp_path, monkeypatch):
    """Exactly so, in several microbatches and minibatches: the sampler's own numbers would be off by rounding."""
    (losses,), split = watch(monkeypatch, ppo, "clipped_policy_loss"), {"minibatches": 2, "microbatch_tokens": 40}
    row = quick(tmp_path, dtype="bfloat16", learning_rate=1e-3, **split)
    ratios = [ratio for *_, (_, ratio) in losses]
    rows = torch.tensor([len(ratio) for ratio in ratios]).cumsum(0)
    first = [ratio for ratio, end in zip(ratios, rows) if end <= 4]  # of the 8 rows each epoch has
    assert len(first) > 1 and 4 in rows and all((ratio == 1).all() for ratio in first)
    assert any((ratio != 1).any() for ratio in ratios[len(first) :])
    assert row["policy/kl_sequence"] == 0 and metrics(tmp_path)[0]["eval/kl"] == 0 != row["eval/kl"]


def test_ppo_detail_2_ppo_detail_4_ppo_detail_6_what_is_trained_are_the_samplers_own_ids(
    tmp_path, monkeypatch, tokenizer
):
    """A tag spelled in letters, which no tokenizer would, padding, a stop token; and a completion that was cut."""
    odd = [[*tokenizer.convert_tokens_to_ids(list("<think>")), 1, 0], [1, 1]]
    group = [Completion(odd[0], [-0.5] * 9, True), Completion(odd[1], [-0.25, -2.0], False)]
    monkeypatch.setattr(ppo.Sampler, "generate", lambda self, prompts, *args, **kwargs: [group] * len(prompts))
    monkeypatch.setattr(ppo, "reward", lambda *args: 1.0)
    forwards, given = watch(monkeypatch, ppo, "completion_logprobs", "token_rewards")
    row = quick(tmp_path, batch_size=2, missing_eos_penalty=0.5)
    trained = [named["completions"] for _, named, _ in forwards if named.get("completions")]
    assert len(trained) > 2 and all(ids == odd * 2 for ids in trained)
    (old, ref, scores, mask, _), _, rewards = given[0]
    assert mask.tolist() == [[1] * 9, [1] * 2 + [0] * 7] * 2 and torch.equal(old, ref)
    expected = torch.tensor([[0] * 8 + [1], [0, 0.5] + [0] * 7] * 2)
    assert torch.equal(rewards, expected) and torch.equal(scores, expected.sum(1))
    gap = (old - torch.tensor([[-0.5] * 9, [-0.25, -2.0] + [0] * 7] * 2)).abs().sum() / mask.sum()
    assert row["policy/sampler_gap"] == pytest.approx(gap.item(), rel=1e-5) and row["policy/kl_sequence"] == 0
    assert row["completions/length_mean"] == 5.5 and row["completions/truncated_fraction"] == 0.5


@pytest.mark.parametrize("is_whitened", [False, True])
def test_ppo_detail_5_ppo_detail_8_ppo_detail_9_what_is_whitened_and_what_is_not(is_whitened, tmp_path, monkeypatch):
    """In the second step, whose policy has left the reference, so that KL is in the reward."""
    names = ("token_rewards", "gae", "clipped_policy_loss", "clipped_value_loss")
    rewards, credits, policies, values = watch(monkeypatch, ppo, *names)
    settings = {"update_epochs": 1, "steps": 2, "beta": 5.0, "learning_rate": 1e-3}
    row = quick(tmp_path, **settings, whiten_rewards=is_whitened)
    ((old, ref, scores, mask, beta), _, plain), ((used, *_), _, (advantages, returns)) = rewards[-1], credits[-1]
    acts = mask > 0
    kl = (old - ref)[acts].sum()
    assert row["policy/kl_sequence"] == pytest.approx(kl.item() / len(mask), rel=1e-4) != 0
    assert plain.sum().item() == pytest.approx((scores.sum() - beta * kl).item(), rel=1e-4) and not plain.requires_grad
    assert plain[acts].unique().numel() > 20  # every token pays
    assert used[acts].mean().item() == pytest.approx(plain[acts].mean().item(), abs=1e-5)
    assert is_whitened == (abs(used[acts].std(correction=0).item() - 1) < 1e-3) != torch.equal(used, plain)
    order = [next(i for i in range(len(mask)) if torch.equal(returns[i], row)) for row in values[-1][0][2]]
    assert sorted(order) == list(range(len(mask)))  # the critic learns returns as they are
    torch.testing.assert_close(policies[-1][0][2], whiten(advantages, mask)[order])


def test_ppo_detail_7_ppo_detail_13_a_critic_begins_as_the_normalised_reward_model_or_expects_nothing(
    scorer, tokenizer, model
):
    """Its value before a token behind a whole answer is that answer's score."""
    critic = ppo.load_critic(replace(ppo.EMBEDDED, reward_model=scorer), tokenizer, CPU, False)
    question = {"prompt": [{"role": "user", "content": "12+30=?"}]}
    texts = ["<answer>42</answer>", "<think>12+30: 42</think><answer>42</answer>", "no"]
    expected = RewardModel(scorer, CPU, False, 4096)(question, texts)
    rows = [encode_answered(tokenizer, question["prompt"], text) for text in texts]
    longer = [[*row[3:], 7] for row in rows]
    with torch.no_grad():
        found = ppo.completion_values(critic, range(3), [row[:3] for row in rows], longer, False)
    last = torch.stack([values[len(row) - 1] for values, row in zip(found, longer)])
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 0
    for changes in ({"critic": "policy", "reward_model": scorer}, {"critic": "reward_model", "reward_model": None}):
        found = ppo.load_critic(replace(ppo.EMBEDDED, **changes), tokenizer, CPU, False)
        assert not found.score.weight.any() and not found.score.bias.any()  # the policy with a head of zeros
        weights = model.model.named_parameters()
        assert all(torch.equal(weight, found.model.get_parameter(name)) for name, weight in weights)


def test_ppo_detail_3_one_temperature_the_importance_weight_and_a_learning_rate_of_0(tmp_path, monkeypatch):
    """The temperature divides logits in every forward; where π_old/μ is about 1, a cap of ½ halves the gradient of the
    policy, and that alone; and without a learning rate the critic is all that changes."""
    (forwards,) = watch(monkeypatch, ppo, "completion_logprobs")
    settings = {"temperature": 0.6, "learning_rate": 0.0, "batch_size": 2}
    for cap in (0.0, 0.5):
        quick(tmp_path / str(cap), importance_cap=cap, **settings, update_epochs=1, steps=2, eval_every=1)
    (start, first, free), (*_, capped) = metrics(tmp_path / "0.0"), metrics(tmp_path / "0.5")
    assert {named["temperature"] for _, named, _ in forwards} == {0.6}
    assert free["policy/sampler_gap"] < 1e-6 and "eval/accuracy" in start
    assert start["eval/kl"] == first["eval/kl"] == free["eval/kl"] == free["policy/kl_sequence"] == 0
    assert capped["optim/grad_norm"] == pytest.approx(0.5 * free["optim/grad_norm"], rel=1e-4) != 0
    assert all(capped[name] == free[name] for name in ("optim/critic_grad_norm", "loss/policy"))
    assert first["value/explained_variance"] == 0 != free["value/explained_variance"]


def test_demonstrations_of_a_large_weight_are_learnt(tmp_path):
    data = {"ptx_dataset": str(first_rows("demonstrations_train.jsonl", 240)), "ptx_weight": 50.0}
    quick(tmp_path, **data, learning_rate=1e-3, steps=4, eval_every=0, kl_target=None, max_completion_tokens=4)
    losses = [row["loss/ptx"] for row in metrics(tmp_path)[1:]]
    assert losses[-1] < 0.3 * losses[0]
    assert [row["policy/next_beta"] for row in metrics(tmp_path)[1:]] == [0.5] * 4  # without a target it stays


def test_t17_ppo_detail_12_the_controller_tightens_and_loosens_and_goes_on_after_resume(tmp_path):
    assert AdaptiveKLController(1.0, 6.0, 10_000).update(9.0, 64) == pytest.approx(1.00128)
    assert AdaptiveKLController(1.0, 6.0, 20).update(0.0, 2560) == pytest.approx(0.8)  # a fifth at most
    held = {"kl_target": 0.02, "kl_horizon": 20, "learning_rate": 1e-3, "eval_every": 0, "batch_size": 2}
    quick(tmp_path, **held, steps=2)
    quick(None, resume=str(tmp_path), **held, steps=4)
    rows = metrics(tmp_path)[1:]
    before, after = ([row[f"policy/{name}"] for row in rows] for name in ("beta", "next_beta"))
    errors = [min(max(row["policy/kl_sequence"] / 0.02 - 1, -0.2), 0.2) for row in rows]
    assert after == pytest.approx([beta * (1 + error * 4 / 20) for beta, error in zip(before, errors)], rel=1e-9)
    assert before == [0.5, *after[:-1]] and after[0] < before[0] and any(a > b for a, b in zip(after, before))


def test_a_run_ends_where_it_is_too_far_from_the_reference(tmp_path):
    wild = {"learning_rate": 1e-3, "beta": 0.0, "kl_target": None, "eval_every": 1, "steps": 9, "stop_kl": 0.4}
    quick(tmp_path, **wild, save_every=1)
    rows = metrics(tmp_path)
    assert 3 <= len(rows) < 9 and rows[-1]["eval/kl"] > 0.4 and all(row["eval/kl"] <= 0.4 for row in rows[:-1])
    shutil.rmtree(tmp_path / "model")
    quick(None, resume=str(tmp_path), **wild)
    assert metrics(tmp_path) == rows and (tmp_path / "model" / "model.safetensors").exists()


def test_a_reward_model_of_another_tokenizer_reads_by_that_but_is_no_critic(tmp_path, scorer):
    other = shutil.copytree(scorer, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"1": content["model"]["vocab"]["2"], "2": content["model"]["vocab"]["1"]}
    (other / "tokenizer.json").write_text(json.dumps(content))
    scores = RewardModel(scorer, CPU, False, 64)({"prompt": "1+13=?"}, ["14", "2"])
    torch.testing.assert_close(RewardModel(str(other), CPU, False, 64)({"prompt": "2+23=?"}, ["24", "1"]), scores)
    with pytest.raises(SystemExit, match="a critic needs the tokenizer of .*--critic policy"):
        quick(tmp_path / "run", reward_model=str(other))
