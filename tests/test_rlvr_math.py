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
from conftest import ROOT, TINY, first_rows, metrics, run
from test_core import quick
from test_mathematics import close

import rlvr_math
from common.generation import Completion, Sampler
from common.tokenizer import encode_prompt, load_questions, stop_token_ids
from rlvr_math import WORKERS, grade, normal_form, number, stated_answer, winner


@pytest.mark.parametrize("text,answer", [
    ("so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("\\boxed {18}", "18"), ("\\fbox{2}", "2"), ("\\boxed 2.", "2"),
    ("<answer>\\boxed 12</answer>", "12"), ("$\\boxed 12$", "12"), ("\\boxed\\frac12", "\\frac12"),
    ("\\boxed{1} or rather \\boxed{2}", "2"), ("\\boxed{1}, \\boxed{2} and \\boxed{3}", "1, 2, 3"),
    ("\\boxed{1} or rather \\boxed{2", None),  # the last one is unbalanced: no falling back to the first
    ("\\boxed{{a}", None), ("\\boxed{}", None), ("\\boxed{5} or 6", None), ("\\boxed{18}\n\nSo 9*2=18.", "18"),
    ("#### 1,234.", "1,234."), ("72 in all\n#### 72\nand more", "72"), ("\\boxed{18}\n\n#### Verification", "18"),
    ("<answer>12</answer> or rather <answer>13</answer>", "13"), ("<answer>x = \\boxed{5}</answer>", "5"),
    ("<answer>5</answer> no, #### 6", "6"), ("<answer>5", None), ("<answer> </answer>", None),
    ("<think>\\boxed{3}</think> <answer>4</answer>", "4"), ("<think>\\boxed{3}</think> so it is 4", None),
    ("<think>\\boxed{3}", None), ("<answer>3</answer><think>is it", "3"),  # reasoning that never ended
    ("I am sure that it is 42", None), ("A 5 kg bag", None), ("a is 5", None), ("", None),
    ("they sell 5\nA: 18", "18"), ("**Answer:** $18", "$18"), ("Answer:\n5", "5"), ("The answer is:\n\n5", "5"),
    ("Final answer:\n\n5", "5"),
    ("Therefore, the final answer is 18.", "18."), ("The correct answer is −3", "−3"), ("The answer is √2", "√2"),
    ("The answer is <5", "<5"), ("The answer is (3, 4).", "(3, 4)."), ("The answer is that 5 of them\nleft", None),
    ("The answer is Saturday.", "Saturday."), ("The correct answer is (C).", "(C)."),
    ("#### 18\nThe answer is correct.", "18"), ("<answer>The answer is 5</answer>", "5"),
])  # fmt: skip
def test_rlvr_math_detail_4_what_is_stated_last_is_the_answer(text, answer):
    assert stated_answer(text) == answer


def test_plain_numbers():
    for text, value, unit in [
        ("-18", -18, ""), ("−18", -18, ""), ("+18", 18, ""), ("18.", 18, ""), (".5", 0.5, ""), ("1,234", 1234, ""),
        ("1\\,234,567", 1234567, ""), ("\\$1,200.00", 1200, "dollar"), ("-$5", -5, "dollar"), ("$-5", -5, "dollar"),
        ("18\\text{ cm}", 18, "cm"), ("18cm", 18, "cm"), ("50\\%", 50, "percent"), ("3 1/2", 3.5, ""), ("(5)", 5, ""),
        ("\\dfrac12", 0.5, ""), ("2\\frac{1}{2}", 2.5, ""), ("2 million", 2_000_000, ""), ("2 dozen eggs", 24, "egg"),
        ("20 \\mathrm{~km} / \\mathrm{h}", 20, "km per h"), ("\\frac{3}4", 0.75, ""), ("3\\text{ m}", 3, ""),
        ("90^\\circ", 90, "degree"), ("1.5\\times 10^{3}", 1500, ""), ("0.1\\overline{25}", 124 / 990, ""),
    ]:  # fmt: skip
        found = number(normal_form(text))
        assert (float(found[0]), found[1]) == (value, unit)
    for text in (
        "12x|12 x|12 or 13|12, 13|12,34|1,2345|12 and 13|5-6|5:30|1/0|1 2|12 13|5 more than x|five||.|-|$|5 in x|36/2|"
        "\\frac{36}{2}|18 half|18 hundredths|18 squared|18 nineteen|18 half dozen|9**9**9|1e9999999|0x10|5 < 6|12 to 15"
        "|3 times 4|\\frac{1}{0}|١٢ ٣|72 kg million|1.2.3"
    ).split("|"):
        assert number(normal_form(text)) is None, text


RIGHT = "1234|1,234|1,234.0|1234.|$1,234|1234 dollars|+1234|1{,}234|\\boxed{1234}|1.234 thousand|01234|x=1234"
RIGHT = [("1234", answer) for answer in RIGHT.split("|")] + [tuple(pair.split(" ~ ")) for pair in (
    "500000 ~ 5 hundred thousand|5 min ~ 5 minutes|1,2 ~ 2 and 1|1,2 ~ x=1, x=2|1,2 ~ \\{2,1\\}|5 months ~ 5|"
    "-3 ~ −3|-3 ~ $-3|0.5 ~ 1/2|0.5 ~ .5|50 ~ 50%|50% ~ 50 percent|18 ~ 18 eggs|(3,4) ~ (3, 4)"
).split("|")]  # fmt: skip
WRONG = "-1234|12,34|12.34|1,2345|1234.5|123.4|1 234|12 34|1234x|1234, 1235|1234 or 1235|1234 and 1235|1235 (not 1234)"
WRONG += "|1234^1|1233+1|617*2|1234 thousand|1234/2|1235|0.1234|about 1234|1234 to 1240|<1234|1234:1|"
WRONG = [("1234", answer) for answer in WRONG.split("|")] + [tuple(pair.split(" ~ ")) for pair in (
    "0.5 ~ 50%|50% ~ 0.5|5 km ~ 5 miles|$5 ~ 5€|3 ~ 1 2|12 ~ 13 = 12|12 ~ 1 2|999 ~ 9**9**9|12 ~ 1\\,2|"
    "12 ~ 1\\;2|376 ~ 47*8|376 ~ 47 \\cdot 8|5 ~ (5|5 ~ 5 (|Saturday ~ datursay|east ~ seat|Saturday ~ Sunday|"
    "12 ~ 12\\text{or}13|2 ~ \\sqrt{4}|18 ~ 36/2|18 ~ \\frac{36}{2}|18 ~ 18 millions|18 ~ 18 hundredths|"
    "18 ~ 18 squared|x=3 ~ y=3|y=2x ~ x=2x|No ~ on|AB ~ BA|x=5 ~ x+1=6|k=376 ~ 47*8=k|376,1 ~ 47*8,1|"
    "(376,1) ~ (47*8,1)|\\frac{\\pi}{2} ~ \\arcsin 1|1,2 ~ 1,2,2|\\sqrt{3} ~ \\tan\\frac{\\pi}{3}|"
    "60 ~ 5 dozen thousand|72 ~ 72 kg million|72 ~ 72 minus something|5 ~ 5 twelfths|5 ~ 5 xy|25 ~ 25 root|"
    "1234 ~ 1, 234|£5 ~ 5 lb|(1,2) ~ (2,1)|5 ~ 5 twentieths|1,2 ~ (1,2)|May 7 ~ 7 yam|1st ~ 1ts|5:30 ~ 1/6|"
    "1101_2 ~ 1101_3|2516_8 ~ 2516|20 km/h ~ 20 km/s|x=1,2 ~ x=1,3|3:5 ~ 5:3|5 ~ 5^2|"
    "5 ~ 5 fifths|10^{3} ~ 10|a_1-a_2 ~ a_2-a_1|(p,q)=(1,2) ~ (1,2,3)|(p,q)=(1,2,3) ~ (p,q)=(1,2)"
).split("|")]  # fmt: skip


@pytest.mark.parametrize("how", ["<answer>{}</answer>", "so \\boxed{{{}}}", "#### {}", "The answer is {}."])
def test_rlvr_math_detail_5_no_false_accept_however_it_is_stated(how):
    assert [pair for pair in WRONG if grade(how.format(pair[1]), pair[0]).correct is not False] == []
    assert [pair for pair in RIGHT if grade(how.format(pair[1]), pair[0]).correct is not True] == []


BOXED = {  # gold ~ answer in a box; the first 29 kinds of ../shared/cases/verifier.jsonl and their siblings
    True: r"""
1.6\times 10^{-19} ~ 1.6\times 10^{-19} | 10^{-20} ~ \frac{1}{10^{20}} | 6.02\times10^{23} ~ 6.02 \cdot 10^{23}
a=1, b=-2 ~ b=-2, a=1 | x=3, y=4, z=5 ~ z=5, x=3, y=4 | m=2, n=3 ~ (m,n)=(2,3) | (m,n)=(2,3) ~ (n,m)=(3,2)
x=1 \text{ or } x=2 ~ 1, 2 | n=1,2 ~ 1,2 | 1,-2 ~ x=1,-2 | B ~ b | C ~ (C) | \text{(C)} ~ \textbf{(C)}
\textbf{(C)} ~ \textbf{(C) }12 | 12 ~ \textbf{(C) }12 | 2A+b ~ b+2A | 11,\! 111,\! 111,\! 100 ~ 11111111100
1\,000\,000 ~ 1{,}000{,}000 | 1000 ~ 1,\!000 | 19, 46, \text{ and } 82 ~ 19, 46, 82 | 1,2, and 3 ~ 3,2,1
(0,100) ~ (0, 100) | (p,q)=(3,2) ~ (3,2) | x=2, y=1 ~ (2,1) | $(1,2),(3,4)$ ~ (3,4), (1,2)
\{1\pm\sqrt{5},-2\} ~ -2, 1+\sqrt{5}, 1-\sqrt{5} | \pm 3 ~ -3, 3 | x=\pm 2 ~ \pm 2 | y=\pm\frac34x ~ y=\pm \frac{3}{4} x
-\frac{3}{4} ~ \frac{3}{-4} | -\frac{3}{4} ~ -0.75 | \frac{\sqrt{3}}{-2} ~ -\frac{\sqrt{3}}{2} | f(x)=1 ~ 1
a_n = 2n+1 ~ 2n+1 | \angle ABC = 60^\circ ~ 60^\circ | \text{Area} = 12 ~ 12 | 12 ~ S=12
125\text{ miles} ~ 125\textnormal{ miles} | 12\text{ cm}^2 ~ 12 \mathrm{~cm}^{2} | 48\pi \text{ cm}^3 ~ 48\pi
20 \mathrm{~km} / \mathrm{h} ~ 20 | (-\infty,\infty) ~ \mathbb{R} | x>2 ~ (2,\infty) | a \leqslant 1 ~ (-\infty, 1]
(-\infty, 2)\cup(3,\infty) ~ (3,+\infty)\cup(-\infty,2) | \{x \mid x>2\} ~ \{ x \mid x > 2 \} | \varnothing ~ \emptyset
\frac13 ~ 0.\overline{3} | 1.\overline{3} ~ \frac43 | 3+4i ~ 4i+3 | 3 : 5 ~ 3:5 | \log _{2} 5 ~ \log_{2} 5
\begin{pmatrix} 2 \\ 3 \end{pmatrix} ~ \begin{bmatrix}2\\3\end{bmatrix} | x^2-1 ~ (x-1)(x+1) | 2x+3y=6 ~ 4x+6y=12
\frac{\sqrt2}{2} ~ \sqrt{\frac12} | 2^{1/3} ~ \sqrt[3]{2} | 3\pi ~ 3π | 2x-y+3=0 ~ y=2x+3 | \frac{1}{x}+C ~ \frac1x + C
6\pi ~ 6\pi\text{ cm} | 2^{10} ~ 1024 | 1<x<2 ~ (1,2) | (-\infty,2] ~ x \in (-\infty,2] | 73 ~ 073 | 10:30 ~ 10:30
0.3\pi ~ 0.1\pi+0.2\pi | \frac{1}{2}\ln 2 ~ \frac{\ln 2}{2} | 10^{3} ~ 1000 | 1 \frac12 ~ 1.5 | ab+cd ~ cd+ab
""",
    False: r"""
\frac{1}{2^{99}} ~ \frac{1}{2^{98}} | 1.6\times 10^{-19} ~ -1.6\times 10^{-19} | 10^{-20} ~ 3 \cdot 10^{-20}
1-\frac{1}{2^{99}} ~ 1-\frac{1}{2^{100}} | \sqrt{2}+10^{-20} ~ \sqrt{2} | (0,10^{-20}) ~ (0,2\cdot10^{-20})
0.1234567890123456789 ~ 0.1234567890123456788 | 6.02\times10^{23} ~ 6.03 \cdot 10^{23} | x=1, y=2 ~ x=2, y=1
a=1, b=2 ~ a=1, c=2 | (m,n)=(2,3) ~ (n,m)=(2,3) | R-r ~ r-R | \Delta x ~ \delta x | x ~ X | C ~ D | 2A+b ~ 2a+B
12 ~ \textbf{(D) }13 | (3,2) ~ (2,3) | $(1,2),(3,4)$ ~ (1,2), (4,3) | 3, 5, 7, 9 ~ 3,5,7 | \pm 3 ~ 3
2\pm\sqrt{3} ~ 2+\sqrt{3} | \frac{3+\sqrt{17}}{2} ~ \frac{3 \pm \sqrt{17}}{2} | 125\text{ miles} ~ 125 km
(-\infty, 2) ~ (-\infty, 2] | a \leq 1 ~ a < 1 | \frac{1}{3} ~ 0.333 | 0.\overline{3} ~ 0.3 | 3+4i ~ 3-4i | 8\pi ~ 25.13
\begin{pmatrix} 10^{-20} \end{pmatrix} ~ \begin{pmatrix} 10^{-21} \end{pmatrix} | \frac{22}{7} ~ 3.142857
\begin{pmatrix} 2 \\ 3 \end{pmatrix} ~ \begin{pmatrix} 3 \\ 2 \end{pmatrix} | x^2-1 ~ (x-1)(x+2) | \sqrt{2} ~ \sqrt{3}
(3,4) ~ 3,4 | (3,4) ~ \{3,4\} | \{1,2\} ~ (2,1) | [1,2) ~ [1,2] | (1,2) ~ 1<x<2 | \pi ~ 3.141593
\frac{\pi}{4} ~ \int_0^1 \frac{1}{1+x^2}dx | 2x ~ \frac{d}{dx} x^2 | \sqrt2 ~ \max(\sqrt2,1) | 90^\circ ~ \frac{\pi}{2}
486 ~ 2 \cdot 3^5 | \frac{a+b}{c} ~ a+b/c | 5 ~ 5 \text{ hours and } 30 \text{ minutes}
""",
}
SAID = {  # gold ~ completion; ⏎ is a new line
    True: r"""
3,5,7 ~ \boxed{3}, \boxed{5}, \boxed{7} | 2 ~ our answer is $\boxed 2$. | 2 ~ \fbox{2} | 73 ~ ### Final Answer⏎73
73 ~ Final Answer: The final answer is $73$. I hope it is correct. | 73 ~ …⏎---⏎⏎✅ Final Answer: **73**
73 ~ So the answer is 73. Thank you! | C ~ The correct answer is (C). | 18 ~ **Answer: 18 dollars**
18 ~ The answer is $18 per day. | 18 ~ \[\boxed{18}\]⏎⏎So the answer is 18 dollars. | 70000 ~ #### 70,000 dollars profit
""",
    False: r"""
18 ~ \boxed{17}, \boxed{19}, \boxed{18} | 18 ~ \boxed{18} or \boxed{19} | 18 ~ \boxed{17} \text{ or } \boxed{18}
18 ~ Janet makes $18 every day. | 18 ~ The answer is 17 or 18. | 2 ~ \fbox{3} | C ~ The correct answer is (D).
\sqrt{2} ~ <answer>3} \boxed{\sqrt{2}</answer>
""",
}


@pytest.mark.parametrize("right", [True, False])
def test_t30_what_real_models_and_data_sets_write(right):
    boxed, said = ([line.split(" ~ ") for line in table[right].strip().replace("\n", " | ").split(" | ")]
                   for table in (BOXED, SAID))  # fmt: skip
    pairs = [(gold, f"\\boxed{{{answer}}}") for gold, answer in boxed] + said
    assert len(pairs) >= 55
    grades = WORKERS.map(lambda pair: grade(pair[1].replace("⏎", "\n"), pair[0]), pairs)
    assert [(pair, found) for pair, found in zip(pairs, grades) if found.correct is not right] == []


def test_verifier_agrees_with_recorded_judgements():
    """300 model solutions of GSM8K, each with its recorded correctness (openai/grade-school-math, MIT)."""
    rows = [json.loads(line) for line in (ROOT / "tests" / "gsm8k_solutions.jsonl").read_text().splitlines()]
    assert sum(row["correct"] for row in rows) == 150
    assert [row for row in rows if grade(row["solution"], row["gold"]).correct != row["correct"]] == []


def test_several_gold_answers_and_none():
    assert grade("\\boxed{4}", ["3", "so \\boxed{4}", "???"]).correct
    assert not grade("\\boxed{5}", ["3", "4"]).correct
    for gold in ("", "???", "#### ", "\\boxed{1", [], ["", "@@"], "x" * 5000):
        assert grade("<answer>1</answer>", gold) == (None, "1", "no gold")
    assert grade("no idea", "1") == (False, None, "no answer")
    assert grade(f"\\boxed{{{'1' * 401}}}\n#### {'1' * 401}", "1").how == "too long"


def compares_again() -> bool:
    rlvr_math.is_equal.cache_clear()
    return grade("\\boxed{1+x}", "x+1").correct


def test_rlvr_math_detail_6_t30_a_bomb_costs_its_limit_and_blocks_nobody(monkeypatch):
    assert compares_again()
    both = threading.Barrier(2)
    list(WORKERS.map(lambda n: both.wait() is None or grade(f"\\boxed{{{n}+y}}", f"y+{n}"), range(2)))  # they are up
    pending = WORKERS.submit(grade, "\\boxed{9^{9^{9}}}", "\\sqrt{2}")
    time.sleep(0.1)
    assert grade("#### 5", "5").correct and grade("\\boxed{z+1}", "1+z").correct
    found = WORKERS.map(grade, [f"\\boxed{{{n}+x}}" for n in range(8)], [f"x+{n // 2 * 2}" for n in range(8)])
    assert [one.correct for one in found] == [True, False] * 4
    assert not pending.done() and pending.result() == (False, "9^{9^{9}}", "timeout")
    monkeypatch.setattr(rlvr_math, "LIMIT", 1.0)
    began = time.monotonic()
    assert grade("\\boxed{(10^9)!}", "n!") == grade("\\boxed{(10^9)!}", "n!") == (False, "(10^9)!", "timeout")
    assert 1 <= time.monotonic() - began < 1.9 and compares_again()  # the second time it is known


@pytest.mark.parametrize("answer", [
    "{" * 1_000_000, "(" * 150 + "x" + ")" * 150, "\\frac{" * 60 + "1" + "}{2}" * 60, "\\boxed{" * 1000,
    "1" * 390 + "x", "x" * 1_000_000, "\x00", "\ud800", "\\sqrt{" * 60, "\n" * 1000 + "A: " * 100, "()", ",", "\\{\\}",
    "<answer>" * 100_000, "x^" * 100 + "2", "(" + "a ," * 90 + "a|)", "\\boxed{1}" + " " * 1_000_000 + "\\boxed{2}",
    "1e999", "0." + "9" * 390, "-" * 390, "$" * 390, "x=" * 190, "[" + "1,2" * 120, "3+" * 190 + "3", "\\frac" * 70,
])  # fmt: skip
def test_odd_answers_are_wrong_and_quick(answer):
    compares_again()
    for text in (f"<answer>{answer}</answer>", f"\\boxed{{{answer}}}", f"#### {answer}", f"The answer is {answer}"):
        for gold in ("x+1", "(p,q)=(3,2)"):
            began = time.monotonic()
            assert grade(text, gold).correct is False
            assert time.monotonic() - began < rlvr_math.LIMIT + 7  # the start of a process on a busy machine


def test_the_exact_path_is_fast():
    pairs = [(f"some steps, {n} and more\n#### {n}", str(n)) for n in range(6000)]
    began = time.process_time()
    assert all(found.correct for found in WORKERS.map(grade, *zip(*pairs)))
    assert len(pairs) / (time.process_time() - began) > 2000


def test_a_worker_that_dies_is_replaced_and_one_that_cannot_start_is_told(monkeypatch):
    assert compares_again()
    first = rlvr_math.OWN.process
    first.kill()
    first.wait()
    assert compares_again() and rlvr_math.OWN.process is not first
    monkeypatch.setattr(rlvr_math, "LIMIT", 60.0)
    threading.Timer(0.5, rlvr_math.OWN.process.kill).start()  # in the midst of its work
    assert grade("\\boxed{8^{8^{8^{8}}}}", "\\sqrt{2}").how == "timeout" and compares_again()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match="can import math_verify"):
        ThreadPoolExecutor(1).submit(grade, "\\boxed{3+x}", "x+3").result()


