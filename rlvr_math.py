"""RLVR for mathematics: reinforcement learning whose reward is a checker, the R1-Zero recipe.

The policy writes G solutions to every question, a verifier compares each final answer with the right one, and what
was right becomes more likely. One dial chooses among five ways to do so:

    reinforce          A_i = r_i                              loss = −mean_i Σ_t A_i·log π(y_t)
    rloo               A_i = R_i − mean_{j≠i} R_j             loss = −mean_i min(ρ_i·A_i, clip(ρ_i)·A_i),  ρ_i = Π_t ρ_t
    grpo               A_i = (r_i − mean(r)) / std(r)         loss = −mean_i (1/T_i) Σ_t min(ρ_t·A_i, clip(ρ_t)·A_i)
    dr_grpo            A_i = r_i − mean(r)                    loss = −mean_i (1/T_max) Σ_t min(ρ_t·A_i, clip(ρ_t)·A_i)
    expert_iteration   A_i = [right, new, under the cap]      loss = −Σ_it A_i·log π(y_t) / Σ_i A_i·T_i

Signal: correctness, decided exactly or by algebra. Optimizer: the dial. Leash: the clip, and with --beta a KL to the
start: k3 in the loss, for rloo k1 in the reward, R_i = r_i − β·Σ_t log(π_old/ref). Defence: a verifier that takes no
guess, no half answer, and for a number only a number.

    python rlvr_math.py                                                      # embedded model, one minute on a laptop
    python rlvr_math.py --model Qwen/Qwen2.5-1.5B-Instruct                   # GSM8K on one GPU
    python rlvr_math.py --model Qwen/Qwen2.5-1.5B --template r1_zero         # a base model, as R1-Zero
    python rlvr_math.py --model runs/rlvr_math/latest/model --steps 0 --eval-samples 16 --reranker RM    # evaluate only
    torchrun --nproc-per-node 8 rlvr_math.py --model Qwen/Qwen2.5-7B --dataset DigitalLearningGmbH/MATH-lighteval
    python -c 'from rlvr_math import grade; print(grade("#### 1/2", "0.5"))'                             # the verifier

Normal: `eval/accuracy` (pass@1, ± `eval/accuracy_margin`) and `eval/completion_length` rise together where thinking
pays; maj@k lies above it until `policy/entropy` falls. `eval/pass@8` that stands still while accuracy rises: the
policy learns to choose among what it could do. `answers/none` falls to 0, `answers/timeout` is 0.

Details that decide whether it works, marked in the code under their numbers:
 1. A group whose rewards are all equal gets advantages of exactly zero, not rounding noise over a tiny std.
 2. Ids are the sampler's own; logits are divided by the sampling temperature in every forward.
 3. A completion that was cut earns nothing; one in R1-Zero's template ends at its </answer>, whatever follows.
 4. The answer is what is stated last, behind the reasoning; a number that merely stands in the text never counts.
 5. A gold number is met by a number alone: `47*8` for 376 would be a perfect score for copying the question.
 6. Algebra runs in processes of their own that the system ends past their limit.
 7. Losses are divided by counts of the whole optimizer step; rows without advantage need no forward without a KL.
 8. pass@k is the unbiased estimator; an absent answer is no vote.

Papers: R1 arXiv:2501.12948, RLOO 2402.14740, GRPO 2402.03300, Dr. GRPO 2503.20783, STaR 2203.14465, s1 2501.19393.
"""

import gc  # noqa: I001 (sorted, the two lines from common.tokenizer would be twelve)
import json
import math
import os
import re
import resource
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime, timedelta
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from common.generation import Completion, Sampler, sample_answers
from common.kl import RewardModel, clip_gradients, completion_logprobs, context_length, frozen, kl_estimate, load_model
from common.tokenizer import TINY, first_of, load_questions, load_tokenizer, merged, microbatches, pad_rows
from common.tokenizer import read_messages, shuffled_pass, stop_token_ids

