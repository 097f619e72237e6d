"""dapo.py: each of its five changes by known answers, and dynamic sampling with batches that fill and that do not."""

import json

import pytest
import torch
from conftest import TINY, fails, first_rows, metrics, refuses, run

import dapo
from common.generation import Completion

SMALL = ["--steps", 2, "--warmup-steps", 1, "--eval-every", 0, "--eval-rows", 4, "--eval-samples", 1, "--num-samples",
         4, "--batch-size", 4, "--minibatches", 1]  # fmt: skip


def close(value, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(value).float(), torch.tensor(expected).float(), atol=tolerance, rtol=0)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


# ---------------------------------------------------------------------------------------------- the formulas


def test_t21_dapo_detail_1_advantages():
    close(dapo.standardised_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]])), [[1.5, -0.5, -0.5, -0.5]], 1e-4)
    assert (dapo.standardised_advantages(torch.full((3, 8), 0.1)) == 0).all()


def test_t15_t24_dapo_detail_5_clip_higher():
    rho, advantages = column(1.5, 1.5, 0.5, 0.5), column(1.0, -1.0, 1.0, -1.0)
    logprobs = rho.log().requires_grad_(True)
    losses, ratio = dapo.dapo_loss(logprobs, torch.zeros(4, 1), advantages, torch.ones(4, 1), 0.2, 0.2)
    close(losses.detach(), [[-1.2], [1.5], [-0.5], [0.8]])
    close(ratio, rho.tolist())
    gradient = torch.autograd.grad(losses.sum(), logprobs)[0][:, 0]
    assert gradient[0] == 0 and gradient[3] == 0 and gradient[1] != 0 and gradient[2] != 0
    one = (column(1.25).log(), column(0.0), column(1.0), column(1.0), 0.2)
    close(dapo.dapo_loss(*one, 0.28)[0], [[-1.25]])
    close(dapo.dapo_loss(*one, 0.2)[0], [[-1.2]])


def test_t15_dapo_detail_12_dual_clip_bounds_negative_advantages_alone():
    rho, advantages = column(5.0, 5.0, 2.0), column(-1.0, 1.0, -1.0)
    arguments = (rho.log(), torch.zeros(3, 1), advantages, torch.ones(3, 1), 0.2, 0.28)
    close(dapo.dapo_loss(*arguments, 3.0)[0], [[3.0], [-1.28], [2.0]])
    close(dapo.dapo_loss(*arguments)[0], [[5.0], [-1.28], [2.0]])


def test_t25_dapo_detail_11_soft_overlong_punishment():
    lengths = torch.tensor([1, 16384, 18432, 20480, 20481])
    close(dapo.overlong_punishment(lengths, 20480, 4096), [0, 0, -0.5, -1, -1])
    close(dapo.overlong_punishment(lengths, 20480, 0), [0, 0, 0, 0, 0])


def group(number: int, correct: list[bool], lengths: list[int]) -> dapo.Group:
    return dapo.Group(number, [Completion([9] * n, [-0.5] * n, True) for n in lengths], correct)


def test_t26_dapo_detail_6_groups_are_kept_by_accuracy_not_by_reward():
    groups = [
        group(0, [True] * 4, [5, 5, 5, 5]),
        group(1, [False] * 4, [5, 5, 5, 5]),
        group(2, [True, False, False, True], [5, 5, 5, 5]),
        group(3, [True] * 4, [5, 50, 60, 64]),  # all right, rewards unequal by their lengths
    ]
    rewards = dapo.rewards_of(groups, dapo.Args(overlong_cache=16))
    assert rewards["total"][3].std() > 0 and rewards["answer"][1].tolist() == [-1] * 4
    assert [g.number for g in groups if dapo.is_mixed(g.correct)] == [2]


def test_t22_dapo_detail_7_token_level_loss():
    losses = torch.tensor([[1.0, 9.0, 9.0], [2.0, 2.0, 2.0]])
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    for token_level, expected in ((True, 1.75), (False, 1.5)):
        close(dapo.mean_over_step(losses, mask, token_level, 2, 4), expected)
        parts = [dapo.mean_over_step(losses[i : i + 1], mask[i : i + 1], token_level, 2, 4) for i in range(2)]
        close(sum(parts), expected)
        close(dapo.mean_over_step(losses, mask * 0, token_level, 0, 0), 0.0)  # nothing left after filtering


def test_dapo_detail_10_questions_are_passes_that_are_each_shuffled_anew():
    data = dapo.Questions([{"n": n} for n in range(7)], seed=1)
    passes = [[data[7 * k + n]["n"] for n in range(7)] for k in range(3)]
    assert all(sorted(order) == list(range(7)) for order in passes) and len({tuple(order) for order in passes}) == 3
    assert dapo.Questions([{"n": n} for n in range(7)], seed=1)[15]["n"] == passes[2][1]


