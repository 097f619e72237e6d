"""rlvr_math.py: its verifier on recorded judgements and hostile answers, the five algorithms, test-time compute."""

import json
import math
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, TINY, fails, first_rows, metrics, run

import rlvr_math
from common.generation import Completion, Sampler
from common.tokenizer import encode_prompt, stop_token_ids
from rlvr_math import Attempt, Verifier, final_answer, grade, normal_form, quantity

CPU = torch.device("cpu")
SMALL = ["--steps", 2, "--warmup-steps", 1, "--eval-every", 0, "--eval-rows", 6, "--eval-samples", 2, "--num-samples",
         4, "--batch-size", 4]  # fmt: skip


def close(value, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(value).float(), torch.tensor(expected).float(), atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize("text,answer", [
    ("so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{1} or rather \\boxed{2}", "2"),
    ("\\boxed{1} or rather \\boxed{2", None),  # the last one is unbalanced: no falling back to the first
    ("\\boxed{{a}", None),
    ("#### 1,234.", "1,234."),
    ("72 in all\n#### 72\nand more", "72"),
    ("<answer>12</answer> or rather <answer>13</answer>", "13"),
    ("<answer>x = \\boxed{5}</answer>", "5"),
    ("<answer>5</answer> no, #### 6", "6"),
    ("<think>\\boxed{3}</think> <answer>4</answer>", "4"),
    ("<think>\\boxed{3}</think> so it is 4", None),
    ("<think>\\boxed{3}", None),  # reasoning that never ended
    ("I am sure that it is 42", None),
    ("<answer>5", None),
    ("<answer> </answer>", None),
    ("they sell 5\nA: 18", "18"),
    ("**Answer:** $18", "$18"),
    ("Therefore, the final answer is 18.", "18."),
    ("A 5 kg bag", None), ("a is 5", None), ("Answer:\n5", "5"), ("The correct answer is −3", "−3"),
    ("The answer is √2", "√2"), ("The answer is <5", "<5"), ("The answer is (3, 4).", "(3, 4)."),
    ("\\boxed {18}", "18"),
    ("\\boxed{18}\n\n#### Verification", "18"),
    ("\\boxed{5} or 6", None), ("#### 18\nThe answer is correct.", "18"), ("<answer>The answer is 5</answer>", "5"),
    ("Final answer:\n\n5", "5"), ("The answer is that 5 of them\nleft", None), ("", None),
])  # fmt: skip
def test_rlvr_math_detail_5_what_is_stated_last_is_the_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text,value,unit", [
    ("18", 18, ""), ("-18", -18, ""), ("−18", -18, ""), ("+18", 18, ""), ("18.", 18, ""), ("18.50", 18.5, ""),
    (".5", 0.5, ""), ("1,234", 1234, ""), ("1{,}234", 1234, ""), ("1\\,234,567", 1234567, ""), ("$18", 18, "dollar"),
    ("\\$1,200.00", 1200, "dollar"), ("-$5", -5, "dollar"), ("$-5", -5, "dollar"), ("18 dollars", 18, "dollar"),
    ("18\\text{ cm}", 18, "cm"), ("18cm", 18, "cm"), ("50%", 50, "percent"), ("50\\%", 50, "percent"),
    ("1/2", 0.5, ""), ("3 1/2", 3.5, ""), ("\\frac{1}{2}", 0.5, ""), ("\\dfrac12", 0.5, ""), ("2\\frac{1}{2}", 2.5, ""),
    ("2 million", 2_000_000, ""), ("5k", 5000, ""), ("2 dozen eggs", 24, "egg"), ("$5$", 5, ""),
    ("$18$ dollars", 18, "dollar"),
    ("60 miles per hour", 60, "mile per hour"), ("60 miles/hour", 60, "mile per hour"), ("\\frac{-1}{2}", -0.5, ""),
    ("-\\frac12", -0.5, ""), ("\\frac{3}4", 0.75, ""), ("18\\ \\text{dollars}", 18, "dollar"), ("(5)", 5, ""),
    ("18\\text{ cm}^2", 18, "cm"), ("3\\text{ m}", 3, ""), ("5 hrs", 5, "hour"), ("18 inches", 18, "inch"),
    ("2 trillion", 2 * 10**12, ""), ("18 thousands", 18_000, ""), ("\\mathbf{5}", 5, ""),
    ("90^\\circ", 90, "degree"), ("\\(7\\)", 7, ""), ("**7**", 7, ""),
])  # fmt: skip
def test_quantities(text, value, unit):
    assert quantity(normal_form(text)) == (value, unit)


NO_QUANTITIES = "12x|12 x|12 or 13|12, 13|12,34|1,2345|12 and 13|5-6|5:30|1/0|1 2|12 13|5 more than x|five||.|-|$"
NO_QUANTITIES += "|36/2|\\frac{36}{2}|18 half|18 hundredths|18 squared|18 nineteen|18 half dozen"
NO_QUANTITIES += "|9**9**9|1e999999999|0x10|5 < 6|12 to 15|3 times 4|\\frac{1}{0}|1.2.3|١٢ ٣"


