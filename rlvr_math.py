"""RLVR for mathematics: reinforcement learning whose reward is a checker, the R1-Zero recipe.

The policy writes G solutions to every question, a verifier compares each final answer with the right one, and what
was right becomes more likely. Signal: correctness, decided exactly or by algebra. Optimizer: one dial of five, from
plain REINFORCE over GRPO to likelihood on verified samples. Leash: the clip, and KL to the start if --beta asks for
it. Defence against reward hacking: a verifier that takes no guess, no half answer, and for a number only a number.

    r_i = answer_weight · [right] + format_weight · [well formed]                     over the G solutions of a question
    reinforce          A_i = r_i                              L = −mean_i Σ_t A_i · log π(y_t)
    rloo               A_i = r_i − mean_{j≠i} r_j             L = −mean_i min(ρ_i·A_i, clip(ρ_i)·A_i),  ρ_i = Π_t ρ_it
    grpo               A_i = (r_i − mean(r)) / std(r)         L = −mean_i (1/T_i) Σ_t min(ρ_it·A_i, clip(ρ_it)·A_i)
    dr_grpo            A_i = r_i − mean(r)                    L = −mean_i (1/T_max) Σ_t min(ρ_it·A_i, clip(ρ_it)·A_i)
    expert_iteration   A_i = [right, new, under the cap]      L = −Σ_it A_i · log π(y_t) / Σ_i A_i·T_i

Papers: DeepSeek-R1 (arXiv:2501.12948), Tulu 3 (arXiv:2411.15124), RLOO (arXiv:2402.14740), GRPO (arXiv:2402.03300),
Dr. GRPO (arXiv:2503.20783), STaR (arXiv:2203.14465), RAFT (arXiv:2304.06767), s1 (arXiv:2501.19393).

    python rlvr_math.py                                                              # laptop, embedded model, 1 minute
    python rlvr_math.py --algorithm expert_iteration --save-verified                 # and data for sft.py
    python rlvr_math.py --evaluate-only --eval-samples 16 --reranker runs/reward_model/latest/model
    python rlvr_math.py --model Qwen/Qwen2.5-1.5B --template r1_zero --dataset openai/gsm8k --subset main \
        --learning-rate 1e-6 --max-completion-tokens 1024 --batch-size 64            # one GPU, a base model
    torchrun --nproc-per-node 8 rlvr_math.py --model Qwen/Qwen2.5-7B --template r1_zero --dataset openai/gsm8k …

The verifier is there for others too: `from rlvr_math import grade; grade("so \\boxed{1/2}", "0.5")`.

What to look at: `eval/accuracy` (pass@1, the mean over samples) with its interval, and `eval/completion_length`: both
rise together where thinking pays. `eval/maj@8` lies above `eval/accuracy` while the policy is unsure, and meets it as
`policy/entropy_generated` falls; `eval/pass@8` that stands still while accuracy rises says that the policy learns to
choose among what it could do already. `answers/none` (no answer stated) should fall to 0, `answers/timeout` be 0
always. Losses say little: those with a ratio are near 0, whatever the gradient is.

Implementation details that matter, each marked in the code under its number:
 1. A group whose rewards are all equal gets advantages of exactly zero, not rounding noise divided by a tiny std.
 2. Token ids and old log-probabilities are the sampler's own; nothing sampled is decoded and tokenised again.
 3. Logits are divided by the sampling temperature in every forward, of the policy and of the reference.
 4. The stop token is an action; masks come from lengths; a completion that was cut has no stop token and, whatever
    it says, earns nothing. (Evaluation judges the answer alone, and says how many were cut.)
 5. The answer is what is stated last, behind the reasoning; a number that merely stands in the text never counts.
 6. A gold number is met by a number alone: `47*8` for 376 would be a perfect score for copying the question.
 7. Algebra runs in processes of its own, with limits on time and memory, that are killed past them and replaced.
 8. A gold answer that cannot be read is reported and excluded, never counted as wrong.
 9. The G completions of a prompt share its forward and backward.
10. All randomness is a function of seed and step, so a resumed run repeats the uninterrupted one bit for bit.
11. Losses are divided by counts of the whole optimizer step, so microbatch size and processes change nothing; what has
    an advantage of zero counts, but needs no forward where there is no KL.
12. The ratio of rloo is that of the whole completion, clipped once.
13. The format reward is all or nothing, and knows whether the template has opened the reasoning already.
14. Expert iteration drops copies, caps what it keeps of a question, and counts only the tokens it keeps.
15. pass@k is the unbiased estimator; in a vote an absent answer is no vote, and of equals the one found first wins.
16. Forced tokens are for evaluation only: they were not chosen by the policy and are never trained on.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import inspect
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from fractions import Fraction
from functools import partial
from itertools import combinations
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from common.generation import Completion, Sampler
from common.kl import has_known_logits, hidden_states, kl_estimate, local_token_logprobs, token_logprobs, use_layout
from common.tokenizer import (
    Segment,
    as_messages,
    encode_continuation,
    encode_prompt,
    encode_text,
    load_tokenizer,
    pack,
    pack_completions,
    pad_rows,
    render_chat,
    split_by_tokens,
    stop_token_ids,
)

TINY = Path(__file__).resolve().parent / "common" / "tiny"


# The template of DeepSeek-R1-Zero, for base models: the answer goes on from an opened <think>.
R1_ZERO_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'system' %}{{ message.content }}\n{% else %}"
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
    "User: {{ message.content }}\nAssistant: <think>{% endif %}{% endfor %}"
)


@dataclass
class Args:
    # model and data
    model: str = str(TINY)
    """folder or Hub name of a causal language model"""
    dataset: str = str(TINY / "maths_train.jsonl")
    """file, folder or Hub name; rows hold prompt, question or problem, and the answer or a solution with \\boxed{}"""
    subset: str | None = None
    """configuration of a Hub data set, such as `main` of openai/gsm8k"""
    split: str = "train"
    """split of a Hub data set"""
    eval_dataset: str | None = None
    """held-out rows; by default the embedded data's own, or else rows held out of --dataset; with --evaluate-only
    those of --dataset itself"""
    eval_subset: str | None = None
    """configuration of --eval-dataset on the Hub (default: that of --subset, unless that is another Hub data set's)"""
    eval_split: str | None = None
    """split of --eval-dataset on the Hub (default: that of --split)"""
    template: Literal["chat", "r1_zero"] = "chat"
    """how a question becomes a prompt: the model's chat template, or for base models that of R1-Zero"""
    instruction: str = ""
    """put behind every question, such as " Put your final answer within \\boxed{}.", for models that need to be told"""
    max_prompt_tokens: int = 512
    """rows with a longer prompt are dropped"""
    max_completion_tokens: int = 64
    """budget of a completion; 64 suits the embedded model, 1024 and more a real one"""
    trust_remote_code: bool = False
    """run code that comes with the model"""

    # rewards and their verifier
    answer_weight: float = 1.0
    """of `answer`: 1 where the verifier finds the final answer right"""
    format_weight: float = 0.0
    """of `format`: 1 where there is exactly one answer in its tags, at the end, and reasoning, if any, closed before"""
    grading_workers: int = 2
    """processes of the verifier; they are started when an answer first needs algebra"""
    grading_seconds: float = 3.0
    """after so long a comparison is given up, and the answer is wrong"""

    # algorithm
    algorithm: Literal["reinforce", "rloo", "grpo", "dr_grpo", "expert_iteration"] = "grpo"
    """the advantage and its loss, as in the table above"""
    num_samples: int = 8
    """completions per prompt (G)"""
    temperature: float = 1.0
    """of sampling, and of every log-probability in training"""
    clip_low: float = 0.2
    """ratios are clipped below 1 − clip_low"""
    clip_high: float = 0.2
    """and above 1 + clip_high"""
    beta: float = 0.0
    """weight of the KL to the starting model in the loss (k3), averaged as the algorithm averages its losses: the same
    beta weighs more where these are summed over a completion; R1 took 0.001; 0 loads no reference"""
    update_epochs: int = 1
    """passes over each rollout"""
    minibatches: int = 1
    """optimizer steps per pass; more than one, or more passes, make clipping matter (reinforce and expert_iteration
    have no ratio: they take later steps off-policy)"""
    keep_per_question: int = 4
    """expert_iteration: right completions of a question that are trained on; --save-verified: that are written"""
    save_verified: bool = False
    """write right completions, no two alike, to verified.jsonl in the run's folder, as data for sft.py"""

    # optimisation
    steps: int = 60
    """rollouts; each brings update_epochs × minibatches optimizer steps"""
    batch_size: int = 16
    """prompts per rollout over all processes"""
    microbatch_tokens: int = 4096
    """tokens per forward and backward: a memory knob that does not change the result"""
    learning_rate: float = 3e-4
    """peak; 3e-4 suits the embedded model, 1e-6 a pretrained one"""
    warmup_steps: int = 5
    """rollouts of linear warm-up"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the learning rate decays to zero after the warm-up"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the matrix products; auto is bfloat16 on CUDA and float32 on a CPU; weights are float32"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""
    seed: int = 1

    # evaluation and test-time compute
    evaluate_only: bool = False
    """train nothing: measure --model, write evaluation.json and every completion"""
    eval_every: int = 15
    """steps between evaluations; 0 evaluates before and after only"""
    eval_rows: int = 192
    """held-out questions used, a fixed random choice where there are more"""
    eval_samples: int = 8
    """completions sampled per question in evaluation (n of pass@k and maj@k)"""
    reranker: str | None = None
    """output of reward_model.py, outcome or process: best-of-k and votes weighted by its scores"""
    max_think_tokens: int = 0
    """evaluation: reasoning that has not ended after so many tokens is cut, and --answer-cue forced; 0: never"""
    extend_thinking: int = 0
    """evaluation: so many times the end of the reasoning is replaced by --wait-cue, and it goes on, as far as
    --max-think-tokens (or the budget) allows"""
    answer_cue: str = "</think><answer>"
    """what --max-think-tokens puts where it cuts"""
    wait_cue: str = "Wait"
    """what --extend-thinking puts in place of </think>; s1's word, a comma for the embedded model"""

    # output
    output_dir: str | None = None
    """default: runs/rlvr_math/<date>_<time>"""
    overwrite: bool = False
    """replace the run that --output-dir holds"""
    resume: str | None = None
    """continue the run in this folder with its own arguments; only its steps and logging may be changed"""
    save_every: int = 0
    """steps between checkpoints; 0 writes one at the end only"""
    log_samples: int = 3
    """completions shown per evaluation"""
    wandb_project: str | None = None
    """also log to Weights & Biases"""


# ---------------------------------------------------------------------------------------------- the verifier

MAX_ANSWER = 400  # characters; whatever is longer is no final answer
NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?(?P<currency>[$€£]?) ?(?P<inner>[-+]?) ?(?=\.?\d)"  # -$5 and $-5
    r"(?:(?:(?P<mixed>\d+) )?(?P<ratio>\d+ ?/ ?\d+)|(?P<plain>(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?))"
    r"(?:(?P<unit> ?[%$€£]| ?(?:k|[cmk]m|[km]g|ml|lbs?|oz|ft|in|hrs?|mph)(?![a-z])| [a-z]{3,}(?:[ /][a-z]+){0,3})"
    r"(?:\^\{?[23]\}?)?)?",
    re.IGNORECASE,
)
SCALES = {"k": 1_000, "dozen": 12, "hundred": 100} | {
    name: 1000**power for power, name in enumerate(("thousand", "million", "billion", "trillion"), 1)
}
UNIT_NAMES = {"$": "dollar", "%": "percent", "€": "euro", "£": "pound sterling", "hr": "hour", "min": "minute"}
UNIT_NAMES |= {"ft": "foot", "feet": "foot", "in": "inch", "inche": "inch", "lb": "pound", "kilogram": "kg"}
UNIT_NAMES |= {"kilometer": "km", "centimeter": "cm", "millimeter": "mm"}
# After a number these are no unit: they make another number of it.
NO_UNITS = set(
    "or and to more less fewer than times plus minus over divided by of out not if but pi sqrt log double triple twice "
    "half halve third quarter fourth fifth sixth seventh eighth ninth tenth hundredth thousandth millionth squared "
    "cubed factorial negative one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety lakh crore zero root "
    "mod modulo choose multiplied added score gross sin cos tan exp point quadrillion".split()
)
FRACTION = re.compile(r"(?:.*(?:teenth|ieth|eleventh|twelfth)|th)s?")
SPELLINGS = [  # of the same thing, one for all
    (re.compile(r"\$\$"), "$"),
    (re.compile(r"(?<!\\)\$([^$]+)(?<!\\)\$"), r"\1"),
    (re.compile(r"(?<!\\)\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\\[()\[\]]|^\*\*|\*\*$"), ""),
    (re.compile(r"\{,\}|,\\!|(?<!\\)\\[,!](?=\d{3}(?!\d))"), ","),  # in front of thousands
    (re.compile(r"(?<!\\)\\[,!;:]"), " "),
    (re.compile(r"(?<!\\)\\([$%])"), r"\1"),
    (re.compile(r"\\[cdt]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)"), r"\\frac{\1}"),
    (re.compile(r"(\\frac\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*(\d)(?!\d)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<=\d)\s*\\(?:text|mathrm|mbox)\s*\{\s*[a-zA-Z]\s*\}(?:\^\{?[23]\}?)?$"), ""),  # 3\text{ m}
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\(begin|end)\{[bvBV]matrix\}"), r"\\\1{pmatrix}"),
    (re.compile(r"\^\{?\\circ\}?|°|\\degree"), " degrees"),
    (re.compile("[−–]"), "-"),
    (re.compile(r"^\s*[a-zA-Z] ?\\in(?![a-z])"), ""),  # x \in [1, 2]
    (re.compile(r"(?:(?<!\\)\\ |~|\s)+"), " "),
]
STATED = re.compile(
    r"[\s*_#>-]*(?:a ?:|(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:correct |final )?answer\**(?: ?:| is\b:?))"
    r"[\s*_]*(.+)",
    re.IGNORECASE,
)
UNEVALUATED = re.compile(
    r"\\(?:i*nt|oint|sum|prod|lim|max|min|gcd|lcm|binom|det|[pb]mod|(?:arc)?(?:sin|cos|tan|cot|sec|csc)|log|ln|exp)"
    r"(?![a-z])|frac\{d|partial|!"
)