R1_ZERO = (  # DeepSeek-R1-Zero's template for base models: the answer goes on from an opened <think>
    "{% for turn in messages %}{% if turn.role == 'system' %}{{ turn.content }}\n{% elif turn.role == 'user' %}"
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>.\nUser: {{ turn.content }}\n"
    "Assistant: <think>{% else %}{{ turn.content | replace('<think>', '', 1) }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass
class Args:
    # model and data
    model: str = "Qwen/Qwen2.5-1.5B-Instruct"  # folder or Hub name of a causal language model
    template: Literal["chat", "r1_zero"] = "chat"  # the model's own, or R1-Zero's for base models
    instruction: str = " Think step by step, and put the final answer within \\boxed{}."  # behind a chat's question
    dataset: str = "openai/gsm8k:main"  # file, folder or Hub name[:subset[:split]]; question and answer or solution
    eval_dataset: str | None = "openai/gsm8k:main:test"  # held-out rows; with --dataset alone, at most a tenth of it
    eval_rows: int = 200  # held-out questions used
    eval_samples: int = 8  # completions of each, at --temperature: n of pass@k and maj@k
    max_prompt_tokens: int = 512  # rows with a longer prompt are dropped
    max_completion_tokens: int = 1024  # budget of a completion

    # algorithm
    algorithm: Literal["reinforce", "rloo", "grpo", "dr_grpo", "expert_iteration"] = "grpo"  # as in the table above
    num_samples: int = 8  # completions per prompt (G)
    temperature: float = 1.0  # of sampling, and of every log-probability in training
    clip_low: float = 0.2  # ratios are clipped below 1 − clip_low
    clip_high: float = 0.2  # and above 1 + clip_high
    beta: float = 0.0  # weight of the KL to the starting model; 0 loads no reference; R1 took 0.001
    importance_cap: float = 2.0  # on the weight π_old/μ, which corrects for the sampler's rounding; 0: no weight
    update_epochs: int = 1  # passes over each rollout
    minibatches: int = 1  # optimizer steps per pass; reinforce and expert_iteration take later ones off-policy
    keep_per_question: int = 4  # right completions of a question that expert_iteration and --save-verified keep
    save_verified: bool = False  # write right completions, no two alike, to verified.jsonl as data for sft.py

    # optimisation
    steps: int = 200  # rollouts; 0 evaluates only, and logs every sample
    batch_size: int = 32  # prompts per rollout over all processes
    microbatch_tokens: int = 16384  # tokens per forward and backward: a memory knob, not a change of result
    sampler_memory_gb: float | None = None  # bound on its keys and values; None: 4 on a CPU, a fifth of a GPU's
    lora_rank: int = 0  # 0: all weights; else adapters of this rank, by default at ten times the learning rate
    learning_rate: float = 1e-6  # peak
    warmup_steps: int = 5  # rollouts of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up; the last two reach 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products and saved weights; auto: bfloat16 on CUDA
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    seed: int = 1
    today: str = f"{date.today()}"  # what chat templates print as the date

    # test-time compute, in evaluation
    reranker: str | None = None  # output of reward_model.py, outcome or process: best-of-k and weighted votes
    max_think_tokens: int = 0  # reasoning that has not ended by then is cut, and --answer-cue forced; 0: never
    answer_cue: str = "</think><answer>"  # what is put where reasoning is cut

    # output
    eval_every: int = 20  # steps between evaluations
    save_every: int = 20  # steps between checkpoints
    output_dir: str | None = None  # default: runs/rlvr_math/<date>_<time>
    resume: str | None = None  # continue the run in this folder with its arguments, but for those given again
    wandb_project: str | None = None  # also log to Weights & Biases


EMBEDDED = Args(  # what runs where no --model is given: a minute on two cores
    model=f"{TINY}", dataset=f"{TINY}/maths_train.jsonl", eval_dataset=f"{TINY}/maths_test.jsonl", eval_rows=192,
    instruction="", max_completion_tokens=64, steps=60, batch_size=16, microbatch_tokens=4096, learning_rate=3e-4,
    eval_every=15,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the verifier

MAX_ANSWER = 400  # characters; whatever is longer is no final answer
STATED = re.compile(r"(?:^[\s*_#>]*a ?:|\banswer\**(?: ?[:=]| is\b:?|[*_: ]*\n))[\s*_:]*", re.IGNORECASE | re.MULTILINE)
BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?![\s{])((?:\\[a-z]+)?[^\s$\\.,;<]*(?:\.\d+)?)")  # \boxed 2
BETWEEN_BOXES = r"[\s$*]*(?:,|;|\band\b|\bor\b|\\text\{ *(?:and|or) *\})[\s$*]*"
SPELLINGS = [  # of the same thing, one for all
    (r"(?<!\\)\$\$?([^$]+)(?<!\\)\$\$?|(?<!\\)\\[()\[\]]|`", r"\1"),
    (r"\\(?:left|right|displaystyle|quad)(?![a-zA-Z])|(?<=\\[lg]eq)slant|^[\s*]*[a-zA-Z] ?\\in(?![a-z])", ""),  # x \in
    (r"\{,\}|,\\! ?|\\[,!](?=\d{3}(?!\d))", ","),  # in front of thousands
    (r"(?<!\\)\\[,!;: ]|~", " "),
    (r"\\([$%])", r"\1"),
    (r"[−–]", "-"),
    (r"(?<=\d)\s*\\(?:text|mathrm|mbox)\s*\{\s*[a-zA-Z]\s*\}\W*$", ""),  # 3\text{ m}
    (r"\\(?:text(?:normal|rm|bf|it)?|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\[cdt]frac", r"\\frac"),
    (r"\\(frac|sqrt)\s*(\d)", r"\\\1{\2}"),
    (r"(\\frac\{[^{}]*\})\s*(\w)", r"\1{\2}"),
    (r"\\(begin|end)\{[bB]matrix\}", r"\\\1{pmatrix}"),
    (r"\^\{?\\circ\}?|°|\\degree", " degrees"),
    (r"\\mathbb\{?R\}?", r"(-\\infty,\\infty)"),
    (r"\\varnothing", r"\\emptyset"),
    (r"\s+", " "),
]
NUMBER = re.compile(
    r"(?P<sign>[-+ $€£]*)(?:(?P<whole>\d+) +(?=\d+ ?/))?"  # -$5, $-5, 3 1/2
    r"(?=\.?\d)(?P<digits>(?:[1-9]\d{0,2}(?:,\d{3})+|\d*)(?:\.\d*)?)(?:\\(?:overline|bar)\{(?P<again>\d+)\}"
    r"| ?/ ?(?P<under>-?\d+)|(?:e| ?(?:\\times|\\cdot|\*) ?10\^)\{?(?P<power>[-+]?\d{1,3})\}?)?"
    r"(?P<unit> ?[%$€£]|(?: ?(?:k|[cmk]m|[km]g|ml|lbs?|oz|ft|in|hrs?|mph)(?![a-z])(?: ?/ ?[a-z]+)?"
    r"| [a-z]{3,}(?:(?: ?/ ?| )[a-z]+){0,3})(?: ?\^\{?[23]\}?)?|)"
)
SCALES = dict(k=10**3, dozen=12, hundred=100, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
SYMBOLS = {"$": "dollar", "%": "percent", "€": "euro", "£": "sterling", "/": "per"}
NO_UNITS = re.compile(  # after a number these make another number of it, or say that there are several
    r"\b(?:or|and|to|more|less|fewer|times|plus|minus|over|by|out|not|if|but|sqrt|log|double|triple|twice|thirds?|"
    r"hal(?:f|ves?)|quarters?|squared|cubed|factorial|negative|root|modulo?|mod|choose|scores?|gross|sin|cos|tan|exp|"
    r"point|zero|one|two|three|five|eight|nine|twelve|(?:four|six|seven|ten|eleven|\w*teen)(?:ths?)?|lakh|crore|"
    r"(?:fif|eigh|nin|twelf|\w*(?:tie|dred|sand|illion))ths?|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\b"
)
UNIT_AT_END = re.compile(r" (?:square |cubic )?(?:units?|[cmk]?m|inch(?:es)?|feet|miles|degrees?)(?: ?\^\{?[23]\}?)?$")
NAME = r"(?!\\[a-z]*(?:frac|sqrt))[^\d\s=<>+*/^,-][^=<>+*/^,-]*?"  # of a left side: x, a_n, f(x), \angle ABC
RELATION = re.compile(r"[<>]|\\(?:[lg]eq?|neq?|in|cup|cap|setminus|subset)(?![a-z])")
UNEVALUATED = r"int|sum|prod|lim|max|min|gcd|lcm|binom|det|mod|sin|cos|tan|cot|sec|csc|log|ln|exp|frac\{d|partial|!"


def stated_answer(completion: str) -> str | None:
    """The answer that a completion states last: in \\boxed, after ####, in <answer> tags, or on a last line such as
    `A: 18` or `The answer is 18.` Reasoning in <think> does not count, an unbalanced box is no answer, boxes side by
    side are a list, and a number that merely stands in the text never is an answer."""
    text = BARE_BOX.sub(r"\\boxed{\1}", completion.rpartition("</think>")[2].partition("<think>")[0])  # detail 4
    found = [last_boxes(text)]
    before, tag, inside = text.rpartition("</answer>")[0].rpartition("<answer>")
    if tag:
        found.append((len(before), inside))
    before, tag, rest = text.rpartition("####")
    if tag and re.match(r".*[\d\\]", rest):  # else it is a heading
        found.append((len(before), rest.partition("\n")[0]))
    tail = [line for line in text[-2 * MAX_ANSWER :].split("\n") if line.strip()][-2:]
    *is_stated, said = STATED.split("\n".join(tail))
    if is_stated and not re.search(r"\n|\\f?box|</answer>", said):
        said = re.match(r"\$[^$]+\$|(?:(?!\.\s+[A-Z]).)*", said)[0]
        if re.search(r"[\d\\]", said) or not any(answer for _, answer in found):  # "is correct" takes nothing back
            found.append((len(text), said))
    answer = max(found)[1].strip()[: 2 * MAX_ANSWER]
    return STATED.split(answer)[-1] or None  # <answer>The answer is 5</answer>


def last_boxes(text: str) -> tuple[int, str]:
    """Where the last box stands, or the list of boxes that it ends, and what they hold: "" if one is unbalanced."""
    first, end, insides = -1, 0, []
    for match in list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))[-8:]:
        if not insides or not re.fullmatch(BETWEEN_BOXES, text[end : match.start()]):
            first, insides = match.start(), []
        rest = text[match.end() : match.end() + MAX_ANSWER + 1]
        depths = list(accumulate(((c == "{") - (c == "}") for c in rest), initial=1))
        size = depths.index(0) if 0 in depths else 0
        insides.append(rest[: max(size - 1, 0)])
        end = match.end() + size
    hedged = re.match(BETWEEN_BOXES + r"[-+.\\]?[\d\\]", text[end : end + MAX_ANSWER])
    return first, ", ".join(insides) if all(insides) and not hedged else ""


def normal_form(answer: str) -> str:
    """An answer without what its meaning does not depend on: delimiters, spacing, and other spellings of LaTeX."""
    for pattern, spelling in SPELLINGS:
        answer = re.sub(pattern, spelling, answer)
    return answer.strip(" *_✅").rstrip(" *_✅.")


def number(answer: str) -> tuple[Fraction, str] | None:
    """The exact value and the unit of a number: -$1,234.50, 3 1/2 miles, 2 million, 0.\\overline{3}; None of 36/2."""
    answer = re.sub(r"^\(([^(),]*)\)$|^\{([^{},]*)\}$", r"\1\2", answer.lower())
    match = NUMBER.fullmatch(re.sub(r"\\frac\{(-?\d+)\}\{(-?\d+)\}", r" \1/\2", answer).strip())
    if match is None or NO_UNITS.search(match["unit"]):
        return None
    digits = match["digits"].replace(",", "")
    value = Fraction(f"{digits}e{match['power'] or 0}")
    if again := match["again"]:  # 0.1\overline{6} = 0.1 + 6/90
        value += Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(digits.partition(".")[2]))
    under = int(match["under"] or 1)
    if match["under"] and (value.denominator > 1 or value % (under or 1) == 0):
        return None
    value = (value / under + int(match["whole"] or 0)) * (-1) ** match["sign"].count("-")
    words = re.findall(r"[a-z]+|[$%€£/]", match["sign"] + match["unit"])
    words = [SYMBOLS.get(word) or word.rstrip("s") or word for word in words]
    for word in words:
        value *= SCALES.get(word, 1)
    return value, " ".join(word for word in words if word not in SCALES)