@pytest.mark.parametrize("text", NO_QUANTITIES.split("|"))
def test_what_is_no_quantity(text):
    assert quantity(normal_form(text)) is None


# ---------------------------------------------------------------------------------------------- judgement


def test_verifier_agrees_with_recorded_judgements():
    """300 model solutions of GSM8K, each with its recorded correctness (openai/grade-school-math, MIT)."""
    rows = [json.loads(line) for line in (ROOT / "tests" / "gsm8k_solutions.jsonl").read_text().splitlines()]
    agreed = [grade(row["solution"], row["gold"]).correct == row["correct"] for row in rows]
    assert sum(row["correct"] for row in rows) == 150 and sum(agreed) / len(agreed) >= 0.995


RIGHT = "1234|1,234|1,234.0|1234.|$1,234|1234 dollars|+1234|1{,}234|\\boxed{1234}|1.234 thousand|01234|x=1234"
RIGHT = [("1234", answer) for answer in RIGHT.split("|")]
RIGHT += [tuple(pair.split(" ~ ")) for pair in (
    "500000 ~ 5 hundred thousand|5 min ~ 5 minutes|1,2 ~ 2 and 1|1,2 ~ x=1, x=2|1,2 ~ \\{2,1\\}|5 months ~ 5|"
    "-3 ~ −3|-3 ~ $-3|0.5 ~ 1/2|0.5 ~ .5|50 ~ 50%|50% ~ 50 percent|18 ~ 18 eggs|(3,4) ~ (3, 4)"
).split("|")]  # fmt: skip
WORDS = [("Saturday", "saturday"), ("\\text{Saturday}", "Saturday")]
WRONG = "-1234|12,34|12.34|1,2345|1234.5|123.4|1 234|12 34|1234x|1234, 1235|1234 or 1235|1234 and 1235|1235 (not 1234)"
WRONG += "|1234^1|1233+1|617*2|1234 thousand|1234/2|1235|0.1234|about 1234|1234 to 1240|<1234|1234:1|"
WRONG = [("1234", answer) for answer in WRONG.split("|")]
WRONG += [tuple(pair.split(" ~ ")) for pair in (
    "0.5 ~ 50%|50% ~ 0.5|5 km ~ 5 miles|$5 ~ 5€|3 ~ 1 2|12 ~ 13 = 12|12 ~ 1 2|999 ~ 9**9**9|12 ~ 1\\,2|"
    "12 ~ 1\\;2|376 ~ 47*8|"
    "376 ~ 47 \\cdot 8|5 ~ (5|5 ~ 5 (|Saturday ~ datursay|east ~ seat|Saturday ~ Sunday|"
    "12 ~ 12\\text{or}13|2 ~ \\sqrt{4}|"
    "18 ~ 36/2|18 ~ \\frac{36}{2}|18 ~ 18 millions|18 ~ 18 hundredths|18 ~ 18 squared|x=3 ~ y=3|"
    "y=2x ~ x=2x|No ~ on|AB ~ BA|"
    "x=5 ~ x+1=6|k=376 ~ 47*8=k|376,1 ~ 47*8,1|(376,1) ~ (47*8,1)|\\frac{\\pi}{2} ~ \\arcsin 1|1,2 ~ 1,2,2|"
    "\\sqrt{3} ~ \\tan\\frac{\\pi}{3}|60 ~ 5 dozen thousand|72 ~ 72 kg million|72 ~ 72 minus something|5 ~ 5 twelfths|"
    "5 ~ 5 xy|25 ~ 25 root|1234 ~ 1, 234|£5 ~ 5 lb|(1,2) ~ (2,1)|5 ~ 5 twentieths|1,2 ~ (1,2)|"
    "May 7 ~ 7 yam|1st ~ 1ts|5:30 ~ 1/6|1101_2 ~ 1101_3|2516_8 ~ 2516"
).split("|")]  # fmt: skip


WAYS = ["<answer>{}</answer>", "so \\boxed{{{}}}", "#### {}"]


@pytest.mark.parametrize("gold,answer,how", [(*pair, how) for pair in RIGHT for how in WAYS] +
                         [(*pair, how) for pair in WORDS for how in WAYS[:2]])  # fmt: skip
def test_answers_that_are_right(gold, answer, how):
    assert grade(how.format(answer), gold) == (True, answer if "boxed{1" not in answer else "1234", "exact")


@pytest.mark.parametrize("gold,answer", WRONG)
@pytest.mark.parametrize("how", ["<answer>{}</answer>", "so \\boxed{{{}}}", "#### {}"])
def test_rlvr_math_detail_6_no_false_accept(gold, answer, how):
    assert grade(how.format(answer), gold).correct is False


