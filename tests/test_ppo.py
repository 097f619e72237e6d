"""ppo.py: known answers, GAE against a direct sum, a bandit whose optimum is known, its details, and bad input."""

import gc
import json
import math
import shutil
import weakref

import pytest
import torch
from conftest import ROOT, TINY, fails, first_rows, metrics, refuses, run

import ppo
from common.kl import AdaptiveKLController, whiten
from common.tokenizer import render_chat

CPU = torch.device("cpu")


def t(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(value, expected, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(value).double(), t(*expected), atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------- known answers


def test_t12_ppo_detail_5_ppo_detail_6_kl_in_the_reward_and_the_score_at_the_last_action():
    logprobs, ref, one = t(-1, -2)[None], t(-1.5, -1.5)[None], torch.ones(1, 2)
    close(ppo.token_rewards(logprobs, ref, t(2), one, 0.1)[0], [-0.05, 2.05])
    mask = t(1, 1, 0)[None]  # padding behind the last action gets nothing, whatever it holds
    padded = ppo.token_rewards(torch.cat([logprobs, t(-9)[None]], 1), torch.cat([ref, t(-1)[None]], 1), t(2), mask, 0.1)
    close(padded[0], [-0.05, 2.05, 0])
    close(ppo.token_rewards(logprobs, logprobs, t(2), t(1, 0)[None], 0.1)[0], [2, 0])


def test_t13_ppo_detail_4_gae_and_what_padding_holds():
    r, v = t(0, 0, 1)[None], t(0.5, 0.6, 0.8)[None]
    advantages, returns = ppo.gae(r, v, torch.ones(1, 3), 1.0, 0.95)
    close(advantages[0], [0.4705, 0.39, 0.2])
    close(returns[0], [0.9705, 0.99, 1])
    close(ppo.gae(r, v, torch.ones(1, 3), 1.0, 1.0)[0][0], [0.5, 0.4, 0.2])
    for garbage in (9.0, float("nan"), float("inf")):  # a value after the last action is never read
        padded = [torch.cat([x, t(garbage, garbage)[None]], 1) for x in (r, v)]
        found = ppo.gae(*padded, t(1, 1, 1, 0, 0)[None], 1.0, 0.95)
        close(found[0][0], [0.4705, 0.39, 0.2, 0, 0])
        close(found[1][0], [0.9705, 0.99, 1, 0, 0])
    middle = ppo.gae(r, v, t(1, 0, 1)[None], 1.0, 0.95)  # δ_0 looks at the next action's value, 0.8
    close(middle[0][0], [0.8 - 0.5 + 0.95 * 0.2, 0, 0.2])


def test_gae_equals_the_direct_sum():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    lengths, gamma, lam = [9, 1, 4, 7, 2], 0.97, 0.9
    mask = torch.stack([(torch.arange(9) < n).double() for n in lengths])
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(lengths):
        v = [*values[i, :n].tolist(), 0.0]
        delta = [rewards[i, k].item() + gamma * v[k + 1] - v[k] for k in range(n)]
        for k in range(n):
            direct = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, n))
            assert advantages[i, k].item() == pytest.approx(direct)
            assert returns[i, k].item() == pytest.approx(direct + v[k])


def test_t14_ppo_detail_8_ppo_detail_11_whitening():
    one = torch.ones(3)
    close(whiten(t(1, 2, 3), one), [-1.224745, 0, 1.224745])
    close(whiten(t(1, 2, 3), one, shift_mean=False), [2 - 1.224745, 2, 2 + 1.224745])
    others = iter([[3.0, 1.0], [1.0]])  # two processes with [1, 2] and [3] find what one finds
    found = whiten(t(1, 2), torch.ones(2), add_up=lambda sums: [a + b for a, b in zip(sums, next(others))])
    close(found, [-1.224745, 0])
    close(whiten(t(1, 2, 3, 50), t(1, 1, 1, 0)), [-1.224745, 0, 1.224745, 0])