class Grade(NamedTuple):
    """Whether a completion's answer is right (None where the gold answer cannot be read), what it says, and how that
    was decided: exact, symbolic, or why there was nothing to decide."""

    correct: bool | None
    answer: str | None
    how: str


def final_answer(completion: str) -> str | None:
    """The answer that a completion states last: in \\boxed{}, after ####, in <answer> tags, or on a last line such as
    `A: 18` or `The answer is 18.` Reasoning in <think> does not count, an unbalanced \\boxed{ is no answer, and a
    number that merely stands in the text never is."""
    text = completion.rpartition("</think>")[2].partition("<think>")[0]  # detail 5
    found = [(-1, None)]
    end = text.rfind("</answer>")
    if end >= 0 and (start := text.rfind("<answer>", 0, end)) >= 0:
        found.append((start, text[start + len("<answer>") : end]))
    if (start := text.rfind("\\boxed")) >= 0:
        opening = start + len("\\boxed") + (text[start + len("\\boxed") :][:1] == " ")
        inside = braced(text, opening)
        rest = "" if inside is None else text[opening + len(inside) + 2 :][:MAX_ANSWER]
        found.append((start, None if re.match(r"[\s$*]*(?:or|and|,|;)[\s$*]*[-+.\\]?[\d\\]", rest) else inside))
    if (start := text.rfind("####")) >= 0:
        marked = text[start + 4 : start + 4 + 2 * MAX_ANSWER].partition("\n")[0]
        found += [(start, marked)] if re.search(r"[\d\\]", marked) else []  # a heading is no answer
    lines = [line for line in text[-2 * MAX_ANSWER :].split("\n") if line.strip()][-2:] or [""]
    stated = STATED.match(lines[-1])
    if not stated and lines[0].rstrip("* ").endswith(":"):
        stated = STATED.match(" ".join(lines))
    if stated and (len(found) == 1 or re.search(r"[\d\\]", stated[1])):  # "The answer is correct." takes nothing back
        found.append((text.rstrip().rfind("\n") + 1, stated[1]))
    answer = (max(found, key=lambda place: place[0])[1] or "").strip()
    again = STATED.match(answer[:MAX_ANSWER])  # <answer>The answer is 5</answer>
    return (again[1] if again else answer) or None


def braced(text: str, opening: int) -> str | None:
    """What stands between the brace at `opening` and the one that closes it, or None where none does so soon."""
    depth = 0
    for place in range(opening, min(len(text), opening + MAX_ANSWER + 2)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[opening + 1 : place]
    return None


def gold_answer(text: str) -> str:
    """The answer in a row's `answer` or `solution`, in normal form: after ####, in \\boxed{}, or the whole text."""
    answer = final_answer(text) if "####" in text or "\\boxed" in text else text
    return normal_form((answer or "")[: MAX_ANSWER + 1])


def normal_form(answer: str) -> str:
    """An answer without what its meaning does not depend on: delimiters, spacing and other spellings of LaTeX."""
    answer = answer.strip().rstrip(".")
    for pattern, spelling in SPELLINGS:
        answer = pattern.sub(spelling, answer)
    return answer.strip().rstrip(".").strip()


def quantity(answer: str) -> tuple[Fraction, str] | None:
    """A plain number with its unit, if that is all there is: -$1,234.50, 3 1/2 miles, \\frac{1}{2}, 2 million, 50%."""
    if wrapped := re.fullmatch(r"\(([^(),]*)\)|\{([^{},]*)\}", answer):
        answer = wrapped[1] or wrapped[2] or ""
    answer = re.sub(r" ?\\frac\{(\d+)\}\{(\d+)\}", r" \1/\2", answer)
    match = NUMBER.fullmatch(re.sub(r"^\\frac\{-(\d+)\}\{(\d+)\}", r"-\1/\2", answer).strip())
    if match is None:
        return None
    part = match.groupdict()
    raw = (part["unit"] or "").lower().replace("/", " per ").split()
    words = [UNIT_NAMES.get(word, UNIT_NAMES.get(word.rstrip("s"), word.rstrip("s"))) for word in raw]
    if NO_UNITS.intersection(raw + words) or any(map(FRACTION.fullmatch, raw)):
        return None
    try:
        value = Fraction((part["ratio"] or "0").replace(" ", ""))
    except ZeroDivisionError:
        return None
    if part["ratio"] and value.denominator == 1:  # 36/2 has not been worked out
        return None
    value += Fraction((part["plain"] or "0").replace(",", "").rstrip(".")) + int(part["mixed"] or 0)
    if (part["sign"] == "-") != (part["inner"] == "-"):
        value = -value
    while words and words[0] in SCALES:
        value *= SCALES[words.pop(0)]
    if SCALES.keys() & set(words):
        return None
    return value, " ".join(words) or UNIT_NAMES.get(part["currency"], "")


def compare_exactly(gold: str, answer: str) -> bool | None:
    """Whether two answers in normal form are equal, as far as that can be said without algebra; None where it cannot.

    A gold number is met by a number alone: of an answer that still has to be worked out, `47*8`, nothing has been
    shown. Units must agree where both have one. What algebra would take for equal and is not, ends here too.
    """
    if tight(gold) == tight(answer):
        return True
    named = [re.fullmatch(r"([a-zA-Z]) ?= ?([^=]+)", side) for side in (gold, answer)]  # x = 5
    if all(named) and named[0][1] != named[1][1]:
        return False
    if named[0] and not named[1] and "=" in answer and quantity(named[0][2]):  # x + 1 = 6 for x = 5
        return False
    if all(named) or (named[0] and "=" not in answer) or (named[1] and "=" not in gold):
        gold, answer = (match[2] if match else side for match, side in zip(named, (gold, answer)))
    ours, theirs = quantity(gold), quantity(answer)
    if ours:  # detail 6
        return bool(theirs) and same_quantity(ours, theirs)
    ours, theirs = components(gold), components(answer)
    if len(ours) > 1 and all(ours):  # pairs and sets of numbers
        is_ordered = brackets(gold)[0] in ("(", "[")
        if brackets(gold) != brackets(answer) if is_ordered else brackets(answer)[0] in ("(", "["):
            return False
        if len(ours) != len(theirs) or not all(theirs):
            return False
        pairs = zip(ours, theirs) if is_ordered else zip(sorted(ours), sorted(theirs))
        return all(same_quantity(*pair) for pair in pairs)
    words = words_of(gold)  # of which algebra makes products of letters
    if words != words_of(answer) or (words and not re.search(r"[^\w\s'.-]|\d", gold)):
        return False
    if set(UNEVALUATED.findall(answer)) - set(UNEVALUATED.findall(gold)):  # the question itself would be right
        return False
    is_ordered = "," in gold and not re.search(r"[<>]|\\[lg]eq?", gold)
    if is_ordered and brackets(gold) != brackets(answer):  # a pair is no set, and an open interval no closed one
        return False
    if re.findall(r"_\{?(\w+)", gold) != re.findall(r"_\{?(\w+)", answer) or re.search(r"\d ?: ?\d", gold):
        return False  # bases and times
    if "\\boxed" in answer or braced(f"{{{answer}}}", 0) != answer:  # several answers, of which one would be picked
        return False
    if ("=" in answer) != ("=" in gold) or re.search(r"\d \d", answer):  # 13 = 12; 1 2, which parsers add up
        return False
    return None


def same_quantity(ours: tuple[Fraction, str], theirs: tuple[Fraction, str]) -> bool:
    """Whether two quantities are equal; a unit is compared where both have one."""
    return ours[0] == theirs[0] and (ours[1] == theirs[1] or not (ours[1] and theirs[1]))


def components(answer: str) -> list[tuple[Fraction, str] | None]:
    """What stands between the commas of a list, or its "and" and "or", as quantities; None for what is none."""
    first, last = brackets(answer)
    inside = answer[len(first) : len(answer) - len(last)] if first and last else answer
    return [quantity(re.sub(r"^[a-zA-Z] ?= ?", "", part)) for part in re.split(r" ?(?:[,;]| and | or ) ?", inside)]


def tight(answer: str) -> str:
    """Without case, and without spaces but in front of a digit, where they tell numbers apart."""
    return re.sub(r"(?<![\d,]) | (?!\d)", "", answer.lower())


def words_of(answer: str) -> list[str]:
    """Runs of letters that are no LaTeX command, nor a unit at the end."""
    answer = re.sub(
        r" (?:(?:square|cubic|sq) )?(?:units?|[cmk]m|inch(?:es)?|feet|degrees?)(?:\^\{?[23]\}?)?$", "", answer
    )
    return re.findall(r"[^\W\d_]{2,}", re.sub(r"\\[a-zA-Z]+(?:\{pmatrix\})?", " ", answer.lower()))


def brackets(answer: str) -> tuple[str, str]:
    """With what an answer begins and ends, as far as these are brackets."""
    return re.match(r"[(\[]|\\\{|", answer)[0], re.search(r"(?:[)\]]|\\\}|)$", answer)[0]


def is_quick(gold: str) -> bool:
    """Whether a gold answer is readable without algebra: a number, or words."""
    return quantity(gold) is not None or re.fullmatch(r"[^\W\d_]+(?:[ '.-]+[^\W\d_]+)*", gold) is not None


def symbolic_worker() -> None:
    """Compares answers by algebra: reads [gold, answer or null] as JSON lines, writes a verdict for each.

    It runs alone, from its source, in an interpreter that holds no model and may be killed at any time, so what it
    needs it imports itself. math-verify's own time limits are alarms, which do not stop sympy's C code: they are off.
    """
    import contextlib
    import json
    import logging
    import os
    import resource
    import sys

    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])

    def limit(what: int, value: int) -> None:
        hard = resource.getrlimit(what)[1]
        with contextlib.suppress(ValueError, OSError):  # a system may not know this limit
            resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))

    limit(resource.RLIMIT_AS, memory)
    verdicts = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is no verdict
    # LaTeX alone, no guessing, no mending: a reward must not depend on how far a broken formula can be repaired.
    rules = NormalizationConfig(basic_latex=True, units=True, malformed_operators=False, nits=False, boxed="all")
    options = {"try_extract_without_anchor": False, "boxed_match_priority": 0}
    latex = [LatexExtractionConfig(**options, normalization_config=rules)]

    def read(answer: str) -> list:
        return parse(f"\\boxed{{{answer}}}", latex, "no_fallback", "first_match", parsing_timeout=None)

    print("ready", file=verdicts)
    for line in sys.stdin:
        used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
        limit(resource.RLIMIT_CPU, used + seconds + 2)  # ends it even where nobody is left to kill it
        gold, answer = json.loads(line)
        known, verdict = read(gold), "different"
        if not known:
            verdict = "unreadable"
        elif answer is not None:
            with contextlib.suppress(Exception):
                # Twelve places, so that a decimal meets no root that it only comes near.
                is_equal = verify(known, read(answer), float_rounding=12, timeout_seconds=None)
                verdict = "equal" if is_equal else "different"
        print(verdict, file=verdicts)