@pytest.mark.parametrize("gold,answer,right", [
    ("$\\{1,2\\}$", "\\{2,1\\}", True),
    ("1<x<2", "(1,2)", True),
    ("(1,2)", "1<x<2", False),  # ordered: only an inequality may be met by its interval
    ("x+1", "1+x", True),
    ("\\frac{\\sqrt2}{2}", "\\sqrt{\\frac12}", True),
    ("x^2-1", "(x-1)(x+1)", True),
    ("x^2-1", "(x-1)(x+2)", False),
    ("\\sqrt{2}", "\\sqrt{3}", False),
    ("\\sqrt{2}", "3} \\boxed{\\sqrt{2}", False),  # two boxes, of which the parser would pick one
    ("3\\pi", "3π", True),
    ("2x-y+3=0", "y=2x+3", True),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}", False),
    ("\\begin{pmatrix} 2 \\\\ 3 \\end{pmatrix}", "\\begin{bmatrix}2\\\\3\\end{bmatrix}", True),
    ("\\begin{pmatrix} 2 \\\\ 3 \\end{pmatrix}", "\\begin{pmatrix} 3 \\\\ 2 \\end{pmatrix}", False),
    ("(3,4)", "3,4", False), ("(3,4)", "\\{3,4\\}", False), ("\\{1,2\\}", "(2,1)", False), ("1,2", "(2,1)", False),
    ("[1,2)", "[1,2]", False), ("1,2", "2,1", True), ("(-\\infty,2]", "x \\in (-\\infty,2]", True),
    ("6\\pi", "6\\pi\\text{ cm}", True),
    ("\\pi", "3.141593", False), ("\\sqrt2", "1.414214", False),
    ("\\frac{\\pi}{4}", "\\int_0^1 \\frac{1}{1+x^2}dx", False),
    ("2x", "\\frac{d}{dx} x^2", False), ("\\sqrt2", "\\max(\\sqrt2,1)", False), ("2^{10}", "1024", True),
])  # fmt: skip
def test_t30_algebra(gold, answer, right):
    found = grade(f"<answer>{answer}</answer>", gold)
    assert found.correct is right and found.how in ("symbolic", "exact", "no answer")


@pytest.mark.parametrize("answer", [
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\left( \\dfrac12,\\ 3 \\right)",
    "1\\,234\\,567", "$x$ and $y$", "x = 5",
    "\\text{ab} \\text{cd}", "\\frac1{\\sqrt2}", "$$5$$", "5\\ \\ \\text{ m}", "**7**", "90^{\\circ}", "\\$1{,}000.",
])  # fmt: skip
def test_normal_form_is_reached_at_once(answer):
    assert normal_form(normal_form(answer)) == normal_form(answer)


def test_rlvr_math_detail_8_an_unreadable_gold_answer_is_neither_right_nor_wrong(tmp_path):
    for gold in ("", "???", "@@", "#### ", "\\boxed{1"):
        assert grade("<answer>1</answer>", gold) == (None, "1", "unreadable gold")
        assert grade("no idea", gold).correct is None
    rows = [{"prompt": f"{n}+1=?", "answer": "???" if n % 4 == 0 else str(n + 1)} for n in range(40)]
    rows[4]["answer"], rows[8]["answer"] = "", []
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = run("rlvr_math", *SMALL, "--dataset", data, "--eval-dataset", data, "--output-dir", tmp_path / "run")
    assert "10 of 40 gold answers (25.0%) cannot be read, such as '???';" in output
    data.write_text('{"prompt": "1+1=?", "answer": "???"}\n' * 20)
    told = fails("rlvr_math", "--dataset", data, "--output-dir", tmp_path / "none")
    assert "none of its" in told and "gold answers can be read" in told


def test_t30_rlvr_math_detail_7_hostile_answers_cost_their_limit_and_block_nobody():
    verifier = Verifier(workers=2, seconds=1.0)
    assert verifier.grade([("<answer>1+x</answer>", "x+1")])[0].correct  # the workers are up
    bomb = ("<answer>9^{9^{9}}</answer>", "\\sqrt{2}")
    honest = [(f"<answer>{n}+x</answer>", f"x+{n}") for n in range(2, 30)]
    began = time.monotonic()
    grades = verifier.grade([bomb, *honest, ("<answer>(10^9)!</answer>", "\\sqrt{2}")])
    assert grades[0] == (False, "9^{9^{9}}", "timeout") and grades[-1].correct is False
    assert all(g.correct for g in grades[1:-1])
    assert time.monotonic() - began < 12  # two limits of a second, and two new workers on a busy machine
    assert verifier.grade([bomb])[0].how == "timeout" and time.monotonic() - began < 13  # known by now
    verifier.close()