def split_outside(text: str, separator: str) -> list[str]:
    """Split where no bracket is open."""
    depths = [0, *accumulate((c in "([{") - (c in ")]}") for c in text)]
    cuts = [match.span() for match in re.finditer(separator, text) if depths[match.start()] == 0]
    begins, ends = [0, *(end for _, end in cuts)], [*(begin for begin, _ in cuts), len(text)]
    return [text[begin:end].strip() for begin, end in zip(begins, ends) if text[begin:end].strip()]


def take_apart(answer: str) -> tuple[str, list[str], list[str]]:
    """Of a list, tuple, interval or assignments: brackets, "" around a set; left sides, if all have one; values."""
    brackets, names, inside = "", [], answer
    if whole := re.fullmatch(rf"\( ?({NAME}(?:, ?{NAME})+)\) ?= ?(\(.*\))", answer):  # (p, q) = (3, 2)
        names, inside = re.split(" ?, ?", whole[1].strip()), whole[2]
    if re.fullmatch(r"[(\[].*[)\]]", inside) and len(split_outside(inside, r"(?<=[)\]])")) == 1:
        brackets, inside = inside[0] + inside[-1], inside[1:-1]
    inside = re.sub(r"^\\\{(.*)\\\}$", r"\1", inside)
    comma = r",(?!\d{3}(?!\d))" if ", " in inside else ","  # 1,234, 5
    values = split_outside(inside, rf";|\band\b|\bor\b|{comma}") if brackets or not number(answer) else [answer]
    values = [value.replace("\\pm", sign) for value in values for sign in ("+-" if "\\pm" in value else "+")]
    named = [re.fullmatch(rf"(?:({NAME}) ?= ?)?(.*)", value).groups("") for value in values]
    names = names or list(accumulate((name for name, _ in named), lambda before, name: name or before))  # x = 1, 2
    names = names if len(names) == len(values) and all(names) else []
    return brackets if len(values) > 1 else "", names, [value.removeprefix("+") for _, value in named]