WORKER_SOURCE = inspect.getsource(symbolic_worker) + "\nsymbolic_worker()\n"  # now: the file may be edited later


MEANING = {"equal": (True, "symbolic"), "different": (False, "symbolic"), "unreadable": (None, "unreadable gold")}


class Verifier:
    """Grades completions: exactly where numbers allow it, by algebra in `workers` processes where they do not.

    A comparison that takes longer than `seconds` costs its worker's life. Threads may share a verifier.
    """

    def __init__(self, workers: int = 2, seconds: float = 3.0, memory_gb: float = 2.0):
        self.count, self.seconds, self.memory = workers, seconds, int(memory_gb * 1e9)
        self.workers: list[_Worker] = []
        self.known: dict[tuple[str, str | None], str] = {}  # verdicts of algebra: samples of a question repeat answers
        self.lock = threading.Lock()
        atexit.register(self.close)

    def grade(self, pairs: list[tuple[str, str]]) -> list[Grade]:
        """Grades of (completion, gold answer) pairs; a gold answer may be a whole solution (see `gold_answer`)."""
        answers = [final_answer(completion) for completion, _ in pairs]
        kept = [normal_form(answer) if answer and len(answer) <= MAX_ANSWER else None for answer in answers]
        verdicts = self.compare([(gold_answer(gold), answer) for answer, (_, gold) in zip(kept, pairs)])
        grades = []
        for answer, short, (equal, how) in zip(answers, kept, verdicts):
            if short is None and equal is not None:
                how = "too long" if answer else "no answer"
            grades.append(Grade(equal, answer and answer[:MAX_ANSWER], how))
        return grades

    def compare(self, pairs: list[tuple[str, str | None]]) -> list[tuple[bool | None, str]]:
        """Whether gold and answer, in normal form, are equal, and how that was found. No answer differs from any; a
        gold answer that cannot be read gives None."""
        found: list[tuple | None] = []
        for gold, answer in pairs:
            equal = None
            if not gold or len(gold) > MAX_ANSWER:
                found.append((None, "unreadable gold"))
                continue
            if answer is not None:
                equal = compare_exactly(gold, answer)
            elif is_quick(gold):
                equal = False
            found.append(None if equal is None else (equal, "exact"))
        open_pairs = [pair for pair, verdict in zip(pairs, found) if verdict is None]
        if open_pairs:
            with self.lock:
                fresh = [pair for pair in dict.fromkeys(open_pairs) if pair not in self.known]
                new = dict(zip(fresh, self._algebra(fresh)))
                verdicts = iter([new.get(pair) or self.known[pair] for pair in open_pairs])
                if len(self.known) > 100_000:
                    self.known.clear()
                self.known |= {pair: verdict for pair, verdict in new.items() if verdict != "crash"}
            found = [MEANING.get(v := next(verdicts), (False, v)) if verdict is None else verdict for verdict in found]
        return found

    def _algebra(self, pairs: list[tuple[str, str | None]]) -> list[str]:
        """The workers' verdicts: equal, different, unreadable, or timeout and crash of those that had to be ended."""
        try:
            return self._supervise(pairs)
        except BaseException:  # whatever they are at belongs to nobody now
            self.close()
            raise

    def _supervise(self, pairs: list[tuple[str, str | None]]) -> list[str]:
        """Hand pairs to idle workers, read verdicts, end and replace workers that are dead or over their time."""
        verdicts, waiting, deaths = ["crash"] * len(pairs), deque(range(len(pairs))), 0
        for worker in [worker for worker in self.workers if worker.process.poll() is not None]:  # died while idle
            worker.end()
            self.workers.remove(worker)
        while waiting or any(worker.job is not None for worker in self.workers):
            busy = sum(worker.job is not None for worker in self.workers)
            while len(self.workers) < min(self.count, len(waiting) + busy):
                self.workers.append(_Worker(self.seconds, self.memory))
            for worker in self.workers:
                if worker.is_ready and worker.job is None and waiting:
                    worker.take(waiting.popleft(), pairs)
            soonest = min(worker.deadline for worker in self.workers) - time.monotonic()
            readable = wait([worker.process.stdout for worker in self.workers], max(0.0, soonest))
            for worker in list(self.workers):
                line = worker.process.stdout.readline() if worker.process.stdout in readable else None
                if line and not worker.is_ready:
                    worker.is_ready, worker.deadline, deaths = True, math.inf, 0
                elif line:
                    verdicts[worker.job], worker.job, worker.deadline = line.strip(), None, math.inf
                elif line == "" or time.monotonic() >= worker.deadline:  # detail 7
                    if worker.job is not None:
                        verdicts[worker.job] = "crash" if line == "" else "timeout"
                    deaths += not worker.is_ready
                    told = worker.end()
                    self.workers.remove(worker)
                    if deaths > 2:
                        sys.exit(
                            f"The verifier's worker processes die before they are ready ({told or 'no message'}). See "
                            f'whether `{sys.executable} -c "import math_verify"` works and memory is left.'
                        )
        return verdicts

    def close(self) -> None:
        """End the workers; they are started again when they are needed."""
        for worker in self.workers:
            worker.end()
        self.workers.clear()


class _Worker:
    """A process that runs `symbolic_worker`, and the number of the pair it is at."""

    def __init__(self, seconds: float, memory: int):
        command = [sys.executable, "-c", WORKER_SOURCE, str(math.ceil(seconds)), str(memory)]
        self.errors, self.seconds = tempfile.TemporaryFile("w+"), seconds
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        # A session of its own, for Ctrl-C is not meant for it, and a folder without modules that it might import.
        self.process = subprocess.Popen(command, text=True, start_new_session=True, cwd="/", **pipes)
        self.is_ready, self.job, self.deadline = False, None, time.monotonic() + 120

    def take(self, number: int, pairs: list) -> None:
        self.job, self.deadline = number, time.monotonic() + self.seconds
        with contextlib.suppress(BrokenPipeError):  # it is dead, which reading from it will tell
            self.process.stdin.write(json.dumps(pairs[number]) + "\n")
            self.process.stdin.flush()

    def end(self) -> str:
        """Kill it; returns the last line it complained with."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.errors.seek(0)
        told = self.errors.read().strip().splitlines()
        self.errors.close()
        return told[-1] if told else ""


VERIFIER = Verifier()


def grade(completion: str, gold: str) -> Grade:
    """Whether the final answer of a completion is right. gold: the answer, or a solution that states it."""
    return VERIFIER.grade([(completion, gold)])[0]


# ---------------------------------------------------------------------------------------------- rewards: edit here


def correctness_reward(grade: Grade, stopped: bool) -> float:
    """1 where the verifier found the answer right and the completion has ended by itself. There is no part of it for an
    answer that is nearly right."""
    return float(grade.correct is True and stopped)


def well_formed_reward(text: str) -> float:
    """1 where the text, opened <think> of the template included, is reasoning in its tags, if any, and then one answer
    in its tags at the very end. Half of it is worth nothing, so there is nothing to farm but the whole."""
    counts = [text.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    if counts not in ([0, 0, 1, 1], [1, 1, 1, 1]) or not text.rstrip().endswith("</answer>"):  # detail 13
        return 0.0
    reasoning, _, rest = text.rpartition("</think>")
    inside = rest.partition("<answer>")[2].rpartition("</answer>")[0]
    opened = not counts[0] or reasoning.lstrip().startswith("<think>")
    return float(opened and bool(inside.strip()))


# ---------------------------------------------------------------------------------------------- advantages: the dial


def raw_reward(rewards: torch.Tensor) -> torch.Tensor:
    """REINFORCE without a baseline, and likelihood where the reward is 1 or 0. All of these: [P, G] to [P, G]."""
    return rewards


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """RLOO: the baseline of a completion is the mean of the others, so the gradient stays unbiased."""
    return centred(rewards) * rewards.shape[1] / (rewards.shape[1] - 1)


def standardised(rewards: torch.Tensor) -> torch.Tensor:
    """GRPO: mean and unbiased std of the group."""
    return centred(rewards) / (rewards.std(1, keepdim=True) + 1e-6)


def centred(rewards: torch.Tensor) -> torch.Tensor:
    """Dr. GRPO: the mean alone, so that a hard question weighs no more than an even one."""
    all_equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(all_equal, 0.0)  # detail 1


def verified(groups: list[list[Completion]], right: torch.Tensor, cap: int) -> torch.Tensor:
    """Expert iteration's reward [P, G]: 1 for a right completion that is no copy, up to `cap` of a question."""
    kept = torch.zeros_like(right)
    for p, group in enumerate(groups):
        new = {tuple(c.ids): g for g, c in reversed(list(enumerate(group))) if right[p, g]}  # the first of its copies
        kept[p, sorted(new.values())[:cap]] = 1.0  # detail 14
    return kept


class Algorithm(NamedTuple):
    """What an advantage is made of, where the ratio to the sampling policy is taken, and what losses are divided by."""

    advantage: Callable[[torch.Tensor], torch.Tensor]
    ratio: Literal["none", "token", "sequence"]
    mean_over: Literal["completions", "tokens then completions", "a fixed length", "tokens"]


ALGORITHMS = {
    "reinforce": Algorithm(raw_reward, "none", "completions"),
    "rloo": Algorithm(leave_one_out, "sequence", "completions"),
    "grpo": Algorithm(standardised, "token", "tokens then completions"),
    "dr_grpo": Algorithm(centred, "token", "a fixed length"),
    "expert_iteration": Algorithm(raw_reward, "none", "tokens"),
}