def test_no_worker_outlives_its_parent():
    """Neither one that waits, nor one that is at a comparison without end when its parent is killed."""
    code = "import rlvr_math as r; r.LIMIT = 2; r.grade('\\\\boxed{1+x}', 'x+1')\n"
    code += "pid = r.WORKERS.submit(lambda: r.grade('\\\\boxed{2+x}', 'x+2') and r.OWN.process.pid).result()\n"
    code += "print(pid, r.OWN.process.pid, flush=True); r.grade('\\\\boxed{9^{9^{9}}}', '\\\\sqrt{2}')"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = parent.stdout.readline().split()
    parent.kill()
    parent.wait()
    assert len(set(workers)) == 2
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (left := [worker for worker in workers if Path("/proc", worker).exists()]):
        time.sleep(0.1)
    assert not left or all("zombie" in Path("/proc", worker, "status").read_text() for worker in left)


def spied(monkeypatch, name: str) -> list:
    """Arguments and results of a function of rlvr_math that a run calls."""
    calls, real = [], getattr(rlvr_math, name)

    def noting(*args, **kwargs):
        calls.append((*args, kwargs, real(*args, **kwargs)))
        return calls[-1][-1]

    monkeypatch.setattr(rlvr_math, name, noting)
    return calls


def sampling(monkeypatch, *group: Completion) -> None:
    """Every prompt gets these completions, rewarded where they stopped; evaluation is left out."""
    monkeypatch.setattr(rlvr_math, "evaluate", lambda *args: ({}, []))
    monkeypatch.setattr(rlvr_math, "reward", lambda found, stopped: float(stopped))
    monkeypatch.setattr(rlvr_math.Sampler, "generate", lambda self, prompts, *args: [list(group) for _ in prompts])