@pytest.mark.parametrize("answer", [
    "{" * 1_000_000, "(" * 150 + "x" + ")" * 150, "\\frac{" * 60 + "1" + "}{2}" * 60, "\\boxed{" * 1000,
    "1" * 390 + "x", "x" * 1_000_000, "\x00", "\ud800", "\\sqrt{" * 60, "\n" * 1000 + "A: " * 100,
    "<answer>" * 100_000, "x^" * 100 + "2",
])  # fmt: skip
def test_odd_answers_are_wrong_and_quick(answer):
    verifier = Verifier(workers=1, seconds=2.0)
    began = time.monotonic()
    for text in (f"<answer>{answer}</answer>", f"\\boxed{{{answer}}}", f"#### {answer}"):
        assert verifier.grade([(text, "x+1")])[0].correct is False
    assert time.monotonic() - began < 25
    verifier.close()


def test_an_interrupted_grading_leaves_nothing_behind():
    verifier = Verifier(workers=1, seconds=60.0)
    assert verifier.grade([("<answer>1+x</answer>", "x+1")])[0].correct

    def interrupt(number, frame):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        verifier.grade([("<answer>9^{9^{9}}</answer>", "\\sqrt{2}")])
    signal.signal(signal.SIGALRM, old)
    began = time.monotonic()
    assert verifier.grade([("<answer>2+z</answer>", "z+2")])[0] == (True, "2+z", "symbolic")
    assert time.monotonic() - began < 30  # it does not wait for the 60 seconds of what was interrupted
    verifier.close()


def test_exact_answers_do_not_wait_for_a_bomb_in_another_thread():
    verifier = Verifier(workers=1, seconds=4.0)
    verifier.grade([("<answer>1+x</answer>", "x+1")])
    thread = threading.Thread(target=verifier.grade, args=([("<answer>9^{9^{9}}</answer>", "\\sqrt{2}")],))
    thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    assert verifier.grade([("#### 5", "5")])[0].correct and time.monotonic() - began < 1
    thread.join()
    verifier.close()


def test_t30_grading_works_in_threads():
    verifier, found = Verifier(workers=1), []
    threads = [
        threading.Thread(target=lambda: found.extend(verifier.grade([("\\boxed{1+y}", "y+1")]))) for _ in range(4)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [g.correct for g in found] == [True] * 4
    verifier.close()


def test_the_exact_path_is_fast():
    pairs = [(f"some steps, {n} and more\n#### {n}", str(n)) for n in range(4000)]
    began = time.process_time()
    assert all(g.correct for g in rlvr_math.VERIFIER.grade(pairs))
    assert len(pairs) / (time.process_time() - began) > 2000


def test_a_worker_that_dies_is_replaced_and_a_pool_that_cannot_start_is_told(monkeypatch):
    verifier = Verifier(workers=1)
    assert verifier.grade([("<answer>1+x</answer>", "x+1")])[0].correct
    verifier.workers[0].process.kill()
    verifier.workers[0].process.wait()
    assert verifier.grade([("<answer>2+x</answer>", "x+2")])[0].correct
    verifier.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit) as exit:
        verifier.grade([("<answer>3+x</answer>", "x+3")])
    assert "worker processes die before they are ready" in str(exit.value)


def test_no_worker_outlives_its_parent(tmp_path):
    """Not even one that is at a comparison without end when its parent is killed."""
    code = "import rlvr_math as r; v = r.Verifier(1, 60.0); v.grade([('<answer>1+x</answer>', 'x+1')]); "
    code += "print(v.workers[0].process.pid, flush=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            if "zombie" in open(f"/proc/{worker}/status").read():
                return
        except OSError:
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} still runs")


# ---------------------------------------------------------------------------------------------- rewards and advantages


@pytest.mark.parametrize("text,reward", [
    ("<think>1+1=2</think><answer>2</answer>", 1), ("<answer>2</answer>", 1),
    ("<think>x</think> <answer>2</answer> ", 1),
    ("<think>x<answer>2</answer>", 0), ("x</think><answer>2</answer>", 0), ("<answer>2</answer> so", 0),
    ("<answer></answer>", 0), ("<answer>1</answer><answer>2</answer>", 0), ("<answer>2</answer><think>x</think>", 0),
    ("<think><answer>2</answer></think>", 0), ("so <think>x</think><answer>2</answer>", 0), ("", 0), ("</answer>", 0),
])  # fmt: skip
def test_rlvr_math_detail_13_format_is_all_or_nothing(text, reward, tokenizer):
    assert rlvr_math.well_formed_reward(text) == reward
    opened = tokenizer.encode("<think>", add_special_tokens=False)
    ids = tokenizer.encode("a</think><answer>2</answer>", add_special_tokens=False)
    texts = rlvr_math.texts_of(tokenizer, [{"ids": [5, *opened]}, {"ids": [5]}], [[Completion(ids, [], True)]] * 2)
    assert [rlvr_math.well_formed_reward(row[0]) for row in texts] == [
        1,
        0,
    ]  # what the template has opened counts