def compare(gold: str, answer: str, algebra=None) -> bool:
    """Whether two answers in normal form say the same. NotImplementedError, where `algebra` is needed and not given."""
    if re.sub(r"(?<!\d) | (?!\d)", "", gold) == re.sub(r"(?<!\d) | (?!\d)", "", answer):
        return True
    brackets, names, values = take_apart(gold)
    their_brackets, their_names, others = take_apart(answer)
    if RELATION.search(gold) or "=" in "".join(values + others):  # but x = 5 is not met by x + 1 = 6
        return not any(map(number, values)) and ("=" in gold) <= ("=" in answer) and is_same(gold, answer, algebra)
    if len(values) != len(others) or brackets != their_brackets and not names and (their_brackets or not their_names):
        return False
    keys = their_keys = range(len(values)) if brackets or len(set(names)) > 1 else [""] * len(values)  # in order?
    if names and their_names:
        keys, their_keys = names, their_names
    left = list(zip(their_keys, others))
    for key, value in zip(keys, values):
        match = next((pair for pair in left if pair[0] == key and is_same(value, pair[1], algebra)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def is_same(gold: str, answer: str, algebra) -> bool:
    """Whether two values are equal. A number is met by a number alone, with the same unit where both have one. Algebra
    decides on formulas, unless it took words for products of letters or would work out the question itself."""
    ours, is_choice = number(gold), re.fullmatch(r"\(?[A-Ja-j]\)?", gold)
    if label := re.fullmatch(r"(\([A-J]\)) ?(.+)", answer):  # (C) 12
        answer = label[1] if is_choice else label[2]
    if ours:  # detail 5
        theirs = number(answer) or (None, "")
        short, long = sorted((ours[1], theirs[1]), key=len)  # cm is short for centimeter
        return ours[0] == theirs[0] and re.match(".*".join(short), long) is not None
    if is_choice or re.fullmatch(r"[^\W\d_]{2,}(?:[ '.-]+[^\W\d_]+)*", gold):  # a letter, or words
        return gold.strip("()").casefold() == answer.strip("()").casefold()
    gold, answer = UNIT_AT_END.sub("", gold), UNIT_AT_END.sub("", answer)
    words, others = ({*re.findall(r"_\{?(\w+)|(?<![\\a-zA-Z])([^\W\d_]{2,})", text)} for text in (gold, answer))
    is_open = {*re.findall(UNEVALUATED, answer)} - {*re.findall(UNEVALUATED, gold)}
    is_broken = answer.count("{") != answer.count("}") or re.search(r"\d ?: ?\d|\d \d|\\boxed", f"{gold}\n{answer}")
    if gold == answer or words != others or is_open or is_broken:
        return gold == answer
    if algebra is None:
        raise NotImplementedError
    return algebra(gold, answer)


def worker() -> None:
    """Compares answers by algebra: reads seconds, gold and answer as a line of JSON, writes true or false. The system
    ends it where that takes longer. math-verify would round, so only relations, sets and matrices are left to it."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify import grader

    grader.sympy_numeric_eq = lambda *_: False
    resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9, 2 * 10**9))
    cased, verdicts, sys.stdout = ConversionConfig(lowercase_symbols=False), sys.stdout, sys.stderr

    def read(formula: str):
        parsed = latex2sympy(formula, is_real=not grader.should_treat_as_complex(formula), conversion_config=cased)
        return parsed.xreplace({value: sympy.Rational(str(value)) for value in parsed.atoms(sympy.Float)})

    def algebra(gold: str, answer: str) -> bool:
        ours, theirs = read(gold), read(answer)
        if all(isinstance(side, sympy.Expr) and not hasattr(side, "shape") for side in (ours, theirs)):
            return ours == theirs or sympy.simplify(ours - theirs) == 0
        return grader.verify([ours], [theirs], timeout_seconds=None)

    print("ready", file=verdicts, flush=True)
    for line in sys.stdin:
        seconds, gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = bool(compare(gold, answer, algebra))
        except Exception:
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=verdicts, flush=True)


# What a worker runs: the functions above as they were when this file was imported, without torch.
SOURCE = Path(__file__).read_text().partition("-- the verifier\n")[2].partition("# What a worker")[0]
SOURCE = f"import json, re, resource, signal, sys\nfrom fractions import *\nfrom itertools import *\n{SOURCE}worker()"
LIMIT = 3.0  # seconds that a comparison by algebra may take
WORKERS, OWN = ThreadPoolExecutor(2), threading.local()  # every thread has a process of its own


@lru_cache(100_000)  # samples of a question repeat answers
def is_equal(gold: str, answer: str) -> bool | None:
    """Whether two answers in normal form are equal; None if finding out takes too long."""
    try:
        return compare(gold, answer)
    except NotImplementedError:
        process = getattr(OWN, "process", None)
    if process is None or process.poll() is not None:
        # A session of its own, for Ctrl-C is not meant for it, and a folder without modules that it might import.
        pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "text": True}
        process = OWN.process = Popen([sys.executable, "-c", SOURCE], start_new_session=True, cwd="/", **pipes)
        if not process.stdout.readline():
            sys.exit("The verifier's process ends before it is ready: see whether Python can import math_verify.")
    process.stdin.write(json.dumps([LIMIT, gold, answer]) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()  # detail 6
    if not line:
        process.wait()
    return json.loads(line) if line else None


class Grade(NamedTuple):
    correct: bool | None  # None: the gold answer says nothing
    answer: str | None  # what the completion says
    how: str  # compared, timeout, no answer, too long, no gold


def grade(completion: str, gold: str | list[str]) -> Grade:
    """Whether the final answer of a completion is right. gold: the answer, or a solution that states it, or several."""
    answer, golds = stated_answer(completion), [gold] if isinstance(gold, str) else gold
    golds = [(stated_answer(text) or "") if "####" in text or "\\boxed" in text else text for text in golds]
    golds = [normal_form(text) for text in golds if re.search(r"\w", text) and len(text) <= MAX_ANSWER]
    if not golds:
        return Grade(None, answer, "no gold")
    if answer is None or len(answer) > MAX_ANSWER:
        return Grade(False, answer and answer[:MAX_ANSWER], "too long" if answer else "no answer")
    verdicts = [is_equal(text, normal_form(answer)) for text in golds]
    return Grade(any(verdicts), answer, "timeout" if None in verdicts else "compared")


# ------------------------------------------------------------------------------------------------ the reward: edit here


def reward(grade: Grade, stopped: bool) -> float:
    """1 for the right answer of a completion that ended by itself; no part of it for one that is nearly right."""
    return float(grade.correct is True and stopped)  # detail 3


# ------------------------------------------------------------------------------------------------ the dial


def raw(rewards: torch.Tensor) -> torch.Tensor:
    """REINFORCE without a baseline, and likelihood where rewards are 1 or 0. All of these: [P, G] → [P, G]."""
    return rewards


def centred(rewards: torch.Tensor) -> torch.Tensor:
    """Dr. GRPO: the group's mean as the baseline, so that a hard question weighs no more than an even one."""
    all_equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(all_equal, 0.0)  # detail 1


def standardised(rewards: torch.Tensor) -> torch.Tensor:
    """GRPO: mean and unbiased std of the group."""
    return centred(rewards) / (rewards.std(1, keepdim=True) + 1e-6)


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """RLOO: the mean of the others as the baseline, so that the gradient stays unbiased."""
    return centred(rewards) * rewards.shape[1] / (rewards.shape[1] - 1)


def first_right(completions: list[Completion], right: torch.Tensor, cap: int) -> torch.Tensor:
    """Expert iteration's reward [P, G]: 1 for a right completion that is no copy, up to `cap` of a question."""
    said = [(i // right.shape[1], c.ids) for i, c in enumerate(completions)]  # a copy is one of the same question
    new = torch.tensor([said.index(one) == i for i, one in enumerate(said)]).view(right.shape) * right
    return new * (new.cumsum(1) <= cap)


ALGORITHMS = {  # advantage, where the ratio to the old policy is taken, what token losses are divided by
    "reinforce": (raw, "none", "completion"),
    "rloo": (leave_one_out, "sequence", "completion"),
    "grpo": (standardised, "token", "sequence"),
    "dr_grpo": (centred, "token", "constant"),
    "expert_iteration": (raw, "none", "token"),
}


def token_losses(logprobs, old_logprobs, advantages, mask, ratio: str, clip_low: float, clip_high: float):
    """Token losses and ratios [B, T]. logprobs, old_logprobs, mask [B, T]; advantages [B, 1]. The ratio is that of each
    token, or of the whole sequence, whose surrogate is spread evenly over its tokens; else a loss is −A·log π."""
    log_ratio = (logprobs - old_logprobs) * mask
    if ratio == "none":
        return -advantages * logprobs, log_ratio.exp().detach()
    if ratio == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(logprobs)
    rho = log_ratio.exp()
    gain = torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)
    return -gain / (mask.sum(1, keepdim=True).clamp(min=1) if ratio == "sequence" else 1), rho.detach()


def mean_loss(losses, mask, how: str, sequences: int, tokens: float, max_tokens: int) -> torch.Tensor:
    """One number from token losses [B, T]; `sequences` and `tokens` count the whole optimizer step."""  # detail 7
    if how == "sequence":
        return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences
    counts = {"completion": sequences, "constant": sequences * max_tokens, "token": max(tokens, 1)}
    return (losses * mask).sum() / counts[how]


# ------------------------------------------------------------------------------------------------ test-time compute


def winner(ballots: list, weights: list[float]):
    """The answer with the largest sum of weights, the one found first among equals; an absent one, "", is no vote."""
    totals = {ballot: sum(w for b, w in zip(ballots, weights) if b == ballot) for ballot in ballots if ballot}
    return max(totals, key=totals.get, default="")  # detail 8


def until_answer(tokenizer, completion: Completion) -> Completion:
    """A completion in R1-Zero's template up to its first </answer>, at which its authors stop sampling."""
    ids, is_over = completion.ids, lambda n: "</answer>" in tokenizer.decode(ids[:n])
    end = bisect_left(range(len(ids)), True, key=is_over)
    return Completion(ids[:end], completion.logprobs[:end], completion.stopped or is_over(end))  # detail 3


def force_answers(sampler, tokenizer, answered: dict, args: Args) -> None:
    """Where reasoning has not ended within --max-think-tokens, put --answer-cue behind it, and go on from there (s1).
    For evaluation only: the policy did not choose those tokens. The last of a group is the greedy one."""
    cue, n = tokenizer(args.answer_cue, add_special_tokens=False).input_ids, args.eval_samples
    for temperature, which in ((args.temperature, range(n)), (0.0, [n])):
        cut = [(p, q["ids"], group, g) for p, (q, group, _) in answered.items() for g in which if not group[g].stopped]
        begun = [group[g].ids + cue * ("</think>" not in tokenizer.decode(group[g].ids)) for *_, group, g in cut]
        budgets = [max(args.max_completion_tokens - len(ids), 1) for ids in begun]
        prompts = [prompt + ids for (_, prompt, *_), ids in zip(cut, begun)]
        numbers = [place * n + g for place, *_, g in cut]
        drawn = sampler.generate(prompts, budgets, 1, temperature, args.seed + 1, numbers)
        for (*_, group, g), ids, (rest,) in zip(cut, begun, drawn):
            group[g] = Completion(ids + rest.ids, [], rest.stopped)


def evaluate(sampler, tokenizer, questions, reranker, args: Args, rank: int, world: int) -> tuple[dict, list[dict]]:
    """Accuracy on held-out questions, and what more samples, a reranker and a thinking budget make of it: metrics over
    all processes, and samples for the log."""
    sampler.sync()
    n, budget = args.eval_samples, args.max_think_tokens or args.max_completion_tokens
    sampling = (budget, n, args.temperature, args.seed)
    answered = sample_answers(sampler, tokenizer, questions, sampling, rank, world, greedy=True)
    if args.max_think_tokens:
        force_answers(sampler, tokenizer, answered, args)
    found = {}
    for place, (question, group, _) in answered.items():
        (*group, _), texts, (*grades, greedy) = read(tokenizer, [question] * len(group), group, args)
        ballots = [g.correct or number(form := normal_form(g.answer or "")) or form for g in grades]  # True if right
        scores = reranker(question["row"], texts[:n]).sigmoid().tolist() if reranker else [0.0] * n
        row = {"eval/accuracy": ballots.count(True) / n, "eval/accuracy_greedy": greedy.correct is True}
        row["eval/completion_length"] = sum(len(c.ids) for c in group) / n
        row["eval/truncated_fraction"] = sum(not c.stopped for c in group) / n
        for k in sorted({n, *(2**i for i in range(1, n.bit_length()))}):
            row[f"eval/pass@{k}"] = 1 - math.comb(n - ballots.count(True), k) / math.comb(n, k)  # detail 8
            row[f"eval/maj@{k}"] = winner(ballots[:k], [1.0] * k) is True
            if reranker:
                row[f"eval/weighted@{k}"] = winner(ballots[:k], scores) is True
                row[f"eval/best@{k}"] = ballots[max(range(k), key=lambda j: (ballots[j] != "", scores[j]))] is True
        prompt = tokenizer.decode(question["ids"], skip_special_tokens=True)
        asked, said = {"prompt": prompt, "gold": question["row"]["answer"]}, zip(texts, ballots, scores)
        samples = [{**asked, "completion": text, "reward": float(b is True), "score": score} for text, b, score in said]
        found[place] = row, samples if args.steps == 0 else samples[:1]
    rows, samples = zip(*merged(found))
    metrics = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    spread = statistics.pstdev([row["eval/accuracy"] for row in rows])
    metrics["eval/accuracy_margin"] = 1.96 * spread / math.sqrt(max(1, len(rows) - 1))  # 95 %, over questions
    return metrics, sum(samples, [])


# ------------------------------------------------------------------------------------------------ main


def read(tokenizer, asked: list[dict], completions: list[Completion], args: Args) -> tuple[list, list, list]:
    """Completions up to where they end, what they say, and their grades, all [B]."""
    if args.template == "r1_zero":
        completions = [until_answer(tokenizer, completion) for completion in completions]
    texts = [q["prefill"] + tokenizer.decode(c.ids, skip_special_tokens=True) for q, c in zip(asked, completions)]
    return completions, texts, list(WORKERS.map(grade, texts, [question["row"]["answer"] for question in asked]))


def save_verified(path: Path, step: int, found: list[tuple[dict, str]], cap: int, instruction: str) -> None:
    """Add right completions to the rows at `path`, no two alike, up to `cap` of a question. Rows that a killed run has
    written at this step or later are written again."""
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    rows, known = [row for row in rows if row["step"] < step], {}
    for row in rows:
        known.setdefault(str(row["prompt"]), set()).add(row["completion"])
    for row, text in found:
        *before, last = read_messages(first_of(row, "prompt", "question", "problem"))
        prompt = [*before, {**last, "content": last["content"] + instruction}]
        alike = known.setdefault(str(prompt), set())
        if text not in alike and len(alike) < cap:
            alike.add(text)
            rows.append({"step": step, "prompt": prompt, "completion": text, "answer": row["answer"]})
    path.with_suffix(".writing").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_suffix(".writing").replace(path)


def main(args: Args) -> dict:
    device, rank, world = start_processes(args.device)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    assert args.batch_size % (args.minibatches * world) == 0, "--batch-size: a multiple of minibatches × processes"
    advantage, ratio_over, mean_over = ALGORITHMS[args.algorithm]
    assert args.num_samples > 1 or advantage is raw, "--num-samples: at least 2, to compare a completion with siblings"
    assert args.max_think_tokens < args.max_completion_tokens, "--max-think-tokens: below --max-completion-tokens"

    tokenizer, budget = load_tokenizer(args.model, args.today), args.max_completion_tokens
    if args.template == "r1_zero":  # stays with the saved model
        begins = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + R1_ZERO
    instruction = args.instruction if args.template == "chat" else ""
    longest = min(args.max_prompt_tokens, context_length(args.model) - budget)
    data = (args.dataset, args.eval_dataset, args.eval_rows, longest, args.seed)
    questions, held_out = load_questions(tokenizer, *data, instruction=instruction)
    policy = load_model(args.model, device, world, args.gradient_checkpointing, args.lora_rank, bfloat16)
    reference = frozen(policy, device, world) if args.beta else None
    reranker = args.reranker and RewardModel(args.reranker, device, bfloat16, args.microbatch_tokens, flag="--reranker")
    stops = stop_token_ids(tokenizer, policy)
    sampler = Sampler(policy, stops, torch.bfloat16 if bfloat16 else torch.float32, args.sampler_memory_gb)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)

    shown = {"reward/mean": "reward", "policy/entropy": "entropy", "eval/completion_length": "length"}
    run = Run(args, rank, {**shown, "eval/accuracy": "accuracy", f"eval/maj@{args.eval_samples}": "majority"})
    measure = partial(evaluate, sampler, tokenizer, held_out, reranker, args, rank, world)
    finished = run.load(policy, optimizer) if args.resume else 0  # steps
    if not finished:
        run.log(0, *measure())

    for step in range(finished + 1, args.steps + 1):
        began, means, seed = time.perf_counter(), Means(), args.seed * 1_000_003 + step

        # Sample G completions of each of this process's prompts.
        sampler.sync()
        batch = shuffled_pass(questions, step, args.batch_size, args.seed)
        places = list(range(rank, args.batch_size, world))  # of this process's prompts in the batch
        prompts = [batch[p]["ids"] for p in places]
        groups = sampler.generate(prompts, budget, args.num_samples, args.temperature, seed, places)
        sampled = time.perf_counter()

        # Grade them: B = prompts × G completions, each with its question.
        asked = [batch[p] for p in places for _ in range(args.num_samples)]
        completions, texts, grades = read(tokenizer, asked, sum(groups, []), args)
        rewards = [reward(found, c.stopped) for found, c in zip(grades, completions)]
        if args.save_verified:
            right = merged({rank: [(q["row"], text) for q, text, r in zip(asked, texts, rewards) if r]})
            if rank == 0:
                save_verified(run.folder / "verified.jsonl", step, sum(right, []), args.keep_per_question, instruction)
        rewards = torch.tensor(rewards).view(len(places), -1)  # [P, G]

        # The rollout as rows of at most T tokens.
        prompts, ids = [question["ids"] for question in asked], [c.ids for c in completions]  # detail 2
        sampler_logprobs = pad_rows([torch.tensor(c.logprobs) for c in completions]).to(device)  # [B, T]
        mask = pad_rows([torch.ones(len(c.ids)) for c in completions]).to(device)  # [B, T]
        means.add("policy/entropy", -sampler_logprobs, mask)
        credit, active = rewards, range(len(ids))
        if args.algorithm == "expert_iteration":
            credit = first_right(completions, rewards, args.keep_per_question)
            mask = mask * credit.view(-1, 1).to(device)
        if reference is None:  # detail 7
            active = (advantage(credit) != 0).flatten().nonzero().flatten().tolist()

        # Every epoch deals the prompts of the whole batch into minibatches; these are this process's rows of each.
        minibatches = []
        for epoch in range(args.update_epochs):
            order = torch.randperm(args.batch_size, generator=torch.Generator().manual_seed(seed + epoch))
            for chosen in order.view(args.minibatches, -1).tolist():
                minibatches.append([i for i in active if places[i // args.num_samples] in chosen])

        split = partial(microbatches, ids, prompts, args.microbatch_tokens)
        rollout = {"prompts": prompts, "completions": ids, "temperature": args.temperature, "bfloat16": bfloat16}
        logprobs_of = partial(completion_logprobs, **rollout)  # log-probabilities and entropies [b, T], detail 2
        ref_logprobs, old_logprobs = torch.zeros_like(mask), torch.zeros_like(mask)
        kl_in_reward = reference is not None and args.algorithm == "rloo"
        with torch.no_grad():
            for update, rows in enumerate(minibatches[: args.minibatches]):  # the first epoch's: every row once
                for part, _ in split(rows):
                    if reference is not None:
                        ref_logprobs[part] = logprobs_of(reference, part)[0]
                    if update or kl_in_reward:  # else the first update runs at π_old, and stores what it finds
                        old_logprobs[part] = logprobs_of(policy, part)[0]
        if kl_in_reward:
            kl = ((old_logprobs - ref_logprobs) * mask).sum(1)  # k1, of whole completions
            credit = credit - args.beta * kl.view(credit.shape).cpu()
        advantages = advantage(credit).view(-1, 1).to(device)  # [B, 1]

        # Update.
        rate, clip = learning_rate(step, args), (args.clip_low, args.clip_high)
        for update, rows in enumerate(minibatches):
            tokens, sequences = total(mask[rows].sum(), device), args.batch_size // args.minibatches * args.num_samples
            for part, weight in split(rows):  # weight: 0 for a copy that only keeps step with other processes, else 1
                logprobs, _ = logprobs_of(policy, part)  # [b, T]
                if not update:
                    old_logprobs[part] = logprobs.detach()
                old, acted = old_logprobs[part], mask[part] * weight
                gap = old - sampler_logprobs[part]
                losses, ratio = token_losses(logprobs, old, advantages[part], acted, ratio_over, *clip)
                if args.importance_cap:
                    losses = losses * gap.exp().clamp(max=args.importance_cap)
                means.add("loss/policy", losses, acted)
                if reference is not None:
                    kl = kl_estimate(logprobs, ref_logprobs[part], "k3")
                    losses = losses + (0.0 if kl_in_reward else args.beta) * kl
                    means.add("policy/kl", kl, acted)
                loss = mean_loss(losses, acted, mean_over, sequences, tokens, budget)
                (loss * world).backward()  # gradients are averaged over processes, the loss is a sum over them
                means.add("policy/sampler_gap", gap.abs(), acted)
                means.add("policy/clip_fraction", (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high), acted)
            optimizer.param_groups[0] |= {"lr": rate, "weight_decay": args.weight_decay}
            means.add("optim/grad_norm", clip_gradients(policy, args.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()

        # Log, evaluate, save.
        done = time.perf_counter()
        means.add("reward/mean", rewards)
        means.add("groups/all_equal", (rewards == rewards[:, :1]).all(1))
        means.add("answers/none", [found.answer is None for found in grades])
        means.add("answers/timeout", [found.how == "timeout" for found in grades])
        means.add("completions/length_mean", [len(c.ids) for c in completions])
        means.add("completions/truncated_fraction", [not c.stopped for c in completions])
        metrics, samples = means.over_processes(device), []
        metrics |= {"optim/learning_rate": rate, "time/sample": sampled - began, "time/train": done - sampled}
        if due(step, args.eval_every, args.steps):
            scores, samples = measure()
            metrics |= scores
        run.log(step, metrics, samples)
        if due(step, args.save_every, args.steps):
            run.save(step, policy, optimizer)

    return run.finish(policy, tokenizer, stops, bfloat16)


# ================================================================ plumbing: the same in every script, not the algorithm


def start_processes(device: str) -> tuple[torch.device, int, int]:
    """The device of this process, its rank and the number of processes: more than one under torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if chosen.type == "cuda" and world > 1:
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # from saving in a single process
    if world > 1:  # all wait for the one that samples longest: ten minutes would be too few
        dist.init_process_group(timeout=timedelta(days=1))
    return chosen, rank, world


def total(value, device) -> float:
    """A number summed over all processes."""
    value = torch.as_tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item()


class Means:
    """Weighted means by name over microbatches and processes. Sums stay on the device until `over_processes`."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values, weights=1.0) -> None:
        values = torch.as_tensor(values).detach().double()
        weights = torch.ones_like(values) * weights
        pair = torch.stack([(values * weights).sum(), weights.sum()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def over_processes(self, device) -> dict[str, float]:
        sums = torch.stack([pair.to(device) for pair in self.sums.values()])
        if dist.is_initialized():
            dist.all_reduce(sums)
        return {name: value / max(weight, 1e-9) for name, (value, weight) in zip(self.sums, sums.tolist())}


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then constant, or a linear or cosine decay that reaches zero after the last step."""
    left = min(1.0, (args.steps - step + 1) / max(1, args.steps - args.warmup_steps))
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return args.learning_rate * min(1.0, step / max(1, args.warmup_steps)) * shape[args.lr_schedule]


def due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


class Run:
    """The folder of a run: args.json, metrics.jsonl, samples.jsonl, tensorboard/, curves.png, checkpoints/, model/."""

    def __init__(self, args, rank: int, shown: dict[str, str]):
        self.rank, self.shown, self.history = rank, shown, []  # shown: metric → title, in the terminal and curves.png
        stamp = [f"{datetime.now():%Y-%m-%d_%H%M%S_%f}"]
        if dist.is_initialized():
            dist.broadcast_object_list(stamp)
        self.folder = Path(args.resume or args.output_dir or f"runs/{Path(__file__).stem}/{stamp[0]}")
        gc.freeze()  # what is loaded by now lives to the end: no collection need look through it again
        if rank:
            return
        if (self.folder / "args.json").exists() and not args.resume:
            sys.exit(f"{self.folder} already holds a run: continue it with --resume, or choose another --output-dir.")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "args.json").write_text(json.dumps(asdict(args), indent=2))
        if not args.resume and not args.output_dir:
            link = self.folder.with_name(f".latest-{os.getpid()}")
            link.symlink_to(self.folder.name)
            link.replace(link.with_name("latest"))
        if args.wandb_project:
            import wandb

            wandb.init(project=args.wandb_project, config=asdict(args), sync_tensorboard=True)
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.folder / "tensorboard")
        self.bar = tqdm(total=args.steps, unit="step", disable=None, leave=False)
        self.bar.write("  step " + "".join(f"{title:>14}" for title in shown.values()))

    def log(self, step: int, metrics: dict, samples: list[dict] = ()) -> None:
        """Write to the log files, each tenth step and evaluation to the terminal too; evaluations redraw curves.png."""
        self.history.append({"step": step, **metrics})
        if self.rank:
            return
        for name, rows in (("metrics", [metrics]), ("samples", samples)):
            with open(self.folder / f"{name}.jsonl", "a") as file:
                file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.bar.update(step - self.bar.n)
        is_evaluated = any(name.startswith("eval/") for name in metrics)
        if step % 10 == 0 or is_evaluated:
            cells = [f"{metrics[name]:14.4g}" if name in metrics else " " * 14 for name in self.shown]
            self.bar.write(f"{step:6d} " + "".join(cells))
        for sample in samples[:: max(1, len(samples) // 3)][:3]:
            asked, said = sample["prompt"][-60:], sample["completion"][:160]
            self.bar.write(f"        reward {sample['reward']:.2f}  {asked!r} → {said!r}")
        if step and is_evaluated:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(3.6 * len(self.shown), 2.8), layout="tight")
            for axis, (name, title) in zip(figure.subplots(1, len(self.shown)), self.shown.items()):
                points = [(row["step"], row[name]) for row in self.history if name in row] or [(0, 0)]
                axis.plot(*zip(*points), marker=".")
                axis.set(title=title, xlabel="step")
            figure.savefig(self.folder / "curves.png", dpi=110)

    def save(self, step: int, model, optimizer) -> None:
        """Write a checkpoint under another name, then rename it: a kill leaves none broken. The newest two are kept."""
        from torch.distributed.checkpoint import save, state_dict

        final = self.folder / "checkpoints" / f"step-{step:06d}"
        own = state_dict.StateDictOptions(ignore_frozen_params=True)
        weights, moments = state_dict.get_state_dict(model, optimizer, options=own)
        part = final.with_suffix(".writing")
        save({"model": weights, "optimizer": moments}, checkpoint_id=part)
        if self.rank == 0:
            part.rename(final)
            for old in sorted(final.parent.glob("step-??????"))[:-2]:
                shutil.rmtree(old)

    def load(self, model, optimizer) -> int:
        """Restore the newest checkpoint, drop what was logged after it, and return its step, or 0 if there is none."""
        from torch.distributed.checkpoint import DefaultLoadPlanner, load, state_dict

        newest = max((self.folder / "checkpoints").glob("step-??????"), default=None)
        step = int(newest.name.removeprefix("step-")) if newest else -1
        for path in filter(Path.exists, map(self.folder.joinpath, ("metrics.jsonl", "samples.jsonl"))):
            rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]  # a kill may truncate the last one
            rows = [row for row in rows if row["step"] <= step]
            self.history = rows if path.name == "metrics.jsonl" else self.history
            if self.rank == 0:
                path.with_suffix(".writing").write_text("".join(json.dumps(row) + "\n" for row in rows))
                path.with_suffix(".writing").replace(path)
        if newest:
            own = state_dict.StateDictOptions(ignore_frozen_params=True, strict=False)
            weights, moments = state_dict.get_state_dict(model, optimizer, options=own)
            planner = DefaultLoadPlanner(allow_partial_load=True)  # unused weights have no moments
            load({"model": weights, "optimizer": moments}, checkpoint_id=newest, planner=planner)
            state_dict.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=own)
        return max(step, 0)

    def finish(self, model, tokenizer, stops: list[int], bfloat16: bool) -> dict:
        """Save model/ for from_pretrained, vLLM and the next stage, with its stop tokens; return the last metrics."""
        from common.kl import save_model

        last = {name: value for row in self.history for name, value in row.items()}
        part = self.folder / "model.writing"
        if stops:
            model.generation_config.eos_token_id = stops
        save_model(model, part, bfloat16, self.folder / "adapter")
        if self.rank == 0:
            tokenizer.save_pretrained(part)
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            part.rename(self.folder / "model")
            self.bar.close()
            self.writer.close()
            for name in [name for name in self.history[0] if name.startswith("eval/")]:
                print(f"  {name:26} {self.history[0][name]:8.4g} → {last[name]:.4g}")
            print(f"  model in {self.folder}/model, curves in {self.folder}/curves.png")
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        return last


def parse_args(args_type, embedded):
    """Read the flags. Defaults: `args_type`'s with --model, `embedded` without, a resumed run's own with --resume."""
    flags = [part for flag in sys.argv[1:] for part in (flag.split("=", 1) if flag[:2] == "--" else [flag])]
    given = {flag.replace("_", "-"): value for flag, value in zip(flags, flags[1:])}
    default = args_type() if "--model" in given else embedded
    if "--dataset" in given:
        default = replace(default, eval_dataset=None)
    if given.get("--lora-rank", "0") != "0":  # adapters want a higher rate (https://thinkingmachines.ai/blog/lora)
        default = replace(default, learning_rate=10 * default.learning_rate)
    if "--resume" in given:
        default = args_type(**json.loads(Path(given["--resume"], "args.json").read_text()))
    return tyro.cli(args_type, default=default, args=flags, description=__doc__)


if __name__ == "__main__":
    main(parse_args(Args, EMBEDDED))