def test_rlvr_math_detail_7_rows_without_advantage_need_no_forward_without_a_kl(tmp_path, monkeypatch):
    calls = spied(monkeypatch, "completion_logprobs")
    rewards = iter([1.0, 1.0, 0.0, 1.0])
    sampling(monkeypatch, *[Completion([9, 8], [-0.5] * 2, True)] * 2)
    monkeypatch.setattr(rlvr_math, "reward", lambda *args: next(rewards))
    quick("rlvr_math", tmp_path / "plain")
    assert sorted(row for _, part, *_ in calls for row in part) == [2, 3]
    rewards, calls[:] = iter([1.0, 1.0, 0.0, 1.0]), []
    quick("rlvr_math", tmp_path / "leashed", beta=0.1)
    assert {row for _, part, *_ in calls for row in part} == {0, 1, 2, 3}


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_the_kl_is_k1_in_rloos_reward_and_k3_in_other_losses(algorithm, tmp_path, monkeypatch):
    """All rewards are equal, and the reference is another model: only the KL is left."""
    monkeypatch.setattr(rlvr_math, "evaluate", lambda *args: ({}, []))
    monkeypatch.setattr(rlvr_math, "reward", lambda *args: 0.5)
    sums, policies, kls = [spied(monkeypatch, name) for name in ("mean_loss", "token_losses", "kl_estimate")]
    load = rlvr_math.frozen

    def other(*args):
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
    expected = policy_losses if algorithm == "rloo" else policy_losses + 0.5 * k3
    torch.testing.assert_close(sums[0][0], expected)