def test_rlvr_math_detail_4_a_cut_completion_earns_nothing(tokenizer):
    ids = tokenizer.encode("<answer>2</answer>", add_special_tokens=False)
    groups = [[Completion(ids, [-0.5] * len(ids), stopped) for stopped in (True, False)]]
    texts = [["<answer>2</answer>"] * 2]
    grades, rewards = rlvr_math.judge(Verifier(), [{"gold": "2"}], groups, texts, rlvr_math.Args(format_weight=0.5))
    assert [g.correct for g in grades[0]] == [True, True] and rewards["answer"].tolist() == [[1, 0]]
    assert rewards["total"].tolist() == [[1.5, 0.5]]


def test_t21_rlvr_math_detail_1_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    expected = {"grpo": [1.5, -0.5, -0.5, -0.5], "dr_grpo": [0.75, -0.25, -0.25, -0.25]}
    expected |= {"rloo": [1, -1 / 3, -1 / 3, -1 / 3], "reinforce": [1, 0, 0, 0], "expert_iteration": [1, 0, 0, 0]}
    for name, algorithm in rlvr_math.ALGORITHMS.items():
        close(algorithm.advantage(rewards), [expected[name]], 1e-4)
        if name in ("grpo", "dr_grpo", "rloo"):
            assert (algorithm.advantage(torch.full((3, 8), 0.1)) == 0).all()


def test_rlvr_math_detail_14_copies_are_dropped_and_the_rest_capped():
    group = [Completion(ids, [], True) for ids in ([1], [1], [2], [3], [1], [4])]
    right = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0]])
    assert rlvr_math.verified([group], right, 9).tolist() == [[1, 0, 0, 1, 0, 1]]
    assert rlvr_math.verified([group], right, 2).tolist() == [[1, 0, 0, 1, 0, 0]]


def test_t22_rlvr_math_detail_11_means():
    losses = torch.tensor([[1.0, 9.0, 9.0], [2.0, 2.0, 2.0]])
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    cases = {"tokens then completions": 1.5, "tokens": 1.75, "a fixed length": 0.875, "completions": 3.5}
    assert {algorithm.mean_over for algorithm in rlvr_math.ALGORITHMS.values()} == set(cases)
    for how, expected in cases.items():
        close(rlvr_math.mean_loss(losses, mask, how, 2, 4, 4), expected)
        parts = [rlvr_math.mean_loss(losses[i : i + 1], mask[i : i + 1], how, 2, 4, 4) for i in range(2)]
        close(sum(parts), expected)