# ---------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("seed", [1, 2])
def test_dapo_learns(seed, tmp_path):
    """And details 3 and 10: before a rollout's first update every ratio is 1, at any temperature."""
    run("dapo", "--seed", seed, "--steps", 9, "--eval-every", 0, "--eval-rows", 96, "--output-dir", tmp_path)
    rows = metrics(tmp_path)
    assert rows[0]["eval/accuracy"] <= 0.5 and rows[-1]["eval/accuracy"] >= 0.8
    assert rows[-1]["eval/completion_length"] > rows[0]["eval/completion_length"] + 8
    assert max(r["policy/sampler_gap"] for r in rows[1:]) < 1e-6
    assert max(r["policy/ratio_max"] for r in rows[1:]) > 1.01  # later minibatches are off-policy: clipping has a use
    generated, trained = rows[-1]["prompts/generated"], rows[-1]["prompts/trained"]
    assert trained == 9 * 16 and generated == 32 * sum(r["prompts/rounds"] for r in rows[1:]) > trained


def test_dapo_detail_3_temperature_divides_logits(tmp_path):
    run("dapo", *SMALL, "--temperature", 0.6, "--output-dir", tmp_path)
    row = metrics(tmp_path)[1]
    assert row["policy/sampler_gap"] < 1e-6 and abs(row["policy/ratio_max"] - 1) < 1e-5


def test_dapo_detail_13_metrics_are_of_all_that_was_generated(tmp_path):
    run("dapo", *SMALL, "--output-dir", tmp_path)
    rows = metrics(tmp_path)[1:]
    assert all(r["groups/all_correct"] + r["groups/all_wrong"] > 0 for r in rows)  # of the trained ones none is


def test_dapo_detail_8_cut_completions_leave_the_loss_but_not_the_baseline(tmp_path, monkeypatch):
    losses, real, seen = [], dapo.mean_over_step, []
    monkeypatch.setattr(dapo, "mean_over_step", lambda *a: losses.append(a[1:]) or real(*a))
    rewards = dapo.standardised_advantages
    monkeypatch.setattr(dapo, "standardised_advantages", lambda r: seen.append(rewards(r)) or seen[-1])
    small = {"steps": 1, "batch_size": 4, "minibatches": 1, "num_samples": 4, "eval_rows": 2, "eval_samples": 1}
    budget = {"max_completion_tokens": 16, "overlong_cache": 0}
    found = {}
    for filtering in (False, True):
        losses.clear()
        dapo.main(dapo.Args(**small, **budget, overlong_filtering=filtering, output_dir=str(tmp_path / str(filtering))))
        mask, _, sequences, tokens = losses[0]
        assert sequences == mask.any(1).sum() and tokens == mask.sum()
        found[filtering] = mask
    cut = ~found[True].any(1)
    assert 0 < cut.sum() < 16 and found[False].any(1).all()
    assert (found[False][cut].sum(1) == 16).all()  # those that took the whole budget
    torch.testing.assert_close(seen[0], seen[1])
    assert seen[1].flatten()[cut].abs().sum() > 0


def test_surplus_is_kept_or_dropped(tmp_path):
    flags = [*SMALL, "--generation-batch-size", 24]
    run("dapo", *flags, "--output-dir", tmp_path / "drop")
    run("dapo", *flags, "--surplus", "keep", "--output-dir", tmp_path / "keep")
    dropped, kept = (metrics(tmp_path / name) for name in ("drop", "keep"))
    assert [r["prompts/generated"] for r in dropped[1:]] == [24, 48]
    assert [r["prompts/generated"] for r in kept[1:]] == [24, 24]  # the first round's surplus is the second batch
    assert [r["prompts/rounds"] for r in kept[1:]] == [1, 0] and "reward/mean" not in kept[2]
    carried = json.loads((tmp_path / "keep/checkpoints/step-000002/state.json").read_text())["carried"]
    assert carried["surplus"] and all(len(group[1]) == 4 for group in carried["surplus"])


def test_the_next_command_measures_the_model_on_the_same_data(tmp_path):
    data = first_rows("maths_train.jsonl", 40)
    flags = ["--dataset", data, "--eval-dataset", TINY / "maths_test.jsonl", "--max-completion-tokens", 48]
    output = run("dapo", *SMALL, *flags, "--output-dir", tmp_path / "run")
    command = output.strip().splitlines()[-1].split("python rlvr_math.py ")[1].split()
    assert command[-6:] == list(map(str, flags))
    run("rlvr_math", *command, "--eval-rows", 4, "--eval-samples", 2, "--output-dir", tmp_path / "evaluation")