def test_expert_iteration_trains_on_right_completions_without_copies_up_to_a_cap(tmp_path, monkeypatch):
    group = [Completion(ids, [-1.0] * len(ids), ids != [2]) for ids in ([1], [1], [2], [3, 3], [1], [4])]
    right = torch.tensor([[float(c.stopped) for c in group]])
    assert rlvr_math.first_right(group, right, 9).tolist() == [[1, 0, 0, 1, 0, 1]]
    assert rlvr_math.first_right(group * 2, right.repeat(2, 1), 2).tolist() == [[1, 0, 0, 1, 0, 0]] * 2
    sampling(monkeypatch, *group)
    calls = spied(monkeypatch, "mean_loss")
    settings = {"algorithm": "expert_iteration", "batch_size": 1, "num_samples": 6, "keep_per_question": 2}
    row = quick("rlvr_math", tmp_path, **settings, beta=0.1)  # with a KL all rows have a forward
    ((losses, mask, how, _, tokens, *_),) = calls
    assert how == "token" and tokens == mask.sum() == 3 and (losses >= 0).all()  # −log π of [1] and [3, 3]
    assert row["reward/mean"] == pytest.approx(5 / 6)  # of all that was sampled


def test_rlvr_math_detail_3_r1_zeros_template_ends_at_its_answer(tmp_path, monkeypatch, tokenizer):
    letters = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))  # a tag in many tokens
    for text, end, stopped in (("a</answer>", 10, True), ("a</answer>b</answer>", 10, True), ("a</answer", 9, False)):
        found = rlvr_math.until_answer(letters, Completion(list(map(ord, text)), list(range(len(text))), False))
        assert found == Completion(list(map(ord, text[:end])), list(range(end)), stopped)
    ids = tokenizer.encode("1</think><answer>2</answer>, as was to be shown", add_special_tokens=False)
    settings = {"template": "r1_zero", "max_prompt_tokens": 500, "instruction": "Not asked!"}
    said = Completion(ids, [-1.0] * len(ids), False)
    monkeypatch.setattr(rlvr_math.Sampler, "generate", lambda self, prompts, *args, **more: [[said] * 2] * len(prompts))
    row = quick("rlvr_math", tmp_path, **settings)
    assert row["completions/truncated_fraction"] == row["eval/truncated_fraction"] == row["answers/none"] == 0
    assert row["completions/length_mean"] == ids.index(10) + 1 < len(ids)
    sample = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert sample["completion"] == "<think>1</think><answer>2</answer>" and "Not asked" not in sample["prompt"]
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tmp_path / "model")  # which sft.py can go on with
    chat = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": sample["completion"]}]
    asked = saved.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("User: 1+1=?\nAssistant: <think>")
    assert saved.apply_chat_template(chat, tokenize=False) == asked + "1</think><answer>2</answer><|end|>"