def token_losses(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ratio: str,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and ratios [B, T]. logprobs, old_logprobs, mask [B, T], advantages [B, 1].

    none: −A·log π; token: the clipped surrogate of every token; sequence: that of the whole completion, spread evenly
    over its tokens.
    """
    log_ratio = (logprobs - old_logprobs) * mask
    if ratio == "none":
        return -advantages * logprobs, log_ratio.detach().exp()
    if ratio == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(mask)  # detail 12
    rho = log_ratio.exp()
    gain = torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if ratio == "sequence":
        gain = gain / mask.sum(1, keepdim=True).clamp(min=1)
    return -gain, rho.detach()


def mean_loss(
    losses: torch.Tensor, mask: torch.Tensor, mean_over: str, sequences: float, tokens: float, max_tokens: int
) -> torch.Tensor:
    """One number from token losses [B, T]; `sequences` and `tokens` count the whole optimizer step.  # detail 11

    completions: Σ_i Σ_t / N; tokens then completions: (1/N) Σ_i (1/T_i) Σ_t; a fixed length: Σ_i Σ_t / (N·max_tokens);
    tokens: Σ_i Σ_t / Σ_i T_i.
    """
    if mean_over == "tokens then completions":
        return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences
    counts = {"completions": sequences, "a fixed length": sequences * max_tokens, "tokens": max(tokens, 1)}
    return (losses * mask).sum() / counts[mean_over]


# ---------------------------------------------------------------------------------------------- test-time compute


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the `right` ones (Codex's estimator)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)  # detail 15


def vote(answers: list, weights: list[float]) -> int | None:
    """The place of an answer with the largest sum of weights, the one found first among equals; None counts for
    nothing, and is what comes out if there is nothing else."""
    totals: dict = {}
    for answer, weight in zip(answers, weights):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    return answers.index(max(totals, key=totals.get)) if totals else None  # max takes the first of equals


def best(answers: list, scores: list[float]) -> int | None:
    """The place of the answer with the highest score, an absent answer never being the best."""
    places = [i for i, answer in enumerate(answers) if answer is not None]
    return max(places, key=lambda i: scores[i]) if places else None


def best_of_n_kl_bound(n: int) -> float:
    """The most that choosing the best of n samples can move the distribution: log n − (n−1)/n nats. Exact only where no
    two scores tie (arXiv:2401.01879)."""
    return math.log(n) - (n - 1) / n


class Attempt(NamedTuple):
    """One evaluated completion. `cluster` numbers the different answers to its question, 0 is the right one, None no
    answer; `score` is the reranker's, between 0 and 1."""

    text: str
    answer: str | None
    cluster: int | None
    length: int
    stopped: bool
    score: float = 0.0


def scaling(attempts: list[list[Attempt]], ks: list[int], reranked: bool, seed: int) -> dict[str, float]:
    """Accuracy against the number of samples k: pass@k, maj@k, and with a reranker best@k and weighted@k.

    attempts: n of every question. Votes are averaged over random subsets of size k.
    """
    draws = 32
    order = random.Random(seed)
    sums: Counter = Counter()
    for group in attempts:
        right = [attempt.cluster == 0 for attempt in group]
        for k in ks:
            sums[f"pass@{k}"] += pass_at_k(len(group), sum(right), k)
            for _ in range(draws):
                chosen = order.sample(group, k)
                answers, scores = [a.cluster for a in chosen], [a.score for a in chosen]
                elected = {"maj": vote(answers, [1.0] * k)}
                if reranked:
                    elected |= {"best": best(answers, scores), "weighted": vote(answers, scores)}
                for name, place in elected.items():
                    sums[f"{name}@{k}"] += (place is not None and answers[place] == 0) / draws
    return {name: total / len(attempts) for name, total in sums.items()}


def bootstrap_interval(values: list[float], seed: int, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean over questions, which are drawn anew with replacement."""
    values = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def force_budget(sampler, tokenizer, questions, groups, args: Args, indices: list[int], temperature: float):
    """Completions [P][n], sampled with a budget of --max-think-tokens, their reasoning extended as far as that budget
    goes and cut where it has not ended (s1). An extension without an end is given up where nothing would cut it.

    Returns new ones; their log-probabilities are all 0, for nothing is ever trained on them.
    """
    n, limit = len(groups[0]), args.max_completion_tokens  # detail 16
    think_limit = args.max_think_tokens or limit
    rows = [(list(c.ids), c.stopped) for group in groups for c in group]

    def text_of(i: int) -> str:
        return tokenizer.decode(rows[i][0])

    def go_on(starts: dict[int, list[int]], budget: int, salt: int) -> dict[int, tuple[list[int], bool]]:
        """Rows that continue from these ids by sampling, up to `budget` tokens in all."""
        starts = {i: ids for i, ids in starts.items() if len(ids) < budget}
        prompts = [questions[i // n]["ids"] + ids for i, ids in starts.items()]
        budgets = [budget - len(ids) for ids in starts.values()]
        numbers = [indices[i // n] * n + i % n for i in starts]
        sampling = {"temperature": temperature, "seed": args.seed + 7919 * salt, "indices": numbers}
        more = sampler.generate(prompts, budgets, **sampling)
        return {i: (ids + c.ids, c.stopped) for (i, ids), (c,) in zip(starts.items(), more)}

    for round_ in range(args.extend_thinking):
        starts = {
            i: encode_text(tokenizer, text_of(i).partition("</think>")[0] + args.wait_cue, begins=False)
            for i in range(len(rows)) if "</think>" in text_of(i)
        }  # fmt: skip
        for i, row in go_on(starts, think_limit, 2 + round_).items():
            if args.max_think_tokens or row[1]:
                rows[i] = row
    if args.max_think_tokens:
        cue = encode_text(tokenizer, args.answer_cue, begins=False)
        starts = {
            i: ids[:think_limit] + ([] if "</think>" in text_of(i) else cue)
            for i, (ids, stopped) in enumerate(rows) if not stopped
        }  # fmt: skip
        for i, row in go_on(starts, limit, 1).items():
            rows[i] = row
    made = [Completion(ids, [0.0] * len(ids), stopped) for ids, stopped in rows]
    return [made[i : i + n] for i in range(0, len(made), n)]


def load_reranker(args: Args, device, bfloat16: bool):
    """What --reranker names, as a function from (prompt, completion text) pairs to scores between 0 and 1.

    Of an outcome model the sigmoid of the score; of a process model the product (or minimum) of the probabilities that
    its steps are right, the reasoning being cut into steps at the separator that it was trained with; without a step
    there is nothing that it could vouch for, and the score is 0.
    """
    path, flag = args.reranker, "--reranker"
    config = load_config(path, args.trust_remote_code, flag)
    tokenizer, members = load_scalar_models(path, flag, config, args.trust_remote_code, device)
    is_process = getattr(config, "reward_kind", "outcome") == "process"
    if any(not isinstance(getattr(model, "score", None), torch.nn.Linear) for model in members):
        sys.exit(f"{flag} {path}: has no linear head named `score`, as what reward_model.py makes has.")
    context = context_length(config)

    def encode(prompt, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and the places where scores are read."""
        if not is_process:
            if tokenizer.chat_template or not isinstance(prompt, str):
                chat = [*as_messages(prompt, "user"), {"role": "assistant", "content": text}]
                ids = render_chat(tokenizer, chat).ids
            else:
                ids = sum(encode_continuation(tokenizer, prompt, text), [])
            return ids[-context:], [len(ids[-context:]) - 1]
        ids, ends = encode_prompt(tokenizer, prompt), []
        reasoning = (text.rpartition("</think>")[0] or text).partition("<answer>")[0]
        for step in filter(str.strip, reasoning.split(config.reward_separator)):
            pieces = (step, config.reward_separator)
            step_ids = [i for piece in pieces for i in encode_text(tokenizer, piece, begins=False)]
            if len(ids) + len(step_ids) > context:
                break
            ids += step_ids
            ends.append(len(ids) - 1)
        return ids, ends

    @torch.no_grad()
    def scores_of(model, rows: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
        """Normalised scores of each row at its places."""
        found = []
        for part in split_by_tokens([ids for ids, _ in rows], args.microbatch_tokens):
            starts = torch.tensor([0] + [len(rows[i][0]) for i in part]).cumsum(0).tolist()
            packed = pack([Segment(rows[i][0], [False] * len(rows[i][0])) for i in part]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
                hidden = hidden_states(model, packed)
            places = [start + end for start, i in zip(starts, part) for end in rows[i][1]]
            with torch.autocast(device.type, enabled=False):
                scores = model.score(hidden[places].float())[:, 0].cpu()
            scores = (scores - getattr(model.config, "reward_mean", 0.0)) / getattr(model.config, "reward_std", 1.0)
            found += scores.split([len(rows[i][1]) for i in part])
        return found

    def reranker(pairs: list[tuple]) -> list[float]:
        try:
            rows = [encode(prompt, text) for prompt, text in pairs]
        except TemplateError as error:
            sys.exit(f"{flag} {path}: its chat template refuses a prompt of the data ({first_line(error)}).")
        members_scores = zip(*(scores_of(model, rows) for model in members))
        values = [torch.stack(scores).mean(0).sigmoid() for scores in members_scores]
        join = torch.amin if getattr(config, "reward_aggregation", "product") == "min" else torch.prod
        return [float(join(value)) if len(value) else 0.0 for value in values]

    return reranker


# ---------------------------------------------------------------------------------------------- data and scoring


def encode_questions(tokenizer, rows: list[dict], source: str, max_tokens: int) -> list[dict]:
    """Rows as questions: prompt ids, gold answer and the row. Prompts that are over `max_tokens` or that the template
    refuses are dropped and counted, and so are answers of which nothing is left."""
    questions, refused, empty = [], 0, 0
    for number, row in enumerate(rows, 1):
        answer = row.get("answer")
        if not isinstance(answer, (str, type(None))):
            sys.exit(f"{source}, row {number}: an answer must be text or a number; it is {str(answer)[:60]}.")
        if answer is not None and not answer.rpartition("####")[2].strip():
            empty += 1
            continue
        prompt = row["prompt"] if row.get("prompt") is not None else row["question"]
        try:
            ids = encode_prompt(tokenizer, prompt, row.get("tools"))
        except (TemplateError, TypeError, ValueError):  # the latter for an empty list of messages
            refused += 1
            continue
        if 0 < len(ids) <= max_tokens:
            questions.append({"ids": ids, "gold": answer, "row": row})
    if empty:
        print(f"{source}: {empty} of {len(rows)} prompts dropped: their answer is empty.")
    if refused:
        print(f"{source}: {refused} of {len(rows)} prompts dropped: the chat template refuses their roles or content.")
    if long := len(rows) - empty - refused - len(questions):
        print(f"{source}: {long} of {len(rows)} prompts dropped: over {max_tokens} tokens.")
    if rows and not questions:
        sys.exit(
            f"{source}: no prompt is left of {len(rows)}: {empty} have an empty answer, {refused} are refused by the "
            f"chat template, {long} are longer than {max_tokens} tokens (--max-prompt-tokens)."
        )
    return questions


def load_scalar_models(path: str, flag: str, config, trust_remote_code: bool, device) -> tuple:
    """Tokenizer and members of the sequence classifier with one label at `path`, which `flag` named."""
    if getattr(config, "num_labels", 0) != 1:
        sys.exit(f"{flag} {path}: needs a sequence classifier with one label; this has {config.num_labels}.")
    tokenizer, members = load_tokenizer(path, flag=flag), []
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    for k in range(getattr(config, "reward_members", 1)):
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, subfolder=f"member_{k}" if k else "", trust_remote_code=trust_remote_code, **options
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            sys.exit(f"{flag} {path}: member {k} of the reward model could not be loaded ({first_line(error)}).")
        if info["missing_keys"]:
            sys.exit(f"{flag} {path}: no reward model, its weights lack {', '.join(sorted(info['missing_keys']))}.")
        use_layout(model.to(device).eval().requires_grad_(False))
        members.append(model)
    return tokenizer, members


def read_questions(rows: list[dict], source: str, instruction: str, verifier: Verifier) -> list[dict]:
    """Rows of any of the formats as prompt and answer; those whose gold answer cannot be read are left out."""
    given = [[row[key] for key in ("answer", "solution") if isinstance(row.get(key), str)] for row in rows]
    texts = [next((text for text in texts if gold_answer(text)), "".join(texts)) for texts in given]
    golds = [gold_answer(text) for text in texts]
    readable = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        verdicts = verifier.compare([(gold, None) for gold in golds])
        readable = [[equal is False and how in ("exact", "symbolic") for equal, how in verdicts]]
    if dist.is_initialized():  # what depends on the clock must not differ between processes
        dist.broadcast_object_list(readable)
    read = []
    for row, gold, is_readable in zip(rows, golds, readable[0]):
        if not is_readable:  # detail 8
            continue
        prompt = next(row[name] for name in ("prompt", "question", "problem") if row.get(name) is not None)
        if instruction and prompt:
            *before, last = as_messages(prompt, "user")
            prompt = [*before, {**last, "content": (last.get("content") or "") + instruction}]
        read.append({"prompt": prompt, "answer": gold})
    if lost := len(rows) - len(read):
        example = texts[readable[0].index(False)][-60:]
        share = f"{lost} of {len(rows)} gold answers ({lost / len(rows):.1%})"
        print(f"{source}: {share} cannot be read, such as {example!r}; their rows are left out.")
    if not read:
        sys.exit(f"{source}: none of its {len(rows)} gold answers can be read as a number, a formula or a word.")
    return read


def texts_of(tokenizer, questions: list[dict], groups: list[list[Completion]]) -> list[list[str]]:
    """The completions as text, with the <think> that the prompt may end in."""
    openings = ["<think>" if tokenizer.decode(q["ids"][-8:]).rstrip().endswith("<think>") else "" for q in questions]
    return [
        [opening + tokenizer.decode(c.ids, skip_special_tokens=True) for c in group]
        for opening, group in zip(openings, groups)
    ]


def judge(verifier: Verifier, questions: list[dict], groups: list[list[Completion]], texts: list, args: Args) -> tuple:
    """Grades of every completion, and the reward components, each [P, G], with their weighted sum under "total"."""
    flat = iter(verifier.grade([(text, q["gold"]) for q, row in zip(questions, texts) for text in row]))
    grades = [[next(flat) for _ in row] for row in texts]
    components = {
        "answer": torch.tensor([
            [correctness_reward(g, c.stopped) for g, c in zip(*pair)] for pair in zip(grades, groups)
        ]),
        "format": torch.tensor([[well_formed_reward(text) for text in row] for row in texts]),
    }  # fmt: skip
    components["total"] = args.answer_weight * components["answer"] + args.format_weight * components["format"]
    return grades, components


def clusters_of(verifier: Verifier, grades: list[list[Grade]]) -> list[list[int | None]]:
    """A number for each different answer to a question: 0 is the right one, None an answer that is absent."""
    different: list[dict[str, int]] = []  # of every question its wrong answers in normal form, numbered as they come
    for row in grades:
        wrong = dict.fromkeys(normal_form(g.answer) for g in row if g.answer and not g.correct)
        different.append({answer: number for number, answer in enumerate(wrong, 1)})
    hopeless = {normal_form(g.answer) for row in grades for g in row if g.how in ("timeout", "crash", "too long")}
    pairs = [
        (q, first, second) for q, answers in enumerate(different) for first, second in combinations(answers, 2)
        if not hopeless & {first, second}
    ]  # fmt: skip
    for (q, first, second), (equal, _) in zip(pairs, verifier.compare([pair[1:] for pair in pairs])):
        if equal:
            different[q][second] = min(different[q][first], different[q][second])
    return [
        [0 if g.correct else numbers[normal_form(g.answer)] if g.answer else None for g in row]
        for row, numbers in zip(grades, different)
    ]


def evaluate_math(sampler, tokenizer, questions, verifier, reranker, args: Args, rank: int, world: int) -> tuple:
    """Held-out accuracy and what more samples, a reranker and a thinking budget make of it.

    Returns the metrics over all processes, and all questions with their attempts, in order.
    """
    mine, indices, n = questions[rank::world], list(range(rank, len(questions), world)), args.eval_samples
    prompts = [q["ids"] for q in mine]
    budget = args.max_think_tokens or args.max_completion_tokens
    with tqdm(total=len(mine) * (n + 1), desc="evaluating", leave=False, disable=None) as bar:
        sampling = {"num_samples": n, "temperature": args.temperature, "seed": args.seed}
        sampled = sampler.generate(prompts, budget, **sampling, indices=indices, progress=bar.update)
        greedy = sampler.generate(prompts, budget, temperature=0.0, progress=bar.update)
    if mine and (args.max_think_tokens or args.extend_thinking):
        sampled = force_budget(sampler, tokenizer, mine, sampled, args, indices, args.temperature)
        greedy = force_budget(sampler, tokenizer, mine, greedy, args, indices, 0.0)
    texts = [row + best for row, best in zip(texts_of(tokenizer, mine, sampled), texts_of(tokenizer, mine, greedy))]
    grades = verifier.grade([(text, q["gold"]) for q, row in zip(mine, texts) for text in row])
    scores = [0.0] * (n * len(mine))
    if reranker:
        scores = reranker([(q["row"]["prompt"], text) for q, row in zip(mine, texts) for text in row[:n]])
    grades = [grades[i : i + n + 1] for i in range(0, len(grades), n + 1)]
    clusters, scores, found = clusters_of(verifier, [row[:n] for row in grades]), iter(scores), []
    for question, row, group, judged, numbers in zip(mine, texts, sampled, grades, clusters):
        attempts = [
            Attempt(text, g.answer, number, len(c.ids), c.stopped, next(scores))
            for text, g, number, c in zip(row, judged, numbers, group)
        ]
        prompt = tokenizer.decode(question["ids"], skip_special_tokens=True)
        found.append((prompt, question["gold"], attempts, judged[n].correct is True))
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, found)
        found = [shares[i % world][i // world] for i in range(len(questions))]
    attempts = [question[2] for question in found]
    accuracies = [sum(a.cluster == 0 for a in group) / n for group in attempts]
    flat = [attempt for group in attempts for attempt in group]
    lengths = {"right": [a.length for a in flat if a.cluster == 0], "wrong": [a.length for a in flat if a.cluster != 0]}
    low, high = bootstrap_interval(accuracies, args.seed)
    ks = [k for k in (2**i for i in range(1, 20)) if k < n] + [n] * (n > 1)
    curves = scaling(attempts, ks, reranker is not None, args.seed)
    return {
        "eval/accuracy": sum(accuracies) / len(found),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/accuracy_greedy": sum(question[3] for question in found) / len(found),
        **{f"eval/{name}": value for name, value in curves.items()},
        "eval/completion_length": sum(a.length for a in flat) / len(flat),
        **{f"eval/length_{name}": sum(values) / len(values) for name, values in lengths.items() if values},
        "eval/truncated_fraction": sum(not a.stopped for a in flat) / len(flat),
        "eval/no_answer": sum(a.answer is None for a in flat) / len(flat),
    }, found


def evaluation_samples(found: list[tuple], per_question: int) -> list[dict]:
    """The first so many completions of every evaluated question, as rows for samples.jsonl."""
    return [
        {"prompt": prompt, "completion": a.text, "reward": float(a.cluster == 0), "answer": a.answer, "gold": gold,
         "length": a.length, "stopped": a.stopped, "score": a.score}
        for prompt, gold, attempts, _ in found for a in attempts[:per_question]
    ]  # fmt: skip


def draw_scaling(run: Run) -> None:
    """scaling.png: the last evaluation's accuracy against samples, and accuracy and length over all evaluations."""
    if not run.is_main:
        return
    from matplotlib.figure import Figure

    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in logged if "eval/accuracy" in row]
    figure = Figure(figsize=(9, 3.4), layout="tight")
    samples, training = figure.subplots(1, 2)
    for color, kind in enumerate(("pass", "maj", "weighted", "best")):
        for row, style in ((rows[0], ":"), (rows[-1], "-"))[len(rows) == 1 :]:
            at = {int(k.partition("@")[2]): value for k, value in row.items() if k.startswith(f"eval/{kind}@")}
            points = sorted({1: row["eval/accuracy"], **at}.items())
            label = f"{kind}@k, step {row['step']}"
            samples.plot(*zip(*points), style, color=f"C{color}", marker="o", ms=3, label=label) if at else None
    ticks = [2**i for i in range(12) if 2**i <= run.args.eval_samples]
    samples.set_xscale("log", base=2)
    samples.set_xticks(ticks, ticks)
    samples.set(xlabel="samples k", ylabel="accuracy", ylim=(0, 1))
    samples.legend(fontsize=7) if samples.lines else None
    steps = [row["step"] for row in rows]
    training.plot(steps, [row["eval/accuracy"] for row in rows], marker="o", ms=3, label="accuracy")
    training.fill_between(
        steps, [row["eval/accuracy_low"] for row in rows], [row["eval/accuracy_high"] for row in rows], alpha=0.2
    )
    training.set(xlabel="step", ylabel="accuracy", ylim=(0, 1))
    length = training.twinx()
    length.plot(steps, [row["eval/completion_length"] for row in rows], color="tab:orange", marker="o", ms=3)
    length.set(ylabel="tokens (orange)")
    figure.savefig(run.folder / "scaling.png", dpi=110)


class VerifiedSamples:
    """verified.jsonl: right completions as data for sft.py, no two alike, up to `cap` of a question in a whole run."""

    def __init__(self, run: Run, cap: int):
        self.path, self.is_main, self.cap = run.folder / "verified.jsonl", run.is_main, cap
        is_there = self.is_main and self.path.exists()
        rows = [json.loads(line) for line in self.path.read_text().splitlines()] if is_there else []
        self.written = {(json.dumps(row["prompt"]), row["completion"]) for row in rows}
        self.counts = Counter(prompt for prompt, _ in self.written)

    def add(self, step: int, tokenizer, questions, groups, right: torch.Tensor) -> None:
        """Those of a rollout that are new; all processes call this together."""
        found = [
            (q["row"]["prompt"], tokenizer.decode(c.ids, skip_special_tokens=True), q["gold"])
            for q, group, row in zip(questions, groups, right) for c, is_right in zip(group, row) if is_right
        ]  # fmt: skip
        if dist.is_initialized():
            shares = [None] * dist.get_world_size()
            dist.all_gather_object(shares, found)
            found = [sample for share in shares for sample in share]
        rows = []
        for prompt, completion, gold in found if self.is_main else ():
            key = (json.dumps(prompt), completion)
            if key not in self.written and self.counts[key[0]] < self.cap:
                self.written.add(key)
                self.counts[key[0]] += 1
                rows.append({"step": step, "prompt": prompt, "completion": completion, "answer": gold})
        if self.is_main:
            append_rows(self.path, rows)


class Rollout:
    """Completions of this process's prompts as rows: B = prompts × samples, T tokens, those of a prompt adjacent."""

    def __init__(self, prompts: list[list[int]], groups: list[list[Completion]], device):
        self.group_size = len(groups[0])
        self.prompts = [prompt for prompt in prompts for _ in range(self.group_size)]
        completions = [c for group in groups for c in group]
        self.ids = [c.ids for c in completions]  # detail 2
        self.old_logprobs = pad_rows([torch.tensor(c.logprobs) for c in completions]).to(device)  # [B, T]
        self.mask = pad_rows([torch.ones(len(ids)) for ids in self.ids]).to(device)  # [B, T], detail 4

    def rows_of(self, prompts: list[int]) -> list[int]:
        return [p * self.group_size + g for p in sorted(prompts) for g in range(self.group_size)]

    def microbatches(self, rows: list[int], max_tokens: int) -> list[tuple[list[int], float]]:
        """`rows` in microbatches, each with its weight. A process with fewer of them than another repeats some with
        weight zero: sharded weights are gathered by all processes together."""
        split = split_by_tokens([self.ids[i] for i in rows], max_tokens, [self.prompts[i] for i in rows])
        parts = [([rows[j] for j in part], 1.0) for part in split]
        rounds = int(reduce_over_processes([len(parts)], self.mask.device, maximum=True)[0])
        return parts + [([0], 0.0)] * (rounds - len(parts))

    def token_logprobs(self, model, rows: list[int], temperature: float, bfloat16: bool):
        """Log-probabilities and entropies [b, T] of the completions in `rows` under `model`."""
        device, width = self.mask.device, self.mask.shape[1]
        packed = pack_completions([self.prompts[i] for i in rows], [self.ids[i] for i in rows])  # detail 9
        # A forward needs each weight once: a cache of their bfloat16 copies would only take memory.
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            logprobs, entropy = token_logprobs(model, packed.to(device), temperature)  # detail 3
        return pad_rows(logprobs.split(packed.lengths), width), pad_rows(entropy.split(packed.lengths), width)


@torch.no_grad()
def reference_logprobs(reference, rollout: Rollout, args, bfloat16: bool) -> torch.Tensor:
    """Log-probabilities [B, T] of a rollout's completions under the reference; zeros where there is none."""
    logprobs = torch.zeros_like(rollout.old_logprobs)
    if reference is not None:
        for rows, _ in rollout.microbatches(range(len(rollout.ids)), args.microbatch_tokens):
            logprobs[rows], _ = rollout.token_logprobs(reference, rows, args.temperature, bfloat16)
    return logprobs


@torch.no_grad()
def policy_statistics(logprobs, old_logprobs, ref_logprobs, entropy, ratio, better, mask, args: Args) -> dict:
    """Sums over the tokens of a microbatch, from which the means of policy/… are made. All [b, T].

    `better` says where the advantage is positive: which bound of the clip binds depends on its sign.
    """
    log_ratio = logprobs - old_logprobs
    outside = torch.where(better, ratio > 1 + args.clip_high, ratio < 1 - args.clip_low)
    sums = {
        "tokens": torch.ones_like(mask),
        "entropy": entropy,
        "clip_fraction": outside,
        "approx_kl": log_ratio.square() / 2,
        "sampler_gap": log_ratio.abs(),
    }
    if ref_logprobs is not None:
        sums["kl"] = kl_estimate(logprobs, ref_logprobs, "k3")
    return {name: float((values * mask).sum()) for name, values in sums.items()}


def rollout_metrics(rewards: dict, groups: list[list[Completion]], device) -> dict:
    """What a rollout tells about itself, over all processes."""
    total, correct = rewards["total"], rewards.get("answer", rewards["total"])
    completions = [c for group in groups for c in group]
    lengths = [len(c.ids) for c in completions]
    sums = {
        "prompts": len(groups), "completions": len(completions), "tokens": sum(lengths),
        "stopped": sum(c.stopped for c in completions), "square": total.square().sum(),
        "all_correct": (correct > 0).all(1).sum(), "all_wrong": (correct <= 0).all(1).sum(),
        **{f"reward/{name}": values.sum() for name, values in rewards.items()},
    }  # fmt: skip
    sums = sum_over_processes(sums, device)
    count = sums["completions"]
    means = {name: value / count for name, value in sums.items()}
    return {
        "reward/mean": means["reward/total"],
        "reward/std": max(means["square"] - means["reward/total"] ** 2, 0.0) ** 0.5,
        **{f"reward/{name}": means[f"reward/{name}"] for name in rewards if name != "total"},
        "groups/all_correct": sums["all_correct"] / sums["prompts"],
        "groups/all_wrong": sums["all_wrong"] / sums["prompts"],
        "completions/length_mean": means["tokens"],
        "completions/length_max": reduce_over_processes([max(lengths)], device, maximum=True)[0],
        "completions/stopped_fraction": means["stopped"],
        "completions/truncated_fraction": 1 - means["stopped"],
    }


# ---------------------------------------------------------------------------------------------- main


def main(args: Args) -> dict:
    args = resumed_args(args, "rlvr_math")
    check_rlvr_args(args)
    device, rank, world = start_processes(args.device)
    stop = catch_stop_signals()
    verifier = Verifier(args.grading_workers, args.grading_seconds)
    patient = Verifier(args.grading_workers, 10 * args.grading_seconds)  # for gold answers, of which none is hostile
    args.subset = args.subset or ("main" if args.dataset == "openai/gsm8k" else None)

    # Data, before any model is loaded.
    columns = tuple((q, a) for a in ("answer", "solution") for q in ("prompt", "question", "problem"))
    rows = load_rows(args.dataset, args.subset, args.split, columns)
    if args.eval_dataset or args.dataset == Args.dataset:
        held_out_source = args.eval_dataset or str(TINY / "maths_test.jsonl")
        held_out = load_held_out(args, held_out_source, columns)
    elif args.evaluate_only:
        held_out_source, held_out = args.dataset, rows
    else:
        held_out_source = f"rows held out of {args.dataset}"
        rows, held_out = hold_out(rows, args)
    chosen = sorted(random.Random(0).sample(range(len(held_out)), min(len(held_out), args.eval_rows)))
    held_out = read_questions([held_out[i] for i in chosen], held_out_source, args.instruction, patient)
    rows = [] if args.evaluate_only else read_questions(rows, args.dataset, args.instruction, patient)
    patient.close()
    tokenizer = load_tokenizer(args.model)
    if args.template == "r1_zero":
        begins = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + R1_ZERO_TEMPLATE  # stays with the saved model
    context = context_length(load_config(args.model, args.trust_remote_code))
    longest = min(args.max_prompt_tokens, context - args.max_completion_tokens)
    if longest < 1:
        sys.exit(f"--max-completion-tokens {args.max_completion_tokens} fills the model's whole context of {context}.")
    questions = encode_questions(tokenizer, rows, args.dataset, longest)
    held_out = encode_questions(tokenizer, held_out, held_out_source, longest)

    # Models, optimizer, run folder.
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    policy = load_model(args, device)
    stops = stop_token_ids(tokenizer, policy)
    policy = shard(policy, world)
    reference = None
    if args.beta and not args.evaluate_only:
        reference = shard(load_model(args, device), world).requires_grad_(False)
    reranker = load_reranker(args, device, bfloat16) if args.reranker else None
    sampler = Sampler(policy, stops, torch.bfloat16 if bfloat16 else torch.float32)
    shown = {"reward/mean": "reward", "policy/entropy_generated": "entropy", "eval/accuracy": "accuracy"}
    shown |= {f"eval/maj@{args.eval_samples}": f"maj@{args.eval_samples}"} if args.eval_samples > 1 else {}
    run = Run(args, "rlvr_math", rank, {**shown, "eval/completion_length": "length"})

    def evaluate() -> tuple[dict, list[dict]]:
        sampler.sync()
        scores, found = evaluate_math(sampler, tokenizer, held_out, verifier, reranker, args, rank, world)
        return scores, evaluation_samples(found, args.eval_samples if args.evaluate_only else 1)

    if args.evaluate_only:
        run.log(0, *evaluate())
        return report_evaluation(run, len(held_out))

    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
    first = load_checkpoint(run, policy, optimizer, args.steps) if args.resume else 0
    if not args.resume:
        run.log(0, *evaluate())
        draw_scaling(run)
    elif args.save_verified and run.is_main:
        drop_rows_after(run.folder / "verified.jsonl", first)
    store = VerifiedSamples(run, args.keep_per_question) if args.save_verified else None
    shuffle = torch.Generator().manual_seed(args.seed)  # passes over all questions, as many as the steps take
    passes = math.ceil(args.steps * args.batch_size / len(questions))
    order = torch.cat([torch.randperm(len(questions), generator=shuffle) for _ in range(passes)]).tolist()
    algorithm = ALGORITHMS[args.algorithm]

    for step in range(first + 1, args.steps + 1):
        began = time.perf_counter()
        seed = args.seed * 1_000_003 + step  # detail 10
        batch = [questions[i] for i in order[(step - 1) * args.batch_size : step * args.batch_size]]
        positions = list(range(rank, len(batch), world))  # of this process's prompts in the batch
        mine = [batch[p] for p in positions]
        prompts = [question["ids"] for question in mine]

        # Sample.
        sampler.sync()
        sampling = {"num_samples": args.num_samples, "temperature": args.temperature, "seed": seed}
        groups = sampler.generate(prompts, args.max_completion_tokens, **sampling, indices=positions)
        sample_time = time.perf_counter() - began

        # Grade, and compare within each group.
        grades, rewards = judge(verifier, mine, groups, texts_of(tokenizer, mine, groups), args)
        grade_time = time.perf_counter() - began - sample_time
        rollout = Rollout(prompts, groups, device)
        action_mask = rollout.mask  # [B, T]
        group_rewards = rewards["total"]  # [P, G]
        if args.algorithm == "expert_iteration":
            group_rewards = verified(groups, rewards["answer"], args.keep_per_question)
            action_mask = action_mask * group_rewards.flatten().to(device)[:, None]  # detail 14
        if store:
            store.add(step, tokenizer, mine, groups, rewards["answer"])
        advantages = algorithm.advantage(group_rewards).flatten().to(device)  # [B]
        needs_forward = (advantages != 0).tolist() if reference is None else [True] * len(advantages)  # detail 11
        ref_logprobs = reference_logprobs(reference, rollout, args, bfloat16)  # [B, T]

        # Update.
        sums, first_sums, ratio_max, policy_losses, grad_norms = Counter(), Counter(), 0.0, [], []
        rate = learning_rate_at(step, args.steps, args)
        for epoch in range(args.update_epochs):
            shuffle = torch.Generator().manual_seed(seed * 97 + epoch)
            for chosen in torch.randperm(len(batch), generator=shuffle).view(args.minibatches, -1).tolist():
                rows = rollout.rows_of([k for k, p in enumerate(positions) if p in chosen])
                sequences = len(chosen) * args.num_samples
                tokens = reduce_over_processes([float(action_mask[rows].sum())], device)[0]
                rows = [i for i in rows if needs_forward[i]]
                total_loss = 0.0
                for part, weight in rollout.microbatches(rows, args.microbatch_tokens):
                    logprobs, entropy = rollout.token_logprobs(policy, part, args.temperature, bfloat16)  # [b, T]
                    old_logprobs, ref = rollout.old_logprobs[part], ref_logprobs[part]
                    advantage, mask = advantages[part, None], action_mask[part] * weight  # [b, 1], [b, T]
                    losses, ratio = token_losses(
                        logprobs, old_logprobs, advantage, mask, algorithm.ratio, args.clip_low, args.clip_high
                    )
                    if reference is not None:
                        losses = losses + args.beta * kl_estimate(logprobs, ref, "k3")
                    loss = mean_loss(losses, mask, algorithm.mean_over, sequences, tokens, args.max_completion_tokens)
                    (loss * world).backward()  # gradients are averaged over processes, the loss is a sum over them
                    total_loss += loss.item()
                    ratio_max = max(ratio_max, float((ratio * mask).max()))
                    statistics = policy_statistics(
                        logprobs, old_logprobs, ref if args.beta else None, entropy, ratio, advantage > 0, mask, args
                    )
                    sums.update(statistics)
                    if not grad_norms:  # before the first update policy and sampler have the same weights
                        first_sums.update(statistics)
                policy_losses.append(require_finite(run, step, total_loss, device))
                if any(p.grad is not None for p in policy.parameters()):  # where none has an advantage, none has moved
                    grad_norms.append(optimizer_step(policy, optimizer, args.max_grad_norm, rate))

        # Log, evaluate, save.
        elapsed = time.perf_counter() - began
        sums, first_sums = sum_over_processes(sums, device), sum_over_processes(first_sums, device)
        tokens = sums.pop("tokens", 0.0)
        trained = {f"policy/{name}": value / tokens for name, value in sums.items()}
        if tokens:
            trained["policy/sampler_gap"] = first_sums["sampler_gap"] / first_sums["tokens"]
            trained["policy/ratio_max"] = reduce_over_processes([ratio_max], device, maximum=True)[0]
        if algorithm.ratio == "none":
            trained.pop("policy/clip_fraction", None)
        metrics, samples = {
            **rollout_metrics(rewards, groups, device),
            **grade_metrics(grades, groups, elapsed, device),
            **trained,
            "loss/policy": sum(policy_losses) / len(policy_losses),
            "optim/grad_norm": sum(grad_norms) / max(len(grad_norms), 1),
            "optim/learning_rate": rate,
            "time/step": elapsed,
            "time/sample": sample_time,
            "time/grade": grade_time,
            "time/train": elapsed - sample_time - grade_time,
            "memory/peak_gb": peak_memory_gb(device),
        }, []  # fmt: skip
        stopping = stop_requested(stop, device)
        is_evaluated = is_due(step, args.eval_every, args.steps) and (step == args.steps or not stopping)
        if is_evaluated:
            scores, samples = evaluate()
            metrics |= scores
        run.log(step, metrics, samples)
        if is_evaluated:
            draw_scaling(run)
        if is_due(step, args.save_every, args.steps) or stopping:
            save_checkpoint(run, step, policy, optimizer)
        if stopping and step < args.steps:
            return run.finish(f"python rlvr_math.py --resume {run.folder}", stopped=stopping)

    save_model(run, policy, tokenizer, stops, bfloat16)
    if store:  # from the start again, but for a template that only the new model's tokenizer holds
        start = args.model if args.template == "chat" else run.folder / "model"
        return run.finish(f"python sft.py --model {start} --dataset {store.path}")
    if args.dataset != Args.dataset and not args.eval_dataset:  # the rows held out are of this run alone
        return run.finish(f"python rlvr_math.py --resume {run.folder} --steps {2 * args.steps}")
    data = ("dataset", "subset", "split", "eval_dataset", "instruction", "max_prompt_tokens", "max_completion_tokens")
    command = f"python rlvr_math.py --model {run.folder / 'model'} --evaluate-only{flags_given(args, *data)}"
    return run.finish(command)


def grade_metrics(grades: list[list[Grade]], groups: list[list[Completion]], elapsed: float, device) -> dict:
    """How a rollout's answers were decided, how long right and wrong completions are, and how sure the policy was of
    all of them, over all processes."""
    sums = Counter()
    for g, completion in zip((g for row in grades for g in row), (c for group in groups for c in group)):
        kind, length = ("right" if g.correct else "wrong"), len(completion.ids)
        sums.update({"all": 1, kind: 1, f"{kind}_tokens": length, g.how: 1})
        sums.update({"tokens": length, "surprise": -sum(completion.logprobs)})
    names = ("all", "right", "wrong", "right_tokens", "wrong_tokens", "tokens", "surprise")
    sums = sum_over_processes({n: sums[n] for n in (*names, "no answer", "symbolic", "timeout", "crash")}, device)
    lengths = {f"completions/length_{k}": sums[f"{k}_tokens"] / sums[k] for k in ("right", "wrong") if sums[k]}
    return {
        **lengths,
        "answers/none": sums["no answer"] / sums["all"],
        "answers/symbolic": sums["symbolic"] / sums["all"],
        "answers/timeout": (sums["timeout"] + sums["crash"]) / sums["all"],
        "policy/entropy_generated": sums["surprise"] / sums["tokens"],
        "throughput/tokens_per_second": sums["tokens"] / elapsed,
    }


def report_evaluation(run: Run, questions: int) -> dict:
    """The end of --evaluate-only: a table on the terminal, evaluation.json and scaling.png in the run's folder."""
    metrics, args = run.last, run.args
    settings = {"model": args.model, "dataset": args.eval_dataset or args.dataset, "questions": questions,
                "samples": args.eval_samples, "temperature": args.temperature, "top_p": 1.0,
                "max_completion_tokens": args.max_completion_tokens, "template": args.template,
                "reranker": args.reranker, "max_think_tokens": args.max_think_tokens,
                "extend_thinking": args.extend_thinking, "seed": args.seed}  # fmt: skip
    draw_scaling(run)
    if run.is_main:
        write_whole(run.folder / "evaluation.json", json.dumps({**settings, **metrics}, indent=2) + "\n")
        print(f"  {questions} questions, {args.eval_samples} samples each, temperature {args.temperature}, "
              f"{args.max_completion_tokens} tokens at most")  # fmt: skip
        print(f"  pass@1 {metrics['eval/accuracy']:.3f}, 95 % interval {metrics['eval/accuracy_low']:.3f} to "
              f"{metrics['eval/accuracy_high']:.3f}")  # fmt: skip
        for name in [
            name for name in metrics if not name.startswith("eval/accuracy") or name == "eval/accuracy_greedy"
        ]:
            print(f"  {name.removeprefix('eval/'):20} {metrics[name]:8.4g}")
        if args.reranker:
            print(f"  best of {args.eval_samples} is at most {best_of_n_kl_bound(args.eval_samples):.3g} nats away")
        print(f"  all of this in {run.folder / 'evaluation.json'}, completions in {run.folder / 'samples.jsonl'}, "
              f"picture in {run.folder / 'scaling.png'}")  # fmt: skip
    run.baseline = {}  # there is no before and after
    data = ("dataset", "subset", "split", "template", "instruction", "max_prompt_tokens", "max_completion_tokens")
    return run.finish(f"python rlvr_math.py --model {args.model}{flags_given(args, *data)}")


def flags_given(args, *names: str) -> str:
    """Those of the named arguments that differ from their defaults, as one writes them behind a command."""
    given = [name for name in names if getattr(args, name) != getattr(type(args), name)]
    return "".join(f" --{name.replace('_', '-')} {shlex.quote(str(getattr(args, name)))}" for name in given)


def check_rlvr_args(args: Args) -> None:
    """Refuse settings that cannot work together, before anything is loaded."""
    if args.num_samples < 2 and args.algorithm in ("rloo", "grpo", "dr_grpo"):
        sys.exit(f"--num-samples 1: {args.algorithm} compares a completion with its siblings; take at least 2.")
    counts = ("batch_size", "microbatch_tokens", "minibatches", "update_epochs", "steps", "num_samples", "eval_rows",
              "eval_samples", "grading_workers", "keep_per_question")  # fmt: skip
    for name in counts:
        if getattr(args, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1.")
    if not (0 <= args.clip_low < 1 and args.clip_high >= 0):
        sys.exit(f"--clip-low {args.clip_low} must lie in [0, 1) and --clip-high {args.clip_high} be at least 0.")
    if args.temperature <= 0:
        sys.exit("--temperature must be above 0: greedy sampling leaves nothing to compare.")
    if args.grading_seconds <= 0:
        sys.exit("--grading-seconds must be above 0: it is the time that the verifier has for a comparison.")
    if min(args.max_think_tokens, args.extend_thinking) < 0 or args.max_completion_tokens < 1:
        sys.exit("--max-think-tokens and --extend-thinking must not be negative, nor --max-completion-tokens below 1.")
    if args.evaluate_only and not args.eval_dataset and (args.eval_split or args.eval_subset):
        sys.exit("--evaluate-only evaluates on --dataset: choose with --split and --subset, or give --eval-dataset.")
    if not (args.answer_weight or args.format_weight):
        sys.exit("--answer-weight 0 --format-weight 0: nothing is left that could be rewarded.")
    if args.max_think_tokens >= args.max_completion_tokens:
        sys.exit(
            f"--max-think-tokens {args.max_think_tokens} must be below --max-completion-tokens "
            f"{args.max_completion_tokens}, or nothing is left for the answer."
        )
    if args.batch_size % args.minibatches:
        sys.exit(f"--batch-size {args.batch_size} prompts cannot be divided into --minibatches {args.minibatches}.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        sys.exit(f"--batch-size {args.batch_size} cannot be divided among {world} processes; take a multiple of it.")


# =============================================================== plumbing: the same in every script, not the algorithm


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_rows(source: str, subset: str | None, split: str, columns: tuple[tuple[str, ...], ...]) -> list[dict]:
    """The rows of a JSONL file, or of what `datasets.load_dataset` reads, each holding one of the sets of `columns`."""
    path, rows = Path(source), []
    kind = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    if kind and not path.is_file():
        sys.exit(f"{source}: no such file (looked in {Path.cwd()}).")
    if kind == "jsonl":
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # str.splitlines() would end at U+2028 too
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                sys.exit(f"{source}, line {number}: not JSON ({getattr(error, 'msg', error)}).")
    else:
        from datasets import load_dataset

        what = {"path": kind, "data_files": source, "split": "train"} if kind else {"path": source, "name": subset}
        try:
            rows = load_dataset(**{"split": split, **what}).to_list()
        except Exception as error:  # datasets raises many kinds; all of them are about what the user named
            sys.exit(f"{source}: not a file, a folder or a Hub data set that can be reached ({first_line(error)}).")
    if not rows:
        sys.exit(f"{source}: no rows in it.")
    wanted = " or ".join(" + ".join(group) for group in columns)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            sys.exit(f"{source}, row {number}: expected a JSON object, found {type(row).__name__}.")
        row = rows[number - 1] = without_nulls(row)
        if isinstance(row.get("tools"), str):
            try:
                row["tools"] = json.loads(row["tools"] or "[]")
            except ValueError:
                pass  # told below
        if not isinstance(row.get("tools", []), list):
            sys.exit(f"{source}, row {number}: tools must be a list of JSON schemas, or that list as JSON text.")
        if not any(all(row.get(c) is not None for c in group) for group in columns):
            sys.exit(f"{source}, row {number}: needs the columns {wanted}; found {', '.join(sorted(row)) or 'none'}.")
        if isinstance(row.get("answer"), (int, float)):
            row["answer"] = str(row["answer"])
        read = {name for group in columns if all(row.get(c) is not None for c in group) for name in group}
        for name in read - {"label", "labels"}:
            is_several = name == "completions" and isinstance(row[name], list)
            if not all(map(is_conversation, row[name] if is_several else [row[name]])):
                sys.exit(
                    f"{source}, row {number}: conversations must be text or lists of messages with role and content, "
                    f"both text; {name} is {str(row[name])[:60]}."
                )
    return rows


def without_nulls(value):
    """`value` without what is null in it: tables give every row, every message and every tool the fields of all. The
    content of a message stays, for templates ask whether it is null."""
    if isinstance(value, dict):
        kept = ["content"] if "role" in value else []
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None or key in kept}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def is_conversation(value) -> bool:
    """Whether `value` is text, or a list of messages; those that call tools may lack a content."""

    def is_message(m) -> bool:
        return isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content") or "", str)

    return isinstance(value, str) or isinstance(value, list) and all(map(is_message, value))


def load_held_out(args, source: str, columns: tuple[tuple[str, ...], ...]) -> list[dict]:
    """The rows of `source`: what --eval-dataset has named, or the embedded rows."""
    named = [name for name in (args.dataset if isinstance(args.dataset, tuple) else (args.dataset,)) if name]
    is_subset_of_another = source not in named and not all(Path(name).exists() for name in named)
    subset = args.eval_subset or (None if is_subset_of_another else args.subset)
    split = args.eval_split or args.split
    is_trained_on = source in named and not getattr(args, "evaluate_only", False)
    if is_trained_on and not Path(source).is_file() and (subset, split) == (args.subset, args.split):
        sys.exit(
            f"--eval-dataset {source}: these are the rows that are trained on. Name another split of it with "
            "--eval-split (test, for example), or leave --eval-dataset out, and some rows are set aside."
        )
    return load_rows(source, subset, split, columns)


def hold_out(rows: list[dict], args) -> tuple[list[dict], list[dict]]:
    """Set --eval-rows random rows aside for evaluation, but never more than a tenth."""
    if args.eval_split or args.eval_subset:
        sys.exit("--eval-split and --eval-subset speak of --eval-dataset: name it too (it may be the same data set).")
    if len(rows) < 2:
        sys.exit("One row is too few to hold any out for evaluation: give more rows, or --eval-dataset.")
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    count = max(1, min(args.eval_rows, len(rows) // 10))
    return [rows[i] for i in sorted(shuffled[count:])], [rows[i] for i in shuffled[:count]]


def start_processes(device: str) -> tuple[torch.device, int, int]:
    """The device of this process, its rank and the number of processes (more than one under torchrun)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"--device {device}: this machine or this build of PyTorch has no CUDA; use --device cpu or auto.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and world > 1 else device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        # Processes wait for one that samples, judges or grades longer than the others: ten minutes would be too few.
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return chosen, int(os.environ.get("RANK", 0)), world


def reduce_over_processes(values: list[float], device, maximum: bool = False) -> list[float]:
    """Each value summed over all processes, or its maximum."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return tensor.tolist()


def sum_over_processes(sums: dict[str, float], device) -> dict[str, float]:
    return dict(zip(sums, reduce_over_processes([float(value) for value in sums.values()], device)))


def load_config(path: str, trust_remote_code: bool, flag: str = "--model"):
    """The configuration of the model at `path`, which `flag` named, dropout switched off."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        sys.exit(f"{flag} {path}: no folder with a model, nor a Hub name that can be reached ({first_line(error)}).")
    for name in [n for n in vars(config) if "dropout" in n or n.endswith("_pdrop")]:
        setattr(config, name, 0.0)
    return config


def context_length(config) -> int:
    """How many tokens a model was made for; without end where it has no positions, as state-space models have none.

    Rotations that change with the longest text of a batch (longrope, dynamic) are held to the length at which they do
    not: beyond it, a text's log-probabilities would depend on its neighbours.
    """
    config = config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("longrope", "dynamic"):
        stated = config.rope_parameters.get("original_max_position_embeddings")
        return stated or getattr(config, "original_max_position_embeddings", None) or longest
    return longest


def load_model(args, device, from_scratch: bool = False):
    """The model that `args` names in float32, its attention decided by each batch's layout."""
    transformers_logging.disable_progress_bar()
    config = load_config(args.model, args.trust_remote_code)
    options = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code}
    torch.manual_seed(args.seed)
    try:
        if from_scratch:
            model = AutoModelForCausalLM.from_config(config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(args.model, config=config, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"--model {args.model}: no causal language model could be loaded from there ({first_line(error)}).")
    use_layout(model.to(device).eval())
    if not has_known_logits(model):
        sys.exit(
            f"--model {args.model}: {type(model).__name__} makes its logits in a way that common/kl.py does not know, "
            "so its log-probabilities would be wrong. Mend `logit_shape` there, or take another model."
        )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train(args.gradient_checkpointing)


def shard(model, world: int):
    """FSDP2: spread parameters, gradients and optimizer state over the processes, layer by layer. Weights are gathered
    in float32 and autocast rounds them, as in one process: what processes change is the order of sums.

    Without --gradient-checkpointing each process keeps what autocast has rounded, a bfloat16 copy of all weights, from
    the forward to the backward.
    """
    if world > 1:
        for module in [m for m in model.modules() if type(m).__name__ in set(model._no_split_modules or [])]:
            fully_shard(module)
        fully_shard(model)
        model.sharded_token_logprobs = partial(local_token_logprobs, model)
        register_fsdp_forward_method(model, "sharded_token_logprobs")
    return model


def optimizer_step(model, optimizer, max_norm: float, rate: float) -> float:
    """Clip the gradients' global norm, step at learning rate `rate`, clear them; returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(norm):  # which clipping turns into weights that are no numbers
        sys.exit(
            f"The gradient's norm is {norm}, though the loss is finite: the run has diverged and stops before its "
            "weights are harmed. Lower --learning-rate. If it has a checkpoint, --resume goes on from there."
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def learning_rate_at(step: int, steps: int, args) -> float:
    """Linear warm-up, then constant, linear or cosine decay that reaches zero after the last step."""
    if step <= args.warmup_steps:
        return args.learning_rate * step / args.warmup_steps
    left = (steps - step + 1) / max(1, steps - args.warmup_steps)
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return args.learning_rate * shape[args.lr_schedule]


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether `step` is one of those `every` so many steps (0: none), or the last."""
    return step == steps or (every > 0 and step % every == 0)


def peak_memory_gb(device) -> float:
    """Most memory this process has held so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def catch_stop_signals() -> list[int]:
    """A list into which Ctrl-C and SIGTERM put their number; the loop looks at it after each step."""
    caught: list[int] = []

    def handle(number, frame):
        if caught:  # a second one means now
            sys.exit(128 + number)
        caught.append(number)
        print(f"\n{signal.Signals(number).name}: finishing this step, then writing a checkpoint …", file=sys.stderr)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handle)
        signal.signal(signal.SIGTERM, handle)
    return caught


def stop_requested(caught: list[int], device) -> int:
    """The number of the signal that any process has caught, or 0."""
    return int(reduce_over_processes([max(caught, default=0)], device, maximum=True)[0])


def resumed_args(args, script: str):
    """With --resume, the arguments of that run; only its length and its logging may be given anew."""
    if not args.resume:
        return args
    folder = Path(args.resume).resolve()
    if not (folder / "args.json").is_file():
        sys.exit(f"--resume {args.resume}: no run there (a run's folder holds an args.json).")
    stored = json.loads((folder / "args.json").read_text())
    if stored.pop("script") != script:
        sys.exit(f"--resume {args.resume}: that run was made by another script than {script}.py.")
    free = {"steps", "epochs", "eval_every", "save_every", "log_samples", "wandb_project", "resume", "output_dir"}
    for field in fields(args):
        given, kept = getattr(args, field.name), stored.get(field.name, field.default)
        kept = tuple(kept) if isinstance(kept, list) else kept
        if given == field.default:
            setattr(args, field.name, kept)
        elif given != kept and field.name not in free:
            flag = "--" + field.name.replace("_", "-")
            sys.exit(f"{flag} cannot be changed with --resume (the run has {kept}); start a new run for that.")
    args.resume = args.output_dir = str(folder)
    return args


class Run:
    """The output folder of a run, and what the terminal shows of it: `shown` maps metrics to column titles."""

    def __init__(self, args, script: str, rank: int, shown: dict[str, str]):
        self.args, self.is_main, self.shown = args, rank == 0, shown
        self.baseline, self.last = {}, {}  # the metrics logged first, and the latest of each
        self.carried = {}  # what the next step takes from the last one beyond weights and metrics, as JSON
        stamp = [f"{datetime.now():%Y-%m-%d_%H%M%S}"]
        if dist.is_initialized():
            dist.broadcast_object_list(stamp)
        self.folder = Path(args.output_dir or f"runs/{script}/{stamp[0]}")
        if (self.folder / "args.json").exists() and not (args.resume or args.overwrite):
            sys.exit(
                f"{self.folder} already holds a run. Continue it with --resume {self.folder}, replace it with "
                "--overwrite, or choose another --output-dir."
            )
        if dist.is_initialized():
            dist.barrier()
        if not self.is_main:
            return
        if (self.folder / "args.json").exists() and not args.resume:
            # args.json, by which a run is known, goes last, so that a kill leaves nothing that looks empty.
            for path in sorted(self.folder.iterdir(), key=lambda path: path.name == "args.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "args.json", json.dumps({"script": script, **asdict(args)}, indent=2) + "\n")
        if not args.output_dir:
            link = self.folder.parent / "latest"
            link.unlink(missing_ok=True)
            link.symlink_to(self.folder.name)
        if args.wandb_project:
            import wandb

            wandb.init(project=args.wandb_project, name=self.folder.name, config=asdict(args), sync_tensorboard=True)
        self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        self.bar = tqdm(desc=script, unit="step", disable=None, leave=False)
        self.bar.write("  step  " + "  ".join(f"{title:>14}" for title in shown.values()))

    def log(self, step: int, metrics: dict, samples: list[dict] = ()) -> None:
        """One row in metrics.jsonl, TensorBoard and (now and then) the terminal; with samples, new curves as well."""
        self.last |= metrics
        self.baseline = self.baseline or metrics
        if not self.is_main:
            return
        append_rows(self.folder / "metrics.jsonl", [{"step": step, **metrics}])
        append_rows(self.folder / "samples.jsonl", [{"step": step, **sample} for sample in samples])
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.bar.update(step - self.bar.n)
        is_evaluation = any(name.startswith("eval/") for name in metrics)
        if step % 10 == 0 or is_evaluation:
            cells = [f"{metrics[name]:14.4g}" if name in metrics else " " * 14 for name in self.shown]
            self.bar.write(f"{step:6d}  " + "  ".join(cells))
        for sample in samples[:: max(1, len(samples) // max(1, self.args.log_samples))][: self.args.log_samples]:
            text = " ⏎ ".join(sample["completion"].split("\n"))
            self.bar.write(f"        reward {sample['reward']:.2f}  {sample['prompt'][-60:]!r} → {text[:160]}")
        if is_evaluation:
            self.writer.flush()
        if is_evaluation and step:  # one point makes no curve
            draw_curves(self.folder, self.shown)

    def finish(self, next_command: str, stopped: int = 0) -> dict:
        """Close the run: what changed, where the model lies, what to run next. Returns the last metrics."""
        if self.is_main:
            self.bar.close()
            self.writer.close()
            if not stopped:
                for name in self.baseline:
                    print(f"  {name:26} {self.baseline[name]:8.4g} → {self.last[name]:.4g}")
                if (self.folder / "model").exists():
                    print(f"  model in {self.folder / 'model'}, curves in {self.folder / 'curves.png'}")
            print(f"  next: {next_command}")
        if dist.is_initialized():
            time.sleep(0.5)  # Gloo's threads drop their last tensors, which aborts them once the interpreter is ending
            dist.destroy_process_group()
        if stopped:
            sys.exit(128 + stopped)
        return self.last


def require_finite(run: Run, step: int, loss: float, device) -> float:
    """The loss summed over all processes, which must be a number."""
    loss = reduce_over_processes([loss], device)[0]
    if not math.isfinite(loss):
        sys.exit(
            f"The loss is {loss} at step {step}: the run has diverged and stops before its weights are harmed. Lower "
            f"--learning-rate or --max-grad-norm. Last good checkpoint: {newest_checkpoint(run.folder)}."
        )
    return loss


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and put it there, so that a kill never leaves half of it."""
    part = path.with_name(f".writing-{path.name}")
    part.write_text(text)
    part.replace(path)


def append_rows(path: Path, rows: list[dict]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def draw_curves(folder: Path, shown: dict[str, str]) -> None:
    """curves.png: one panel for each metric that the terminal shows."""
    from matplotlib.figure import Figure  # pyplot, and a layout found by drawing twice, would cost three times as much

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    width = 3.6 * len(shown)
    figure = Figure(figsize=(width, 2.8))
    axes = figure.subplots(1, len(shown), squeeze=False)
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.15 / width, bottom=0.17, top=0.89, wspace=0.25)
    for axis, (name, title) in zip(axes[0], shown.items()):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o" if len(points) < 15 else None, ms=3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)


def fingerprint(model) -> str:
    """Names and shapes of a model's parameters, by which a checkpoint knows whether it fits."""
    return hashlib.sha256(repr([(n, tuple(p.shape)) for n, p in model.named_parameters()]).encode()).hexdigest()[:16]


def newest_checkpoint(folder: Path) -> Path | None:
    return max((folder / "checkpoints").glob("step-*"), default=None)


def has_saved_model(run: Run, checkpoint: Path) -> bool:
    """Whether the model of a run's last checkpoint has been saved too, or a kill came in between."""
    model = run.folder / "model"
    return model.exists() and model.stat().st_mtime >= checkpoint.stat().st_mtime


def save_checkpoint(run: Run, step: int, model, optimizer) -> None:
    """Write what --resume needs under a temporary name and rename it, so that no broken checkpoint is ever newest.

    Data order, noise and samples are functions of seed and step; what a script has beyond that is in `run.carried`.
    """
    final = run.folder / "checkpoints" / f"step-{step:06d}"
    temporary = final.with_name(f".writing-{final.name}")
    try:
        if run.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
        unused = [o for o in optimizers if not o.state]
        weights, moments = sharded.get_state_dict(model, optimizer)
        for state in [state for o in unused for state in o.state.values()]:
            state["step"].zero_()  # to have moments at all PyTorch has made a step, which must not count
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a single process is told that it is one
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary)
        if run.is_main:
            about = {"step": step, "model": fingerprint(model)}
            about |= {"baseline": run.baseline, "last": run.last, "carried": run.carried}
            (temporary / "state.json").write_text(json.dumps(about))
            temporary.rename(final)
    except (OSError, dcp.api.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reasons = getattr(error, "failures", None) or {0: (error, None)}  # what each process met
        reason, kept = first_line(next(iter(reasons.values()))[0]), newest_checkpoint(run.folder)
        sys.exit(f"The checkpoint of step {step} could not be written ({reason}). The last one is {kept}.")


def load_checkpoint(run: Run, model, optimizer, steps: int) -> int:
    """Restore the newest checkpoint of a run, drop what was logged after it, and return its step."""
    newest = newest_checkpoint(run.folder)
    if newest is None:
        sys.exit(f"--resume {run.folder}: the run ended before its first checkpoint; start it again with --overwrite.")
    about = json.loads((newest / "state.json").read_text())
    if about["model"] != fingerprint(model):
        sys.exit(f"--resume {run.folder}: {newest.name} is of another model than the one at {run.args.model}.")
    if about["step"] >= steps and has_saved_model(run, newest):
        sys.exit(f"{run.folder} has already done its {steps} steps; to go on, give more of them.")
    weights, moments = sharded.get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Parts of a model that no text passes through have no moments.
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=newest, planner=planner)
    sharded.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    run.baseline, run.last, run.carried = about["baseline"], about["last"], about["carried"]
    if run.is_main:
        drop_rows_after(run.folder / "metrics.jsonl", about["step"])
        drop_rows_after(run.folder / "samples.jsonl", about["step"])
    return about["step"]


def drop_rows_after(path: Path, step: int) -> None:
    """Take out of a JSONL file what was logged after `step`, and a last line that a kill has torn."""
    whole = path.read_text().split("\n")[:-1]
    write_whole(path, "".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))


def save_model(run: Run, model, tokenizer, stops: list[int], bfloat16: bool) -> None:
    """model/: weights, tokenizer, chat template, and a generation config with the stop tokens that were trained."""
    options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = sharded.get_model_state_dict(model, options=options)
    if run.is_main:
        model.config.dtype = torch.bfloat16 if bfloat16 else torch.float32
        model.generation_config.eos_token_id = stops
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
        weights = {
            name: value.to(model.config.dtype) if value.is_floating_point() else value
            for name, value in state.items() if name not in tied
        }  # fmt: skip
        part = run.folder / ".writing-model"
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, state_dict=weights)
        tokenizer.save_pretrained(part)
        shutil.rmtree(run.folder / "model", ignore_errors=True)
        part.rename(run.folder / "model")


def tell_of_a_full_disk(error: Exception) -> None:
    """End with a sentence if that is what the error is about."""
    if re.search("No space left|quota exceeded|too large|Read-only file system", str(error)):
        sys.exit(
            f"Writing failed ({first_line(error)}). What checkpoints the run has are whole: make room, and go on with "
            "--resume, or with --overwrite if it has none yet."
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (OSError, SafetensorError) as error:
        tell_of_a_full_disk(error)
        raise