def test_all_five_changes_off_is_plain_grpo(tmp_path):
    off = ["--clip-high", 0.2, "--no-dynamic-sampling", "--no-token-level-loss", "--overlong-cache", 0]
    run("dapo", *SMALL, *off, "--output-dir", tmp_path)
    rows = metrics(tmp_path)[1:]
    assert [r["prompts/generated"] for r in rows] == [r["prompts/trained"] for r in rows] == [4, 8]
    assert all(r["reward/overlong"] == 0 for r in rows)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("answer,sentence,advice", [
    ("nothing", "0% are all right, 100% all wrong", "cannot solve these prompts"),
    ("right", "100% are all right, 0% all wrong", "has learned these prompts"),
    ("half", "50% are all right, 50% all wrong", "Some prompts are learned and the rest are out of reach"),
])  # fmt: skip
def test_a_batch_that_cannot_be_filled(answer, sentence, advice, tmp_path, monkeypatch, capfd):
    judged = {"nothing": lambda n: False, "right": lambda n: True, "half": lambda n: n.number % 2 == 0}[answer]
    real = dapo.sample_groups
    monkeypatch.setattr(dapo, "sample_groups", lambda *a: [g._replace(correct=[judged(g)] * 2) for g in real(*a)])
    small = {"batch_size": 2, "minibatches": 1, "num_samples": 2, "eval_rows": 2, "eval_samples": 1}
    args = dapo.Args(**small, max_rounds=2, generation_batch_size=4, output_dir=str(tmp_path))
    with pytest.raises(SystemExit) as exit:
        dapo.main(args)
    told = str(exit.value)
    assert sentence in told and advice in told and "2 rounds of 4 prompts there are 0 groups" in told
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert f"next: python dapo.py --model {tmp_path / 'model'} --max-rounds 4" in capfd.readouterr().out


def test_what_was_learned_before_a_batch_cannot_be_filled_is_measured(tmp_path, monkeypatch):
    calls, real = [], dapo.sample_groups

    def solved_after_the_first_round(*arguments):
        calls.append(arguments)
        return [g._replace(correct=[len(calls) > 1, True]) for g in real(*arguments)]

    monkeypatch.setattr(dapo, "sample_groups", solved_after_the_first_round)
    small = {"batch_size": 2, "minibatches": 1, "num_samples": 2, "eval_rows": 2, "eval_samples": 1, "eval_every": 0}
    with pytest.raises(SystemExit, match="100% are all right"):
        dapo.main(dapo.Args(**small, max_rounds=1, generation_batch_size=4, output_dir=str(tmp_path)))
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 1] and "eval/accuracy" in rows[-1]
    assert (tmp_path / "checkpoints" / "step-000001").exists()  # before the model, whose saving may fail


def test_two_processes_end_a_batch_that_cannot_be_filled(tmp_path):
    """After steps that were taken: what they have brought is measured, and the sentence told once."""
    easy = tmp_path / "easy.jsonl"
    easy.write_text('{"prompt": "1+1=?", "answer": "none of these"}\n' * 30)
    told = fails("dapo", *SMALL, "--max-rounds", 1, "--dataset", easy, "--eval-dataset", TINY / "maths_test.jsonl",
                 "--output-dir", tmp_path / "run", processes=2)  # fmt: skip
    assert told.count("100% all wrong") == 1 and (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_resume_goes_on_with_the_surplus(tmp_path):
    flags = [*SMALL, "--surplus", "keep", "--generation-batch-size", 12, "--save-every", 1]
    run("dapo", *flags, "--steps", 3, "--output-dir", tmp_path / "whole")
    run("dapo", *flags, "--steps", 1, "--lr-schedule", "constant", "--output-dir", tmp_path / "part")
    state = json.loads((tmp_path / "part/checkpoints/step-000001/state.json").read_text())
    assert state["carried"]["surplus"] and state["carried"]["drawn"] == 12
    run("dapo", "--resume", tmp_path / "part", "--steps", 3)
    for a, b in zip(metrics(tmp_path / "whole")[1:], metrics(tmp_path / "part")[1:], strict=True):
        same = {"prompts/generated", "policy/entropy", "optim/grad_norm", "loss/policy"}
        assert {k: a[k] for k in same} == {k: b[k] for k in same}


def test_settings_of_dapo():
    assert "siblings" in refuses("dapo", "--num-samples", 1)
    assert "--minibatches" in refuses("dapo", "--batch-size", 4, "--minibatches", 3)
    told = refuses("dapo", "--overlong-cache", 64)
    assert "--overlong-cache 64 must be below the budget" in told
    assert "--dual-clip 0.5 must be above 1" in refuses("dapo", "--dual-clip", 0.5)
    assert "--clip-low 2.0 must lie in" in refuses("dapo", "--clip-low", 2)
    assert "--eval-rows 0 must be at least 1" in refuses("dapo", "--eval-rows", 0)
    assert "can never fill" in refuses("dapo", "--max-rounds", 1, "--generation-batch-size", 8)
    assert "needs the columns prompt + answer" in refuses("dapo", "--dataset", TINY / "corpus.jsonl")