@pytest.mark.parametrize("row", [
    {"question": "1+1=?", "answer": "so 1+1=2\n#### 2"},
    {"problem": "1+1=?", "solution": "so it is $\\boxed{2}$", "level": "Level 1"},
    {"problem": "1+1=?", "answer": "2", "solution": "whatever"}, {"prompt": "1+1=?", "answer": ["two", "2"]},
    {"problem": "1+1=?", "answer": "notfound", "solution": "so \\boxed{2}"},
    {"prompt": [{"role": "user", "content": "1+1=?"}], "answer": 2},
])  # fmt: skip
def test_formats_of_questions_and_gold_answers_that_say_nothing(row, tmp_path, tokenizer, capfd):
    empty = [{"question": "1+2=?", "answer": answer, "solution": "clear"} for answer in ("", "proof", "#### ", [])]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in [row] * 5 + empty))
    questions, _ = load_questions(tokenizer, str(data), str(data), 4, 200, 1, instruction=" Go!")
    assert len(questions) == 5 and "4 of 9" in capfd.readouterr().out
    assert "1+1=? Go!" in tokenizer.decode(questions[0]["ids"])
    assert grade("\\boxed{2}", questions[0]["row"]["answer"]).correct
    assert not grade("\\boxed{1}", questions[0]["row"]["answer"]).correct