def test_t15_clipped_policy_loss_and_its_gradient():
    ratio = t(1.5, 1.5, 0.5, 0.5)
    advantages = t(1, -1, 1, -1)
    logprobs = ratio.log().requires_grad_()
    losses, found = ppo.clipped_policy_loss(logprobs, t(0, 0, 0, 0), advantages, torch.ones(4), 0.2)
    close(losses.detach(), [-1.2, 1.5, -0.5, 0.8])
    close(found, ratio.tolist())
    losses.sum().backward()
    close(logprobs.grad, [0, 1.5, -0.5, 0])
    for advantage, expected in ((-1.0, 3.0), (1.0, -1.2)):
        dual = ppo.clipped_policy_loss(t(5).log(), t(0), t(advantage), torch.ones(1), 0.2, 3.0)[0]
        close(dual, [expected])


def test_t16_ppo_detail_12_value_clipping():
    values = t(0.5).requires_grad_()
    loss = ppo.clipped_value_loss(values, t(0), t(1), 0.2)
    close(loss.detach(), [0.32])
    loss.sum().backward()
    assert values.grad.item() == 0
    towards = t(-0.5).requires_grad_()  # moved away from the return: the larger loss is the unclipped one
    ppo.clipped_value_loss(towards, t(0), t(1), 0.2).sum().backward()
    assert towards.grad.item() == pytest.approx(-1.5)


def test_t17_ppo_detail_15_the_controller_moves_beta_towards_the_target():
    assert AdaptiveKLController(1.0, 6.0, 10_000).update(9.0, 64) == pytest.approx(1.00128)
    for kl, direction in ((9.0, 1), (3.0, -1), (6.0, 0)):
        moved = AdaptiveKLController(0.1, 6.0, 1000).update(kl, 64) - 0.1
        assert math.copysign(1, moved) == direction if direction else moved == 0
    assert AdaptiveKLController(1.0, 6.0, 1000).update(1e6, 10) == pytest.approx(1.002)
    assert AdaptiveKLController(1.0, 6.0, 20).update(0.0, 2560) == pytest.approx(0.8)  # never below 0


