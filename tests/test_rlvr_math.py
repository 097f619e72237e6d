"""rlvr_math.py: its verifier on recorded judgements and hostile answers, the dial, test-time compute."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, cases, lines_of, metrics, run
from test_core import quick
from test_mathematics import close

import rlvr_math
from common.generation import Completion, Sampler
from common.kl import RewardModel
from common.tokenizer import encode_prompt, stop_token_ids
from rlvr_math import WORKERS, grade, normal_form, number, stated_answer, winner

# ---------------------------------------------------------------------------------------------- the verifier


def test_rlvr_math_detail_4_what_is_stated_last_is_the_answer():
    assert [row for row in cases("completion", "stated") if stated_answer(row["completion"]) != row["stated"]] == []


def test_plain_numbers():
    for row in cases("number", "value", "unit"):
        value, unit = number(normal_form(row["number"]))
        assert (float(value), unit) == (row["value"], row["unit"])
    assert [row for row in cases("number", "value") if number(normal_form(row["number"]))] == []


@pytest.mark.parametrize("how", ["<answer>{}</answer>", "so \\boxed{{{}}}", "#### {}", "The answer is {}."])
def test_rlvr_math_detail_5_no_false_accept_however_it_is_stated(how):
    rows = cases("gold", "answer", "right")
    assert [row for row in rows if grade(how.format(row["answer"]), row["gold"]).correct is not row["right"]] == []


def test_t30_what_real_models_and_data_sets_write():
    rows = cases("gold", "completion", "right")
    grades = WORKERS.map(lambda row: grade(row["completion"], row["gold"]), rows)
    assert [(row, found) for row, found in zip(rows, grades) if found.correct is not row["right"]] == []
    for row in cases("gold", "completion", "how", "right"):  # several gold answers, none, and no answers
        found = grade(row["completion"], row["gold"])
        assert (found.correct, found.how) == (row["right"], row["how"])


def test_verifier_agrees_with_recorded_judgements_and_is_fast():
    """300 model solutions of GSM8K, each with its recorded correctness (openai/grade-school-math, MIT)."""
    rows, began = lines_of(ROOT / "tests" / "gsm8k_solutions.jsonl"), time.process_time()
    assert [row for row in rows if grade(row["solution"], row["gold"]).correct != row["correct"]] == []
    assert sum(row["correct"] for row in rows) == 150 and time.process_time() - began < 0.15


def compares_again() -> bool:
    rlvr_math.is_equal.cache_clear()
    return grade("\\boxed{1+x}", "x+1").correct


def test_rlvr_math_detail_6_t30_a_bomb_costs_its_limit_and_blocks_nobody(monkeypatch):
    assert compares_again()
    both = threading.Barrier(2)
    list(WORKERS.map(lambda n: both.wait() is None or grade(f"\\boxed{{{n}+y}}", f"y+{n}"), range(2)))  # they are up
    pending = WORKERS.submit(grade, "\\boxed{9^{9^{9}}}", "\\sqrt{2}")
    time.sleep(0.1)
    found = WORKERS.map(grade, [f"\\boxed{{{n}+x}}" for n in range(8)], [f"x+{n // 2 * 2}" for n in range(8)])
    assert [one.correct for one in found] == [True, False] * 4
    assert not pending.done() and pending.result() == (False, "9^{9^{9}}", "timeout")
    monkeypatch.setattr(rlvr_math, "LIMIT", 1.0)
    began = time.monotonic()
    assert grade("\\boxed{(10^9)!}", "n!") == grade("\\boxed{(10^9)!}", "n!") == (False, "(10^9)!", "timeout")
    assert 1 <= time.monotonic() - began < 1.9 and compares_again()  # the second time it is known
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match="can import math_verify"):
        ThreadPoolExecutor(1).submit(grade, "\\boxed{3+x}", "x+3").result()


def test_odd_answers_are_wrong_and_quick():
    for answer in (
        "{" * 1_000_000, "(" * 150 + "x" + ")" * 150, "\\frac{" * 60 + "1" + "}{2}" * 60, "\\boxed{" * 1000, "()",
        "\x00\ud800", "1" * 390 + "x", "x" * 1_000_000, "\n" * 1000 + "A: " * 100, "<answer>" * 100_000, "3+" * 190,
        "x^" * 100 + "2", "(" + "a ," * 90 + "a|)", "\\boxed{1}" + " " * 1_000_000 + "\\boxed{2}", "0." + "9" * 390,
    ):  # fmt: skip
        for text in (f"<answer>{answer}</answer>", f"\\boxed{{{answer}}}", f"The answer is {answer}"):
            began = time.monotonic()
            assert grade(text, "x+1").correct is False and grade(text, "(p,q)=(3,2)").correct is False
            assert time.monotonic() - began < 2 * rlvr_math.LIMIT + 7  # the start of a process on a busy machine


def test_no_worker_outlives_its_parent():
    """Neither one that waits, nor one that is at a comparison without end when its parent is killed."""
    code = "import rlvr_math as r; r.LIMIT = 2; r.grade('\\\\boxed{1+x}', 'x+1')\n"
    code += "pid = r.WORKERS.submit(lambda: r.grade('\\\\boxed{2+x}', 'x+2') and r.OWN.process.pid).result()\n"
    code += "print(pid, r.OWN.process.pid, flush=True); r.grade('\\\\boxed{9^{9^{9}}}', '\\\\sqrt{2}')"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = [Path("/proc", worker, "status") for worker in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    assert len(set(workers)) == 2
    deadline = time.monotonic() + 10
    while any(worker.exists() and "zombie" not in worker.read_text() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------- training


def spied(monkeypatch, name: str) -> list:
    """Arguments and results of a function of rlvr_math that a run calls."""
    calls, real = [], getattr(rlvr_math, name)

    def noting(*args, **kwargs):
        calls.append((*args, kwargs, real(*args, **kwargs)))
        return calls[-1][-1]

    monkeypatch.setattr(rlvr_math, name, noting)
    return calls


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_the_kl_is_k1_in_rloos_reward_and_k3_in_other_losses(algorithm, tmp_path, monkeypatch):
    """All rewards are equal, and the reference is another model: only the KL is left."""
    monkeypatch.setattr(rlvr_math, "evaluate", lambda *args: ({}, []))
    monkeypatch.setattr(rlvr_math, "reward", lambda *args: 0.5)
    sums, policies, kls = [spied(monkeypatch, name) for name in ("mean_loss", "token_losses", "kl_estimate")]

    def other(*args, load=rlvr_math.frozen):
        reference = load(*args)
        torch.nn.init.constant_(reference.model.norm.weight, 1.5)
        return reference

    monkeypatch.setattr(rlvr_math, "frozen", other)
    settings = {"algorithm": algorithm, "beta": 0.5, "batch_size": 1, "num_samples": 4, "importance_cap": 0.0}
    row = quick("rlvr_math", tmp_path, **settings)
    (_, old, advantages, mask, *_, (policy_losses, ratio)), (_, ref, *_, k3) = policies[0], kls[0]
    kl = ((old - ref) * mask).sum(1)
    assert (ratio == 1).all() and kl.abs().min() > 1e-3 and row["policy/kl"] > 0
    others = (kl.sum() - kl) / 3
    close(advantages[:, 0], (-0.5 * (kl - others) if algorithm == "rloo" else 0 * kl).tolist())
    torch.testing.assert_close(sums[0][0], policy_losses + 0.5 * k3 * (algorithm == "grpo"))


@pytest.mark.parametrize("beta,forwarded", [(0.0, {0, 3}), (0.1, {0, 1, 2, 3, 4, 5})])
def test_rlvr_math_detail_7_expert_iteration_and_rows_that_need_no_forward(beta, forwarded, tmp_path, monkeypatch):
    """It trains on right completions, no two alike, up to a cap; without a KL, rows without advantage are left out."""
    group = [Completion(ids, [-1.0] * len(ids), ids != [2]) for ids in ([1], [1], [2], [3, 3], [1], [4])]
    right = torch.tensor([[float(c.stopped) for c in group]])
    assert rlvr_math.first_right(group * 2, right.repeat(2, 1), 2).tolist() == [[1, 0, 0, 1, 0, 0]] * 2
    monkeypatch.setattr(rlvr_math, "evaluate", lambda *args: ({}, []))
    monkeypatch.setattr(rlvr_math, "reward", lambda found, stopped: float(stopped))
    monkeypatch.setattr(rlvr_math.Sampler, "generate", lambda self, prompts, *args: [list(group) for _ in prompts])
    calls, forwards = [spied(monkeypatch, name) for name in ("mean_loss", "completion_logprobs")]
    settings = {"algorithm": "expert_iteration", "batch_size": 1, "num_samples": 6, "keep_per_question": 2}
    row = quick("rlvr_math", tmp_path, **settings, beta=beta)
    ((losses, mask, how, _, tokens, *_),) = calls
    assert how == "token" and tokens == mask.sum() == 3 and (losses >= 0).all()  # −log π of [1] and [3, 3]
    assert row["reward/mean"] == pytest.approx(5 / 6)  # of all that was sampled
    assert {number for _, part, *_ in forwards for number in part} == forwarded


def test_rlvr_math_detail_3_r1_zeros_template_ends_at_its_answer(tmp_path, monkeypatch, tokenizer):
    from transformers import AutoTokenizer

    letters = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))  # a tag in many tokens
    for text, end, stopped in (("a</answer>b</answer>", 10, True), ("a</answer", 9, False)):
        found = rlvr_math.until_answer(letters, Completion(list(map(ord, text)), list(range(len(text))), False))
        assert found == Completion(list(map(ord, text[:end])), list(range(end)), stopped)
    ids = tokenizer.encode("1</think><answer>2</answer>, as was to be shown", add_special_tokens=False)
    said = Completion(ids, [-1.0] * len(ids), False)
    monkeypatch.setattr(rlvr_math.Sampler, "generate", lambda self, prompts, *args, **more: [[said] * 2] * len(prompts))
    row = quick("rlvr_math", tmp_path, template="r1_zero", max_prompt_tokens=500, instruction="Not asked!")
    assert row["completions/truncated_fraction"] == row["eval/truncated_fraction"] == row["answers/none"] == 0
    assert row["completions/length_mean"] == ids.index(10) + 1 < len(ids)
    sample = lines_of(tmp_path / "samples.jsonl")[0]
    assert sample["completion"] == "<think>1</think><answer>2</answer>" and "Not asked" not in sample["prompt"]
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")  # which sft.py can go on with
    chat = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": sample["completion"]}]
    asked = saved.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("User: 1+1=?\nAssistant: <think>")
    assert saved.apply_chat_template(chat, tokenize=False) == asked + "1</think><answer>2</answer><|end|>"


@pytest.mark.parametrize("name,seed,steps", [
    ("grpo", 1, 8), ("grpo", 2, 8), ("reinforce", 1, 4), ("rloo", 1, 4), ("dr_grpo", 1, 4), ("expert_iteration", 1, 4),
])  # fmt: skip
def test_rlvr_math_learns(name, seed, steps, tmp_path):
    flags = ["--algorithm", name, "--seed", seed, "--steps", steps, "--warmup-steps", 1, "--learning-rate", "1e-3"]
    flags += ["--eval-every", 0, "--eval-rows", 64, "--eval-samples", 4, "--output-dir", tmp_path / "rl"]
    if name == "expert_iteration":
        flags += ["--save-verified", "--keep-per-question", 2, "--instruction", " "]
    run("rlvr_math", *flags)
    before, *rows, after = metrics(tmp_path / "rl")
    assert after["eval/accuracy"] > before["eval/accuracy"] + 0.15
    assert all(row["policy/sampler_gap"] < 1e-6 and row["policy/clip_fraction"] == 0 for row in rows)
    if name == "grpo":
        assert before["eval/accuracy"] <= 0.5 and after["eval/accuracy"] >= 0.68
        assert after["eval/accuracy_greedy"] >= 0.9 and 0 < after["eval/accuracy_margin"] < 0.1
        assert after["eval/completion_length"] > before["eval/completion_length"] + 6
    if name == "expert_iteration":  # its samples, no two alike, two of a question, are data for sft.py
        rows, verified = lines_of(tmp_path / "rl" / "verified.jsonl"), str(tmp_path / "rl" / "verified.jsonl")
        assert all(grade(row["completion"], row["answer"]).correct for row in rows)
        prompts = [json.dumps(row["prompt"]) for row in rows]
        assert max(map(prompts.count, prompts)) == 2 and all('=? "' in prompt for prompt in prompts)
        assert len({(prompt, row["completion"]) for prompt, row in zip(prompts, rows)}) == len(rows)
        assert quick("sft", tmp_path / "sft", dataset=(verified,), eval_dataset=verified)["loss/train"] > 0


# ---------------------------------------------------------------------------------------------- test-time compute


def test_t27_t28_t29_rlvr_math_detail_8_evaluation_by_hand(monkeypatch, tokenizer):
    """Two questions with four samples each, and the greedy one behind them."""
    assert winner(["7", "7", "9"], [1.0] * 3) == "7" and winner(["7", "7", "9"], [0.2, 0.3, 0.6]) == "9"
    assert winner(["1", "2", "2", "1"], [1.0] * 4) == "1" and winner(["", "", True], [1.0] * 3) is True
    said = [["7", "07", "5", "5", "5"], ["5", "-", "-", "5", "6"]]
    scores = {"7": 1.0, "07": 1.0, "5": 3.0, "-": 9.0, "6": 0.0}
    found = {}
    for place, answers in enumerate(said):
        texts = [f"<answer>{answer}</answer>" if answer != "-" else "-" for answer in answers]
        group = [Completion(tokenizer(text).input_ids, [], i != 1) for i, text in enumerate(texts)]
        found[place] = {"ids": [30], "prefill": "", "row": {"prompt": "?", "answer": ["5"]}}, group, texts
    monkeypatch.setattr(rlvr_math, "sample_answers", lambda *args, **kwargs: found)
    reranker = lambda row, texts: torch.tensor([scores[text.strip("</answer>")] for text in texts])  # noqa: E731
    args, sampler = rlvr_math.Args(eval_samples=4, steps=1), SimpleNamespace(sync=lambda: None)
    row, samples = rlvr_math.evaluate(sampler, tokenizer, [], reranker, args, 0, 1)
    pairs = ["5" in pair for answers in said for pair in combinations(answers[:4], 2)]
    expected = {"accuracy": 0.5, "accuracy_greedy": 0.5, "completion_length": 2.625, "truncated_fraction": 0.25}
    expected |= {"pass@2": sum(pairs) / 12, "pass@4": 1.0, "maj@2": 0.5, "maj@4": 0.5, "best@2": 0.5, "best@4": 1.0}
    expected |= {"weighted@2": 0.5, "weighted@4": 1.0, "accuracy_margin": 0.0}
    assert row == pytest.approx({f"eval/{name}": value for name, value in expected.items()})
    assert [sample["reward"] for sample in samples] == [0.0, 1.0]
    found[1][1][3] = found[1][1][1]  # now one in four: 0.5 and 0.25
    row, _ = rlvr_math.evaluate(sampler, tokenizer, [], None, args, 0, 1)
    assert row["eval/accuracy_margin"] == pytest.approx(1.96 * 0.125) and "eval/best@2" not in row
    assert row["eval/pass@2"] == pytest.approx((5 / 6 + 1 / 2) / 2)


def test_reasoning_over_its_budget_is_cut_and_the_answer_forced(tokenizer, model):
    sampler = Sampler(model, stop_token_ids(tokenizer))
    ids = encode_prompt(tokenizer, "47*8=?") + tokenizer.encode("<think>", add_special_tokens=False)
    cue = tokenizer.encode("</think><answer>", add_special_tokens=False)
    for budget, is_forced in ((6, True), (60, False)):
        cut = sampler.generate([ids] * 2, budget, 4)
        answered = {place: ({"ids": ids}, list(group), []) for place, group in enumerate(cut)}
        args = rlvr_math.Args(max_think_tokens=budget, max_completion_tokens=64, eval_samples=3)
        rlvr_math.force_answers(sampler, tokenizer, answered, args)
        for before, after in zip(sum(cut, []), answered[0][1] + answered[1][1]):
            assert after == before if before.stopped else after.ids[: budget + 2] == before.ids + cue
            assert tokenizer.decode(after.ids).count("</think>") == 1 and len(after.ids) <= 64
            assert before.stopped != is_forced


def test_steps_0_evaluates_only_reranks_and_logs_every_sample(tmp_path, tokenizer):
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    config = Qwen3Config.from_pretrained(TINY, num_labels=1, reward_kind="process", reward_separator="=")
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    settings = {"eval_rows": 6, "eval_samples": 3, "max_think_tokens": 8, "instruction": " Go!"}
    row = quick("rlvr_math", tmp_path / "run", steps=0, **settings, reranker=str(tmp_path / "rm"))
    samples = lines_of(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 18 and len(metrics(tmp_path / "run")) == 1 and not (tmp_path / "run/checkpoints").exists()
    assert sum(sample["reward"] for sample in samples) / 18 == pytest.approx(row["eval/accuracy"])
    assert {"eval/pass@2", "eval/maj@3", "eval/best@3", "eval/weighted@2", "eval/accuracy_margin"} <= set(row)
    score = RewardModel(str(tmp_path / "rm"), torch.device("cpu"), False, 4096)
    for sample in samples:
        question, _, instruction = sample["prompt"].partition(" ")
        assert instruction == "Go!"
        expected = score({"prompt": question}, [sample["completion"]]).sigmoid().item()
        assert sample["score"] == pytest.approx(expected, abs=1e-4)
    assert len({round(sample["score"], 4) for sample in samples}) > 6