def test_verified_rows_are_no_two_alike_capped_and_exact_after_a_kill(tmp_path):
    path, row, other = tmp_path / "verified.jsonl", {"question": "a?", "answer": ["1"]}, {"prompt": "b?", "answer": "2"}

    def saved(step, *found) -> list[tuple]:
        rlvr_math.save_verified(path, step, list(found), 2, " Go!")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [(r["step"], r["prompt"][0]["content"], r["completion"]) for r in rows]

    first = [(1, "a? Go!", "x"), (1, "b? Go!", "x")]
    assert saved(1, (row, "x"), (row, "x"), (other, "x")) == first
    second = saved(2, (row, "x"), (row, "y\u2028"), (row, "z"), (other, "x"))
    assert second == [*first, (2, "a? Go!", "y\u2028")]
    assert saved(3, (other, "y")) == [*second, (3, "b? Go!", "y")]
    assert saved(2, (row, "x"), (row, "y\u2028"), (row, "z"), (other, "x")) == second


def test_verified_samples_are_data_for_sft(tmp_path):
    settings = {"algorithm": "expert_iteration", "save_verified": True, "keep_per_question": 2, "instruction": " "}
    data = str(first_rows("maths_train.jsonl", 6))
    quick("rlvr_math", tmp_path / "rl", **settings, dataset=data, steps=3, batch_size=6, num_samples=8)
    rows = [json.loads(line) for line in (tmp_path / "rl" / "verified.jsonl").read_text().splitlines()]
    prompts = [json.dumps(row["prompt"]) for row in rows]
    assert max(prompts.count(prompt) for prompt in prompts) == 2 and all('=? "' in prompt for prompt in prompts)
    assert len({(p, r["completion"]) for p, r in zip(prompts, rows)}) == len(rows)
    assert all(grade(row["completion"], row["answer"]).correct for row in rows)
    verified = str(tmp_path / "rl" / "verified.jsonl")
    assert quick("sft", tmp_path / "sft", dataset=(verified,), eval_dataset=verified)["loss/train"] > 0