def test_t23_rlvr_math_detail_12_ratio_of_the_whole_completion():
    logprobs = torch.tensor([[0.2, -0.1, 0.2, 5.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    losses, rho = rlvr_math.token_losses(logprobs, torch.zeros(1, 4), torch.ones(1, 1), mask, "sequence", 0.2, 9.0)
    close(rho[0], [math.exp(0.3)] * 4)
    close((losses * mask).sum(), -math.exp(0.3))
    losses, _ = rlvr_math.token_losses(logprobs, torch.zeros(1, 4), torch.ones(1, 1), mask, "sequence", 0.2, 0.2)
    close((losses * mask).sum(), -1.2)  # clipped once, not token by token


@pytest.mark.parametrize("name,share", [("reinforce", 1.0), ("rloo", 1.0), ("dr_grpo", 0.5)])
def test_policy_gradients_by_enumeration(name, share):
    """Over every group of 2 single-token completions: reinforce and rloo are unbiased, dr_grpo (G − 1)/G of it."""
    z, rewards = torch.tensor([0.3, -0.2, 0.1], requires_grad=True), torch.tensor([1.0, 0.0, 0.5])
    algorithm, total = rlvr_math.ALGORITHMS[name], torch.zeros(3)
    for a in range(3):
        for b in range(3):
            logprobs = z.log_softmax(0)[torch.tensor([[a], [b]])]
            advantages = algorithm.advantage(rewards[torch.tensor([[a, b]])]).view(2, 1)
            mask = torch.ones(2, 1)
            losses, _ = rlvr_math.token_losses(logprobs, logprobs.detach(), advantages, mask, algorithm.ratio, 0.2, 0.2)
            loss = rlvr_math.mean_loss(losses, mask, algorithm.mean_over, 2, 2, 1)
            weight = z.detach().softmax(0)
            total -= weight[a] * weight[b] * torch.autograd.grad(loss, z)[0]
    truth = torch.autograd.grad((z.softmax(0) * rewards).sum(), z)[0]
    torch.testing.assert_close(total, share * truth, atol=1e-6, rtol=1e-5)


def rollout():
    torch.manual_seed(1)
    old = -torch.rand(6, 9) - 0.1
    new = (old + 0.3 * torch.randn(6, 9)).requires_grad_(True)
    return new, old, torch.randn(6), (torch.arange(9) < torch.tensor([9, 3, 1, 7, 5, 9])[:, None]).float()


def test_parity_with_trl_rloo_loss():
    from collections import defaultdict
    from unittest.mock import MagicMock

    from trl import RLOOTrainer

    new, old, advantages, mask = rollout()
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
    algorithm = rlvr_math.ALGORITHMS["rloo"]
    losses, _ = rlvr_math.token_losses(new, old, advantages[:, None], mask, algorithm.ratio, 0.2, 0.2)
    loss = rlvr_math.mean_loss(losses, mask, algorithm.mean_over, 6, float(mask.sum()), 12)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_parity_with_trl_grpo_losses(name):
    from test_mathematics import random_rollout, trl_grpo_loss

    new, old, ref, advantages, mask = random_rollout()
    expected = trl_grpo_loss(new, old, ref, advantages, mask, 0.0, "ppo", name)
    algorithm = rlvr_math.ALGORITHMS[name]
    losses, _ = rlvr_math.token_losses(new, old, advantages[:, None], mask, algorithm.ratio, 0.2, 0.28)
    loss = rlvr_math.mean_loss(losses, mask, algorithm.mean_over, 6, float(mask.sum()), 12)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- test-time compute


def test_t27_t28_t29_rlvr_math_detail_15_estimators_and_votes():
    assert rlvr_math.pass_at_k(5, 2, 2) == pytest.approx(0.7) and rlvr_math.pass_at_k(5, 4, 2) == 1
    assert rlvr_math.pass_at_k(8, 0, 4) == 0 and rlvr_math.pass_at_k(8, 3, 1) == pytest.approx(3 / 8)
    answers, scores = ["7", "7", "9"], [0.2, 0.3, 0.4]
    assert answers[rlvr_math.vote(answers, [1.0] * 3)] == "7"
    assert answers[rlvr_math.vote(answers, scores)] == "7" and answers[rlvr_math.best(answers, scores)] == "9"
    assert rlvr_math.vote([None, None, "1"], [1.0] * 3) == 2 and rlvr_math.best([None, "1"], [0.9, 0.1]) == 1
    assert rlvr_math.vote([None], [1.0]) is None and rlvr_math.best([None], [1.0]) is None
    assert rlvr_math.vote(["1", "2", "2", "1"], [1.0] * 4) == 0  # of equals the first
    assert rlvr_math.best_of_n_kl_bound(4) == pytest.approx(0.636294, abs=1e-6)
    chosen = 1 - 0.5**4  # a fair binary score ties, and the bound is not reached
    exact = chosen * math.log(chosen / 0.5) + (1 - chosen) * math.log((1 - chosen) / 0.5)
    assert exact == pytest.approx(0.459355, abs=1e-6) and exact < rlvr_math.best_of_n_kl_bound(4)


def test_scaling_curves_by_enumeration():
    from itertools import combinations

    clusters, scores = [0, 1, 1, 0, 2, None], [0.9, 0.1, 0.2, 0.3, 0.8, 0.99]
    group = [Attempt("", None, c, 1, True, s) for c, s in zip(clusters, scores)]
    found = rlvr_math.scaling([group] * 400, [3], True, seed=0)
    subsets = list(combinations(range(6), 3))
    assert found["pass@3"] == pytest.approx(sum(any(clusters[i] == 0 for i in s) for s in subsets) / len(subsets))
    best = [max((i for i in s if clusters[i] is not None), key=lambda i: scores[i]) for s in subsets]
    assert found["best@3"] == pytest.approx(sum(clusters[i] == 0 for i in best) / len(subsets), abs=0.02)
    assert 0.2 < found["maj@3"] < found["weighted@3"] < found["pass@3"]


def test_bootstrap_interval():
    low, high = rlvr_math.bootstrap_interval([0.0, 1.0] * 50, seed=1)
    assert low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)
    assert rlvr_math.bootstrap_interval([0.3] * 5, seed=1) == pytest.approx((0.3, 0.3))


def test_answers_are_clustered_by_what_they_mean():
    verifier = Verifier()
    texts = ["#### 5", "#### 5.0", "#### 6", "none", "#### 6 eggs", "#### 7"]
    graded = [verifier.grade([(text, "5") for text in texts])]
    assert rlvr_math.clusters_of(verifier, graded) == [[0, 0, 1, None, 1, 3]]  # 6 eggs were 2, until found to be 6
    texts = ["\\boxed{x+1}", "\\boxed{x+2}", "\\boxed{2+x}"]
    graded = [
        verifier.grade([(text, "1+x") for text in texts]),
        verifier.grade([("\\boxed{9^{9^{9}}}", "\\sqrt2")] * 2),
    ]
    assert rlvr_math.clusters_of(verifier, graded) == [[0, 1, 1], [1, 1]]
    verifier.close()


def test_rlvr_math_detail_16_budget_forcing(tokenizer, model):
    sampler = Sampler(model, stop_token_ids(tokenizer))
    ids = encode_prompt(tokenizer, "47*8=?")
    think = tokenizer.encode("<think>", add_special_tokens=False)
    questions = [{"ids": ids + think}] * 2
    cut = sampler.generate([q["ids"] for q in questions], 6, 4)
    args = rlvr_math.Args(max_think_tokens=6, max_completion_tokens=40)
    forced = rlvr_math.force_budget(sampler, tokenizer, questions, cut, args, [0, 1], 1.0)
    cue = tokenizer.encode("</think><answer>", add_special_tokens=False)
    for before, after in zip(sum(cut, []), sum(forced, [])):
        assert after.ids[:8] == before.ids + cue and len(after.ids) <= 40 and not any(after.logprobs)
        assert tokenizer.decode(after.ids).count("</think>") == 1
    whole = sampler.generate([q["ids"] for q in questions], 40, 4)
    args = rlvr_math.Args(extend_thinking=2, wait_cue=",", max_completion_tokens=60)
    longer = rlvr_math.force_budget(sampler, tokenizer, questions, whole, args, [0, 1], 1.0)
    for before, after in zip(sum(whole, []), sum(longer, [])):
        thoughts = tokenizer.decode(before.ids).partition("</think>")[0]
        text = tokenizer.decode(after.ids)
        assert text == tokenizer.decode(before.ids) or (text.startswith(thoughts + ",") and after.stopped)
        assert text.count("</think>") <= 1
    assert sum(len(a.ids) > len(b.ids) for a, b in zip(sum(longer, []), sum(whole, []))) >= 3
    # Both together: the reasoning goes on as far as the limit for it, and is cut there.
    short = sampler.generate([q["ids"] for q in questions], 30, 4)
    args = rlvr_math.Args(max_think_tokens=30, extend_thinking=1, wait_cue=",", max_completion_tokens=45)
    for after in sum(rlvr_math.force_budget(sampler, tokenizer, questions, short, args, [0, 1], 1.0), []):
        thoughts = tokenizer.decode(after.ids).partition("</think>")[0]
        assert len(tokenizer.encode(thoughts, add_special_tokens=False)) <= 30 and len(after.ids) <= 45


# ---------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("seed", [1, 2])
def test_rlvr_math_learns(seed, tmp_path):
    run("rlvr_math", "--seed", seed, "--steps", 24, "--eval-every", 12, "--eval-rows", 96, "--output-dir", tmp_path)
    rows = metrics(tmp_path)
    evaluated = [row for row in rows if "eval/accuracy" in row]
    assert evaluated[0]["eval/accuracy"] <= 0.5 and evaluated[-1]["eval/accuracy"] >= 0.68
    assert evaluated[-1]["eval/completion_length"] > evaluated[0]["eval/completion_length"] + 8
    middle = evaluated[1]
    assert middle["eval/maj@8"] > middle["eval/accuracy"] + 0.1
    assert middle["eval/accuracy_low"] < middle["eval/accuracy"] < middle["eval/accuracy_high"]
    assert max(row["policy/sampler_gap"] for row in rows[1:]) < 1e-6  # details 2 and 3
    assert (tmp_path / "scaling.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["reinforce", "rloo", "dr_grpo", "expert_iteration"])
def test_the_other_algorithms_learn(name, tmp_path):
    flags = ["--algorithm", name, "--steps", 12, "--eval-every", 0, "--eval-samples", 4, "--eval-rows", 96]
    run("rlvr_math", *flags, "--output-dir", tmp_path)
    rows = metrics(tmp_path)
    assert rows[-1]["eval/accuracy"] > rows[0]["eval/accuracy"] + 0.15
    assert abs(rows[1]["policy/ratio_max"] - 1) < 1e-5


def test_rlvr_math_detail_3_temperature_divides_logits_in_every_forward(tmp_path):
    run("rlvr_math", *SMALL, "--temperature", 0.6, "--beta", 0.1, "--output-dir", tmp_path)
    row = metrics(tmp_path)[1]
    assert row["policy/sampler_gap"] < 1e-6 and abs(row["policy/kl"]) < 1e-6
    assert abs(row["policy/ratio_max"] - 1) < 1e-5


def test_rlvr_math_detail_2_ids_and_log_probabilities_are_the_samplers_own(tokenizer):
    """Ids that no tokenizer would produce from their text, an id that is the pad token, and a cut completion."""
    groups = [[Completion([9, 8, 7, 1, 0], [-0.5] * 5, True), Completion([1, 1], [-0.25, -2.0], False)]]
    rollout = rlvr_math.Rollout([[5, 6]], groups, torch.device("cpu"))
    assert rollout.ids == [[9, 8, 7, 1, 0], [1, 1]] and rollout.prompts == [[5, 6]] * 2
    assert rollout.mask.sum(1).tolist() == [5, 2] and rollout.old_logprobs[1, :2].tolist() == [-0.25, -2.0]


def test_verified_samples_are_data_for_sft(tmp_path):
    flags = ["--algorithm", "expert_iteration", "--save-verified", "--keep-per-question", 2, "--steps", 3]
    output = run(
        "rlvr_math", *SMALL, *flags, "--dataset", first_rows("maths_train.jsonl", 30), "--output-dir", tmp_path
    )
    rows = [json.loads(line) for line in (tmp_path / "verified.jsonl").read_text().splitlines()]
    assert rows and len({(json.dumps(r["prompt"]), r["completion"]) for r in rows}) == len(rows)
    prompts = [json.dumps(row["prompt"]) for row in rows]
    assert max(prompts.count(p) for p in prompts) <= 2
    assert all(grade(row["completion"], row["answer"]).correct for row in rows)
    command = output.strip().splitlines()[-1].split("python sft.py ")[1].split()
    brief = ["--steps", 1, "--batch-size", 2, "--eval-rows", 2, "--max-length", 128]
    run("sft", *command, *brief, "--output-dir", tmp_path / "sft")


def test_evaluate_only(tmp_path):
    flags = [
        "--evaluate-only",
        "--eval-rows",
        12,
        "--eval-samples",
        6,
        "--max-think-tokens",
        24,
        "--max-completion-tokens",
        40,
    ]
    output = run("rlvr_math", *flags, "--output-dir", tmp_path)
    told = json.loads((tmp_path / "evaluation.json").read_text())
    assert {
        "eval/accuracy",
        "eval/accuracy_low",
        "eval/pass@2",
        "eval/pass@6",
        "eval/maj@6",
        "eval/truncated_fraction",
    } <= set(told)
    assert told["samples"] == 6 and told["temperature"] == 1.0 and told["max_think_tokens"] == 24
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 * 6 and sum(s["reward"] for s in samples) / 72 == pytest.approx(told["eval/accuracy"])
    assert "pass@1" in output and "interval" in output and (tmp_path / "scaling.png").exists()
    assert not (tmp_path / "model").exists() and "model in" not in output


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_rerankers(kind, tmp_path):
    name = "steps" if kind == "process" else "preferences"
    data = ["--dataset", first_rows(f"{name}_train.jsonl", 1500), "--eval-dataset", TINY / f"{name}_test.jsonl"]
    steps = ["--kind", kind, "--steps", 60, "--eval-every", 0, "--eval-rows", 16]
    run("reward_model", *steps, *data, "--output-dir", tmp_path / "rm")
    flags = ["--evaluate-only", "--eval-rows", 64, "--eval-samples", 6, "--reranker", tmp_path / "rm" / "model"]
    output = run("rlvr_math", *flags, "--output-dir", tmp_path / "run")
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert told["eval/best@6"] > told["eval/accuracy"] + 0.1 and told["eval/weighted@6"] > told["eval/maj@6"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(0 <= s["score"] <= 1 for s in samples) and "nats away" in output


def test_r1_zero_template_ends_in_opened_reasoning(tmp_path, tokenizer):
    run("rlvr_math", *SMALL, "--template", "r1_zero", "--format-weight", 0.5, "--max-prompt-tokens", 500, "--seed", 1,
        "--max-completion-tokens", 24, "--steps", 1, "--output-dir", tmp_path)  # fmt: skip
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "1+1=?"}]
    text = saved.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("User: 1+1=?\nAssistant: <think>") and "reward/format" in metrics(tmp_path)[-1]
    sample = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert sample["completion"].startswith("<think>")


@pytest.mark.parametrize("row", [
    {"question": "1+1=?", "answer": "so 1+1=2\n#### 2"},
    {"problem": "1+1=?", "solution": "so it is $\\boxed{2}$", "level": "Level 1"},
    {"problem": "1+1=?", "answer": "2", "solution": "whatever"},
    {"problem": "1+1=?", "answer": "", "solution": "so \\boxed{2}"},
    {"prompt": [{"role": "user", "content": "1+1=?"}], "answer": 2},
])  # fmt: skip
def test_formats_of_questions(row, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text((json.dumps(row) + "\n") * 20)
    run("rlvr_math", *SMALL, "--steps", 1, "--instruction", " Go!", "--dataset", data, "--output-dir", tmp_path / "run")
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["gold"] == "2" and "1+1=? Go!" in sample["prompt"]


def test_settings_of_rlvr_math(tmp_path):
    assert "compares a completion with its siblings" in fails("rlvr_math", "--num-samples", 1)
    run(
        "rlvr_math",
        *SMALL,
        "--num-samples",
        1,
        "--algorithm",
        "reinforce",
        "--steps",
        1,
        "--output-dir",
        tmp_path / "one",
    )
    assert "must be below --max-completion-tokens" in fails("rlvr_math", "--max-think-tokens", 64)
    assert "--minibatches" in fails("rlvr_math", "--batch-size", 4, "--minibatches", 3)
    assert "--grading-seconds" in fails("rlvr_math", "--grading-seconds", 0)
    assert "must not be negative" in fails("rlvr_math", "--max-think-tokens", -1)
    assert "nothing is left that could be rewarded" in fails("rlvr_math", "--answer-weight", 0)
    assert "needs the columns" in fails("rlvr_math", "--dataset", TINY / "corpus.jsonl")
    told = fails("rlvr_math", "--reranker", TINY, "--output-dir", tmp_path / "no")
    assert "needs a sequence classifier with one label" in told