def test_bandit_reaches_the_reference_times_the_exponential_of_the_reward():
    """Contexts of one action: with r − β·log(π/ref) as reward the optimum is π ∝ ref·exp(r/β)."""
    torch.manual_seed(0)
    contexts, actions, beta, count = 3, 4, 0.5, 6000
    reward, reference = torch.rand(contexts, actions), torch.randn(contexts, actions).log_softmax(-1)
    logits, table = reference.clone().requires_grad_(), torch.zeros(contexts, requires_grad=True)
    optimizer = torch.optim.Adam([logits, table], lr=0.02)
    for _ in range(250):
        with torch.no_grad():
            context = torch.randint(contexts, (count,))
            action = torch.multinomial(logits.softmax(-1)[context], 1)[:, 0]
            old, ref = (x.log_softmax(-1)[context, action][:, None] for x in (logits, reference))
            mask, values = torch.ones(count, 1), table[context][:, None].clone()
            rewards = ppo.token_rewards(old, ref, reward[context, action], mask, beta)
            advantages, returns = ppo.gae(rewards, values, mask, 1.0, 0.95)
        for _ in range(2):
            new = logits.log_softmax(-1)[context, action][:, None]
            loss = ppo.clipped_policy_loss(new, old, whiten(advantages, mask) * advantages.std(), mask, 0.2)[0].mean()
            loss = loss + ppo.clipped_value_loss(table[context][:, None], values, returns, 0.2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimum = (reference + reward / beta).softmax(-1)
    assert (logits.softmax(-1) - optimum).abs().max() < 0.03
    close(table.detach(), (beta * (reference + reward / beta).logsumexp(-1)).tolist(), 0.05)  # the soft value
    assert (reference.exp() - optimum).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------- details


SMALL = {"steps": 1, "batch_size": 4, "num_samples": 2, "eval_rows": 4, "eval_samples": 1, "minibatches": 2}
ON_ANSWERS = {"reward_model": "none", "answer_weight": 1.0, "critic": "policy"}


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A small reward model of the project's own, with a normalisation that is not the identity."""
    folder = tmp_path_factory.mktemp("rm")
    pairs = ["--dataset", first_rows("preferences_train.jsonl", 240), "--eval-dataset", TINY / "preferences_test.jsonl"]
    flags = ["--steps", 4, "--normalisation", "scale", "--eval-every", 0, "--eval-rows", 8]
    run("reward_model", *pairs, *flags, "--output-dir", folder)
    return folder / "model"


def watch(monkeypatch, name: str) -> list:
    """Note the arguments and the result of every call of a function of ppo.py."""
    calls, real = [], getattr(ppo, name)

    def noted(*args, **kwargs):
        calls.append((args, real(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(ppo, name, noted)
    return calls


def test_ppo_detail_1_a_cut_completion_pays(tmp_path, monkeypatch):
    scored, given = watch(monkeypatch, "score"), watch(monkeypatch, "token_rewards")
    ppo.main(ppo.Args(**SMALL, **ON_ANSWERS, max_completion_tokens=9, missing_eos_penalty=0.7, eval_every=0,
                      output_dir=str(tmp_path)))  # fmt: skip
    ((_, _, scores, mask, _), _), total = given[0], scored[1][1]["total"].flatten()  # the first is the evaluation's
    was_cut = (scores - total + 0.7).abs() < 1e-6
    assert bool(((scores == total) | was_cut).all()) and 0 < was_cut.sum() < len(scores)
    assert bool((mask.sum(1)[was_cut] == 9).all())
    assert metrics(tmp_path)[1]["completions/truncated_fraction"] == pytest.approx(was_cut.double().mean().item())


def test_ppo_detail_2_ppo_detail_3_every_ratio_is_1_before_the_first_update(tmp_path, reward_folder):
    flags = ["--reward-model", reward_folder, "--steps", 1, "--batch-size", 8, "--eval-rows", 4, "--eval-every", 0]
    run("ppo", *flags, "--temperature", 0.6, "--update-epochs", 1, "--minibatches", 1, "--output-dir", tmp_path)
    row = metrics(tmp_path)[-1]
    assert row["policy/sampler_gap"] < 1e-6 and abs(row["policy/ratio_max"] - 1) < 1e-5
    assert row["policy/clip_fraction"] == 0 and row["policy/approx_kl"] < 1e-10
    assert abs(row["policy/kl_sequence"]) < 1e-4  # at step 1 the reference is the policy
    assert abs(metrics(tmp_path)[0]["eval/kl"]) < 1e-4


def test_ppo_detail_7_a_value_does_not_see_its_token(model):
    from common.generation import Completion

    critic = ppo.load_critic(ppo.Args(critic="policy", reward_model="none"), None, CPU).eval()
    torch.nn.init.normal_(critic.score.weight)
    rows = [[30, 31, 32, 33], [30, 31, 99, 33]]
    groups = [[Completion(ids, [0.0] * len(ids), True) for ids in rows]]
    with torch.no_grad():
        values = ppo.critic_values(critic, ppo.Rollout([[20, 21]], groups, CPU), [0, 1], False)
        alone = critic.model(input_ids=torch.tensor([[20, 21, *rows[0]]])).last_hidden_state
    torch.testing.assert_close(values[0, :3], values[1, :3])
    assert abs(values[0, 3] - values[1, 3]) > 1e-3
    torch.testing.assert_close(values[0], critic.score(alone)[0, 1:5, 0], atol=1e-4, rtol=1e-4)


def test_ppo_detail_14_epochs_shuffle_and_end_early(tmp_path, monkeypatch):
    chosen, rows_of = [], ppo.Rollout.rows_of
    monkeypatch.setattr(ppo.Rollout, "rows_of", lambda self, p: chosen.append(tuple(p)) or rows_of(self, p))
    for name, limit, epochs in (("all", None, 3), ("one", 1e-12, 1), ("far", 1e3, 3)):
        chosen.clear()
        row = ppo.main(ppo.Args(**{**SMALL, "batch_size": 8}, **ON_ANSWERS, update_epochs=3, max_approx_kl=limit,
                                learning_rate=1e-3, warmup_steps=0, output_dir=str(tmp_path / name)))  # fmt: skip
        assert row["policy/epochs"] == epochs and len(chosen) == 2 * epochs
        assert all(sorted(a + b) == list(range(8)) for a, b in zip(chosen[::2], chosen[1::2]))
    assert len({frozenset(part) for part in chosen[::2]}) > 1


def test_ppo_detail_16_the_critic_begins_as_the_normalised_reward_model(reward_folder, tokenizer):
    args = ppo.Args(reward_model=str(reward_folder))
    critic, score = ppo.load_critic(args, tokenizer, CPU).eval(), ppo.load_reward_model(args, CPU, False)
    chat = [{"role": "user", "content": "12+30=?"}]
    texts = ["<answer>42</answer>", "<think>12+30: 42</think><answer>42</answer>", "no"]
    rows = [render_chat(tokenizer, [*chat, {"role": "assistant", "content": text}]).ids for text in texts]
    with torch.no_grad():
        found = torch.stack([critic.score(ppo.last_hidden_states(critic, [row], CPU))[0, 0] for row in rows])
    torch.testing.assert_close(found, score([(chat, text) for text in texts]), atol=1e-5, rtol=1e-4)
    assert critic.config.reward_std != 1 and found.std() > 0
    plain = ppo.load_critic(ppo.Args(critic="policy", reward_model=str(reward_folder)), tokenizer, CPU)
    assert not plain.score.weight.any() and not plain.score.bias.any()


def test_ppo_detail_17_beta_0_holds_no_reference_while_it_trains(tmp_path, monkeypatch):
    alive, load, grads, step = [], ppo.load_model, [], ppo.optimizer_step
    monkeypatch.setattr(ppo, "load_model", lambda *a: alive.append(weakref.ref(m := load(*a))) or m)
    values = ppo.critic_values
    monkeypatch.setattr(ppo, "critic_values", lambda *a: grads.append(torch.is_grad_enabled()) or values(*a))

    def counted(*args):
        gc.collect()
        assert sum(ref() is not None for ref in alive) == models
        return step(*args)

    monkeypatch.setattr(ppo, "optimizer_step", counted)
    settings = {**SMALL, **ON_ANSWERS, "steps": 2, "eval_every": 1, "learning_rate": 1e-3, "microbatch_tokens": 60}
    for beta, models in ((0.0, 1), (0.1, 2)):  # noqa: B007, `counted` reads it
        alive.clear()
        grads.clear()
        row = ppo.main(ppo.Args(**settings, beta=beta, update_epochs=1, output_dir=str(tmp_path / str(beta))))
        assert row["eval/kl"] > 0 and len(alive) == (3 if beta == 0 else 2)
        assert grads.count(False) > 2 and grads.count(True) > 2  # old values in several microbatches, without gradient


def test_plain_reward_function_and_a_critic_from_the_policy(tmp_path):
    """As Tulu 3 does for verifiable rewards."""
    flags = ["--reward-model", "none", "--answer-weight", 1, "--critic", "policy", "--eval-every", 0, "--eval-rows", 96]
    run("ppo", *flags, "--steps", 5, "--warmup-steps", 1, "--output-dir", tmp_path)
    rows = metrics(tmp_path)
    assert rows[-1]["eval/accuracy"] > rows[0]["eval/accuracy"] + 0.1
    assert rows[-1]["eval/accuracy_greedy"] > rows[0]["eval/accuracy_greedy"] + 0.5
    assert rows[-1]["reward/gold"] == rows[-1]["reward/answer"] == rows[-1]["reward/mean"]


def test_learning_rate_0_trains_the_critic_alone(tmp_path):
    run("ppo", *ppo_flags(), "--learning-rate", 0, "--output-dir", tmp_path)
    assert abs(metrics(tmp_path)[-1]["eval/kl"]) < 1e-4 and metrics(tmp_path)[-1]["policy/approx_kl"] < 1e-10
    assert metrics(tmp_path)[-1]["value/mean"] != 0


def test_ptx_mixes_demonstrations_in(tmp_path, tokenizer):
    """With a large weight the run learns from the demonstrations alone."""
    flags = [*ppo_flags(), "--ptx-dataset", TINY / "demonstrations_train.jsonl", "--ptx-weight", 5, "--steps", 6]
    run("ppo", *flags, "--output-dir", tmp_path / "ptx")
    losses = [row["loss/ptx"] for row in metrics(tmp_path / "ptx")[1:]]
    assert losses[-1] < 0.7 * losses[0]
    chat = '{"prompt": "1+1=?", "completion": "2"}\n'
    found = ppo.encode_demonstrations(tokenizer, [json.loads(chat)], "x", 100)
    assert tokenizer.decode(found[0][0]) + tokenizer.decode(found[0][1]) == tokenizer.decode(
        render_chat(tokenizer, [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]).ids
    )
    long = write(tmp_path / "long.jsonl", [{"prompt": "q" * 600, "completion": "2"}])
    told = refuses("ppo", *ppo_flags(), "--ptx-dataset", long)
    assert "1 of 1 demonstrations dropped" in told and "none of its rows" in told


def ppo_flags() -> list:
    flags = ["--reward-model", "none", "--answer-weight", 1, "--critic", "policy", "--batch-size", 4]
    return [*flags, "--num-samples", 2, "--eval-every", 0, "--eval-rows", 4, "--eval-samples", 1, "--steps", 2]


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------------------------------------- leash and picture


def test_controller_tightens_and_loosens_and_says_where_it_failed(tmp_path):
    far = ["--beta", "0.001", "--kl-target", "0.001", "--kl-horizon", 100, "--learning-rate", "1e-3"]
    told = run("ppo", *ppo_flags(), *far, "--steps", 4, "--warmup-steps", 0, "--output-dir", tmp_path / "far")
    betas = [row["policy/beta"] for row in metrics(tmp_path / "far")[1:]]
    assert betas[-1] > betas[0] and "was not held" in told and "--kl-horizon" in told
    told = run("ppo", *ppo_flags(), "--kl-target", 1000, "--output-dir", tmp_path / "near")
    betas = [row["policy/beta"] for row in metrics(tmp_path / "near")[1:]]
    assert betas[1] < betas[0] == ppo.Args.beta and "never reached" in told
    run("ppo", *ppo_flags(), "--kl-target", "None", "--output-dir", tmp_path / "fixed")
    assert {row["policy/beta"] for row in metrics(tmp_path / "fixed")[1:]} == {ppo.Args.beta}


def test_a_run_ends_where_it_is_too_far_from_the_reference(tmp_path):
    wild = ["--learning-rate", "3e-3", "--warmup-steps", 0, "--beta", 0, "--eval-every", 1, "--steps", 9]
    told = run("ppo", *ppo_flags(), *wild, "--stop-kl", 0.05, "--output-dir", tmp_path)
    rows = metrics(tmp_path)
    assert len(rows) < 9 and rows[-1]["eval/kl"] > 0.05 and all(row["eval/kl"] <= 0.05 for row in rows[:-1])
    for name in ("overoptimisation.png", "model/model.safetensors", f"checkpoints/step-{len(rows) - 1:06d}/state.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert "--stop-kl ends the run at step" in told
    assert "the run has ended" in refuses("ppo", "--resume", tmp_path)


def test_proxy_and_gold_stand_side_by_side(tmp_path, reward_folder):
    flags = [*ppo_flags(), "--reward-model", reward_folder, "--answer-weight", 0, "--critic", "reward_model"]
    run("ppo", *flags, "--output-dir", tmp_path)
    before, row = metrics(tmp_path)[0], metrics(tmp_path)[-1]
    assert {"eval/reward", "eval/accuracy", "eval/kl"} <= set(before) & set(row)
    assert row["reward/model"] == row["reward/mean"] != row["reward/gold"]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    first = [sample["reward"] for sample in samples if sample["step"] == 0]  # the proxy of each; one sample a question
    assert sum(first) / len(first) == pytest.approx(before["eval/reward"], abs=1e-5)


# ---------------------------------------------------------------------------------------------- bad input


def test_a_missing_reward_model_is_told_with_the_command_that_makes_it(tmp_path):
    shutil.copy(ROOT / "ppo.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    told = fails("ppo", cwd=tmp_path)
    assert "runs/reward_model/latest/model: there is none yet" in told and "python reward_model.py" in told


@pytest.mark.parametrize("flags,sentence", [
    (["--reward-model", "none", "--critic", "policy"], "nothing to reward: add --answer-weight 1"),
    (["--reward-model", "none", "--answer-weight", 1], "add --critic policy"),
    (["--reward-model", "no/where"], "no folder with a model"),
    (["--reward-model", TINY], "one label"),
    (["--beta", -1], "--beta must be 0 or more"),
    (["--kl-target", 0], "--kl-target above 0"),
    (["--minibatches", 3], "divided into --minibatches 3"),
    (["--update-epochs", 0], "--update-epochs must be at least 1"),
    (["--temperature", 0], "above 0"),
    (["--max-completion-tokens", 0], "--max-completion-tokens must be at least 1"),
    (["--eval-samples", 0], "--eval-samples must be at least 1"),
    (["--max-approx-kl", 0], "--max-approx-kl must be above 0"),
    (["--dual-clip", 1], "--dual-clip above 1"),
    (["--stop-kl", 2, "--eval-every", 0], "give --eval-every"),
    (["--max-completion-tokens", 512], "whole context"),
    (["--ptx-dataset", "nowhere.jsonl"], "no such file"),
])  # fmt: skip
def test_settings_of_ppo(flags, sentence, tmp_path):
    base = [] if "--reward-model" in flags else ["--reward-model", "none", "--answer-weight", 1, "--critic", "policy"]
    assert sentence in refuses("ppo", *base, *flags, "--output-dir", tmp_path / "run")


def test_reward_models_that_cannot_serve(tmp_path, reward_folder):
    from safetensors.torch import load_file, save_file

    shutil.copytree(reward_folder, tmp_path / "nan")
    weights_ = load_file(tmp_path / "nan" / "model.safetensors")
    weights_["score.weight"][:] = float("nan")
    save_file(weights_, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    small = [*ppo_flags(), "--answer-weight", 0, "--critic", "reward_model"]
    told = refuses("ppo", *small, "--reward-model", tmp_path / "nan", "--output-dir", tmp_path / "run1")
    assert "gave no number for" in told and "weights" in told
    shutil.copytree(reward_folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    path.write_text(json.dumps(content))
    small += ["--reward-model", tmp_path / "other"]
    assert "its tokenizer is not that of" in (told := refuses("ppo", *small, "--output-dir", tmp_path / "run2"))
    assert "--critic policy" in told
    run("ppo", *small, "--critic", "policy", "--output-dir", tmp_path / "run3")


def test_completions_that_are_all_cut(tmp_path):
    told = run("ppo", *ppo_flags(), "--max-completion-tokens", 2, "--output-dir", tmp_path)
    assert told.count("Every completion of step") == 1 and "raise --max-completion-tokens" in told