def test_t28_t29_votes():
    assert winner(["7", "7", "9"], [1.0] * 3) == "7" and winner(["7", "7", "9"], [0.2, 0.3, 0.6]) == "9"
    assert winner(["", "", True], [1.0] * 3) is True and winner([""], [1.0]) == ""
    assert winner(["1", "2", "2", "1"], [1.0] * 4) == "1"  # of equals the first


def test_t27_rlvr_math_detail_8_evaluation_by_hand(monkeypatch, tokenizer):
    """Two questions with four samples each, and the greedy one behind them."""
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


def test_steps_0_evaluates_only_and_logs_every_sample(tmp_path):
    row = quick("rlvr_math", tmp_path, steps=0, eval_rows=6, eval_samples=3, max_think_tokens=8)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 18 and len(metrics(tmp_path)) == 1 and not (tmp_path / "checkpoints").exists()
    assert sum(sample["reward"] for sample in samples) / 18 == pytest.approx(row["eval/accuracy"])
    assert {"eval/pass@2", "eval/pass@3", "eval/maj@3", "eval/accuracy_margin"} <= set(row)


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_rerankers(kind, tmp_path):
    name = "steps" if kind == "process" else "preferences"
    data = ["--dataset", first_rows(f"{name}_train.jsonl", 1500), "--eval-dataset", TINY / f"{name}_test.jsonl"]
    steps = ["--kind", kind, "--steps", 60, "--eval-every", 0, "--eval-rows", 16]
    run("reward_model", *steps, *data, "--output-dir", tmp_path / "rm")
    reranker = str(tmp_path / "rm" / "model")
    settings = {"steps": 0, "eval_rows": 64, "eval_samples": 6, "max_completion_tokens": 64}
    row = quick("rlvr_math", tmp_path / "run", **settings, reranker=reranker)
    assert row["eval/best@6"] > row["eval/accuracy"] + 0.1 and row["eval/weighted@6"] > row["eval/maj@6"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(0 <= sample["score"] <= 1 for sample in samples)


@pytest.mark.parametrize("seed", [1, 2])
def test_rlvr_math_learns(seed, tmp_path):
    run("rlvr_math", "--seed", seed, "--steps", 24, "--eval-every", 0, "--eval-rows", 96, "--output-dir", tmp_path)
    before, *rows, after = metrics(tmp_path)
    assert before["eval/accuracy"] <= 0.5 and after["eval/accuracy"] >= 0.68 and after["eval/accuracy_greedy"] >= 0.9
    assert after["eval/completion_length"] > before["eval/completion_length"] + 6
    assert before["eval/maj@8"] > before["eval/accuracy"] + 0.1 and 0 < after["eval/accuracy_margin"] < 0.1
    assert all(row["policy/sampler_gap"] < 1e-6 and row["policy/clip_fraction"] == 0 for row in rows)


@pytest.mark.parametrize("name", ["reinforce", "rloo", "dr_grpo", "expert_iteration"])
def test_the_other_algorithms_learn(name, tmp_path):
    flags = ["--algorithm", name, "--steps", 12, "--eval-every", 0, "--eval-samples", 4, "--eval-rows", 96]
    run("rlvr_math", *flags, "--output-dir", tmp_path)
    rows = metrics(tmp_path)
    assert rows[-1]["eval/accuracy"] > rows[0]["eval/accuracy"] + 0.15
