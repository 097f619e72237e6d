"""Agentic RL: the unit of optimisation moves from the response to the trajectory.

The model acts, observes, acts again: it writes tool calls, reads what the tools answer, and is rewarded for what comes
of it in the end. Signal: whether the final answer is right. Optimizer: a clipped policy gradient with the group of
trajectories of one task as its own baseline, on the tokens the model wrote and on no others. Leash: KL to the starting
model, in the loss. Defence against reward hacking: the answer is checked by a program and counts only outside calls and
reasoning; tools touch nothing but their own sandbox; held-out accuracy is measured again with the tools withheld.

    τ = (prompt, action₁, observation₁, action₂, …, answer),    a_t = 1 where the model wrote token t
    credit trajectory:  A_i = (R(τ_i) − mean R) / std R                     over the G trajectories of a task
    credit turn:        A_ik = (R_ik − mean R_·k) / std R_·k,   R_ik = Σ_{j≥k} r_ij     over those that have a turn k
    loss = mean over i of  Σ_t a_t·[ −min(ρ_t·A, clip(ρ_t, 1−ε_low, 1+ε_high)·A) + β·k3_t ] / Σ_t a_t,   ρ_t = π / π_old

Papers: Search-R1 (arXiv:2503.09516), ReTool (arXiv:2504.11536), GRPO (DeepSeekMath, arXiv:2402.03300), turn-level
credit (arXiv:2505.11821), GSPO (arXiv:2507.18071). Calls are written as Hermes and Qwen write them.

    python agentic.py                                                                # laptop, embedded model, 1 minute
    python agentic.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k --subset main --tools python \
        --learning-rate 1e-6 --max-completion-tokens 512 --max-trajectory-tokens 2048             # one GPU
    torchrun --nproc-per-node 8 agentic.py --model Qwen/Qwen2.5-3B-Instruct --dataset questions.jsonl \
        --corpus documents.jsonl --tools search …                                                 # several GPUs

What to look at: `eval/accuracy` rises with `eval/tool_use_rate`, while `eval/accuracy_without_tools` stays where it
was: what has been learned is the use of the tools. `agent/invalid_call_rate` should fall to near zero within a few
steps; where it does not, look which of the error counters beside it is high. `agent/turns` at its limit or
`agent/token_limit` above a few per cent mean that a limit binds. `policy/sampler_gap` should be below 1e-5 in float32
and a few hundredths at most in bfloat16. transcripts/ shows trajectories token by token, with what was trained.

Implementation details that matter, each marked in the code under its number:
 1. A group whose rewards are all equal gets advantages of exactly zero, not rounding noise divided by a tiny std.
 2. Token ids, mask and log-probabilities grow together, turn by turn; nothing sampled is decoded and tokenised again.
 3. Logits are divided by the sampling temperature in every forward, of the policy and of the reference.
 4. The end-of-turn token is an action. Observations, role headers and newlines of the template are not: they are read
    and never scored, so they enter no loss, KL, entropy, statistic or denominator.
 5. The minimum of clipped and unclipped objective bounds the gain for both signs of the advantage.
 6. Losses are divided by counts of the whole optimizer step's actions, so microbatch size and processes change nothing.
 7. KL is estimated per token at the policy's own samples, with the gradient of common/kl.py's table; beta 0 loads no
    reference.
 8. GSPO's ratio is the geometric mean over the trajectory's actions, clipped once per trajectory.
 9. The G trajectories of a task share the forward and backward of its prompt.
10. All randomness is a function of seed, step and turn, so a resumed run repeats the uninterrupted one bit for bit.
11. Observations are tokenised fresh, cannot forge special tokens, and are cut inside their closing tag.
12. An observation that would overflow the trajectory's budget is taken back, and the trajectory ends without an answer.
13. Turns are compared with turns of the same number only, by what was earned from there on.
14. Only the last turn answers, behind its reasoning, and only where it ended by itself and calls nothing.
15. Whatever goes wrong in a call is an observation that the model can learn from, and a counter; never a crash.
16. Text of the model reaches no parser but JSON's and ast's: search terms are quoted, code runs in a process without
    rights.
17. While one cohort of trajectories waits for its tools the others sample. Who is sampled together is fixed beforehand,
    so that no clock can change a result (where what is kept of earlier turns finds room in the sampler's memory).
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import json
import math
import operator
import os
import queue
import re
import resource
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from fractions import Fraction
from functools import partial
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
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import get_json_schema
from transformers.utils import logging as transformers_logging

from common.generation import Completion, Sampler
from common.kl import has_known_logits, kl_estimate, local_token_logprobs, token_logprobs, use_layout
from common.tokenizer import (
    as_messages,
    encode_between_turns,
    encode_text,
    end_of_turn,
    knows_tools,
    load_tokenizer,
    pack_completions,
    pad_rows,
    render_chat,
    require_kept_history,
    split_by_tokens,
    stop_token_ids,
)

TINY = Path(__file__).resolve().parent / "common" / "tiny"


@dataclass
class Args:
    # model and data
    model: str = str(TINY)
    """folder or Hub name of a causal language model"""
    dataset: str = str(TINY / "tools_train.jsonl")
    """file, folder or Hub name; rows hold prompt or question, and the answer that is right"""
    subset: str | None = None
    """configuration of a Hub data set, such as `main` of openai/gsm8k"""
    split: str = "train"
    """split of a Hub data set"""
    eval_dataset: str | None = None
    """held-out rows; by default the embedded data's own, or else rows held out of --dataset"""
    eval_subset: str | None = None
    """configuration of --eval-dataset on the Hub (default: that of --subset, unless that is another Hub data set's)"""
    eval_split: str | None = None
    """split of --eval-dataset on the Hub (default: that of --split)"""
    instruction: str = ""
    """added to every question, such as: End with <answer>…</answer>."""
    max_prompt_tokens: int = 512
    """rows with a longer prompt, tools included, are dropped"""
    max_completion_tokens: int = 96
    """budget of one turn; 96 suits the embedded model, 256 and more a real one"""
    trust_remote_code: bool = False
    """run code that comes with the model"""

    # tools and limits
    tools: tuple[Literal["calculator", "search", "python"], ...] = ("calculator", "search")
    """what the agent may call"""
    corpus: str = str(TINY / "corpus.jsonl")
    """documents for `search`: rows with text, and title if they have one"""
    search_results: int = 3
    """documents that a search returns at most"""
    tool_seconds: float = 5.0
    """of a call; code of the `python` tool is killed then, another tool given up when all else has been done"""
    python_memory_mb: int = 512
    """address space of the `python` tool"""
    max_turns: int = 3
    """turns of the model in a trajectory; calls of the last one are not made"""
    max_calls: int = 4
    """calls in one turn"""
    max_observation_tokens: int = 128
    """an observation is cut after these"""
    max_trajectory_tokens: int = 320
    """budget of a trajectory behind its prompt, observations included"""
    cohorts: int = 2
    """parts of a batch that take turns in sampling, so that one samples while another waits for its tools"""

    # algorithm
    credit: Literal["trajectory", "turn"] = "trajectory"
    """one advantage for all of a trajectory's actions, or one for each of its turns"""
    call_cost: float = 0.0
    """taken from the reward for every call"""
    error_cost: float = 0.0
    """and, beyond that, for every call that ended in an error"""
    num_samples: int = 8
    """trajectories per task (G)"""
    temperature: float = 0.7
    """of sampling, and of every log-probability in training; below 1, for one slip in a hundred tokens spoils a call"""
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """baseline of the group: mean and std (GRPO), mean only (Dr. GRPO), mean of the others (RLOO)"""
    loss_aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """mean over a trajectory's actions and then trajectories (GRPO), over all actions (DAPO), or sum over a constant
    length (Dr. GRPO)"""
    ratio: Literal["token", "sequence"] = "token"
    """importance ratio of each token, or one per trajectory (GSPO: take --clip-low 3e-4 --clip-high 4e-4)"""
    clip_low: float = 0.2
    """ratios are clipped below 1 − clip_low"""
    clip_high: float = 0.2
    """and above 1 + clip_high; 0.28 is DAPO's clip-higher"""
    beta: float = 0.001
    """weight of the KL to the starting model in the loss (Search-R1's); 0 loads no reference"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """GRPO takes k3; as a loss k1 has no gradient in expectation and only k2 has that of KL(π‖ref)"""
    update_epochs: int = 1
    """passes over each rollout"""
    minibatches: int = 1
    """optimizer steps per pass; more than one, or more passes, make clipping matter"""

    # optimisation
    steps: int = 30
    """rollouts; each brings update_epochs × minibatches optimizer steps"""
    batch_size: int = 16
    """tasks per rollout over all processes"""
    microbatch_tokens: int = 4096
    """tokens per forward and backward: a memory knob that does not change the result"""
    learning_rate: float = 6e-4
    """peak; 6e-4 suits the embedded model, 1e-6 a pretrained one"""
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

    # evaluation and output
    eval_every: int = 10
    """steps between evaluations; 0 evaluates before and after only"""
    eval_rows: int = 60
    """held-out tasks used"""
    eval_samples: int = 8
    """trajectories sampled per task in evaluation"""
    output_dir: str | None = None
    """default: runs/agentic/<date>_<time>"""
    overwrite: bool = False
    """replace the run that --output-dir holds"""
    resume: str | None = None
    """continue the run in this folder with its own arguments; only its steps and logging may be changed"""
    save_every: int = 0
    """steps between checkpoints; 0 writes one at the end only"""
    log_samples: int = 3
    """completions shown per evaluation, the first of them with its transcript"""
    wandb_project: str | None = None
    """also log to Weights & Biases"""


# ---------------------------------------------------------------------------------------------- environments: edit here


class Environment:
    """What an agent lives in. Every trajectory has an instance of its own, which may hold a state; `reset` is given the
    row and returns the messages to begin with (the same each time: whatever chance it needs comes from the row),
    `tools` are functions with type hints and a docstring, `reward` judges the end. That is all that one's own needs:

        class HigherLower(Environment):
            def reset(self, row):
                self.secret, self.tools = int(row["answer"]), [self.compare]
                return as_messages("Which number from 1 to 100 do I think of?", "user")

            def compare(self, number: int) -> str:
                \"\"\"Compare a number with the secret one.

                Args:
                    number: The guess.
                \"\"\"
                return "equal" if number == self.secret else "higher" if self.secret > number else "lower"

            def reward(self, trajectory):
                return float(trajectory.answer is not None and str(self.secret) in trajectory.answer)

    and `main(tyro.cli(Args), HigherLower)` trains in it. `columns` are the sets of columns of which rows need one.
    """

    columns = (("prompt", "answer"), ("question", "answer"))

    def __init__(self, tools: list[Callable], args: Args):
        self.tools, self.args = list(tools), args

    def reset(self, row: dict) -> list[dict]:
        raise NotImplementedError

    def reward(self, trajectory: Trajectory) -> float:
        """What the trajectory is worth in the end, such as 1 for a right answer."""
        raise NotImplementedError

    def turn_reward(self, turn: Turn) -> float:
        """What a turn is worth by itself: here, what its calls cost."""
        errors = sum(call.error is not None for call in turn.calls)
        return -self.args.call_cost * len(turn.calls) - self.args.error_cost * errors


class ToolQuestions(Environment):
    """Questions with one right answer, to be found with whatever tools --tools names."""

    def reset(self, row: dict) -> list[dict]:
        self.gold = row["answer"]
        messages = as_messages(row["prompt"] if row.get("prompt") is not None else row["question"], "user")
        if self.args.instruction and messages:
            asked = messages[-1].get("content") or ""
            messages[-1] = {**messages[-1], "content": f"{asked}\n\n{self.args.instruction}"}
        return messages

    def reward(self, trajectory: Trajectory) -> float:
        return float(trajectory.answer is not None and is_right(trajectory.answer, self.gold))


def is_right(text: str, gold: str) -> bool:
    """Whether the answer a text states is `gold`: as numbers where that is one, and otherwise much as SQuAD and
    Search-R1 compare texts, without regard to case, punctuation (but for that of numbers), articles and spacing."""

    def normal(answer: str) -> list[str]:
        words = re.findall(r"-?\d[\d.,/:]*\d|-?\d|[^\W\d_]+", answer.lower())
        words = [word.replace(",", "") for word in words if word not in ("a", "an", "the")]
        return words or [answer.strip().lower()]

    gold, answer = gold.rpartition("####")[2].strip(), extract_answer(text)
    if re.fullmatch(r"[-+$]*[\d,]*\.?\d+", gold):
        return is_correct(text, gold)
    return answer is not None and normal(answer) == normal(gold)


def extract_answer(text: str) -> str | None:
    """The final answer a text states: in the last <answer> tag, the last \\boxed{}, after the last ####, or else its
    last number. Reasoning before </think> does not count."""
    text = text.rpartition("</think>")[2]
    for pattern in (r"<answer>(.*?)</answer>", r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", r"####\s*(.+)"):
        if found := re.findall(pattern, text, re.DOTALL if "answer" in pattern else 0):
            return found[-1].strip()
    numbers = re.findall(r"-?\$?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1] if numbers else None


def is_correct(text: str, gold: str) -> bool:
    """Whether the answer a text states equals `gold` as a number (1,234.0 = 1234), or as text where it is none."""

    def normal(answer: str):
        plain = answer.replace(",", "").replace("$", "").strip().rstrip(".").strip()
        try:
            return float(plain)
        except ValueError:
            return plain.lower()

    answer, reference = extract_answer(text), extract_answer(gold) if "####" in gold else gold
    return answer is not None and reference is not None and normal(answer) == normal(reference)


# ---------------------------------------------------------------------------------------------- the mathematics


def group_advantages(rewards: torch.Tensor, kind: str) -> torch.Tensor:
    """How much better each completion is than its siblings. rewards [P, G] of P prompts; returns [P, G].

    grpo: (r − mean)/std with the unbiased std; dr_grpo: r − mean; rloo: r − mean of the other G − 1.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if kind == "grpo":
        advantages = centred / (rewards.std(1, keepdim=True) + 1e-6)
    elif kind == "rloo":
        advantages = centred * rewards.shape[1] / (rewards.shape[1] - 1)
    else:
        advantages = centred
    all_equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return advantages.masked_fill(all_equal, 0.0)  # detail 1


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
    ratio: str = "token",
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate; all are [B, T], advantages [B, T] or [B, 1]. Returns loss and ratio, [B, T]."""
    log_ratio = (logprobs - old_logprobs) * mask
    if ratio == "sequence":  # detail 8
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logprobs)
    rho = log_ratio.exp()
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(rho * advantages, clipped * advantages)  # detail 5
    return -gain, rho.detach()


def aggregate(
    losses: torch.Tensor, mask: torch.Tensor, how: str, sequences: float, tokens: float, max_tokens: int
) -> torch.Tensor:
    """One number from token losses [B, T]; `sequences` and `tokens` count the whole optimizer step.  # detail 6

    sequence: (1/N) Σ_i (1/T_i) Σ_t; token: Σ_i Σ_t / Σ_i T_i; constant: Σ_i Σ_t / (N · max_tokens).
    """
    if how == "sequence":
        return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences
    return (losses * mask).sum() / (tokens if how == "token" else sequences * max_tokens)


def turn_advantages(rewards: torch.Tensor, exists: torch.Tensor, kind: str) -> torch.Tensor:
    """How much better each turn was than its siblings' turns of the same number.  # detail 13

    rewards [P, G, K] of P tasks, G trajectories and up to K turns, exists [P, G, K]; returns [P, G, K]. A turn is worth
    what was earned in it and later. One that no sibling has reached gets 0.
    """
    returns = (rewards * exists).flip(-1).cumsum(-1).flip(-1)
    advantages = torch.zeros_like(returns)
    for p, k in exists.any(1).nonzero().tolist():
        members = exists[p, :, k]
        if members.sum() > 1:
            advantages[p, members, k] = group_advantages(returns[p, members, k][None], kind)[0]
    return advantages


def assign_credit(
    outcome: torch.Tensor, turn_rewards: torch.Tensor, exists: torch.Tensor, credit: str, kind: str
) -> torch.Tensor:
    """The advantage of every turn: that of its whole trajectory, or one of its own.

    outcome [P, G] is what trajectories earned in the end, turn_rewards [P, G, K] what their turns earned by themselves,
    exists [P, G, K] whether there is such a turn; returns [P, G, K].
    """
    if credit == "trajectory":
        return group_advantages(outcome + turn_rewards.sum(-1), kind)[..., None].expand_as(turn_rewards)
    is_last = exists & (exists.cumsum(-1) == exists.sum(-1, keepdim=True))  # in which the outcome is earned
    return turn_advantages(turn_rewards + outcome[..., None] * is_last, exists, kind)


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


# ---------------------------------------------------------------------------------------------- tools: edit here


class Tool(NamedTuple):
    function: Callable
    schema: dict  # {"type": "function", "function": {"name", "description", "parameters"}}


SCHEMAS: dict = {}  # by the code of the function: every trajectory asks anew, and a method is another object in each


def toolset(functions: list[Callable]) -> dict[str, Tool]:
    """Tools by their names; exits with a sentence where a function does not say what it takes."""
    tools = {}
    for function in functions:
        code, name = getattr(function, "__code__", function), getattr(function, "__name__", repr(function))
        if code not in SCHEMAS:
            try:
                SCHEMAS[code] = get_json_schema(function)
            except Exception as error:  # of many kinds, all of them about how the function is written
                sys.exit(
                    f"Tool {name}: the model cannot be told how to call it ({first_line(error)}). Give every argument "
                    "a type hint, and the function a docstring that describes each of them under `Args:`."
                )
        if name in tools:
            sys.exit(f"Tool {name}: two tools have this name.")
        tools[name] = Tool(function, SCHEMAS[code])
    return tools


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, such as 12*(3+4).
    """
    if len(expression) > 200:
        raise ValueError(f"the expression has {len(expression)} characters; at most 200 are read")
    plain = expression.translate({ord("×"): "*", ord("÷"): "/", ord("−"): "-", ord("^"): "**"})
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", plain)  # thousands
    if not re.fullmatch(r"[0-9eE.+*/%() \n-]*", plain):
        raise ValueError("only numbers and + - * / // % ** ( ) can be computed")
    try:
        value = evaluate(ast.parse(plain.strip(), mode="eval").body)
        return str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"
    except OverflowError:
        raise ValueError("the result is too large") from None
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("this is not an arithmetic expression") from None


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}  # fmt: skip
MAX_BITS = 4096  # of a numerator or denominator


def evaluate(node: ast.AST) -> Fraction:
    """The exact value of a syntax tree of numbers and operators; raises ValueError at anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and math.isfinite(node.value):
        value = Fraction(str(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = evaluate(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = evaluate(node.left), evaluate(node.right)
        if isinstance(node.op, ast.Pow):
            bits = max(left.numerator.bit_length(), left.denominator.bit_length())
            if abs(right) > MAX_BITS or bits * abs(right) > MAX_BITS and abs(left) != 1:
                raise ValueError("the result is too large")
            if right.denominator != 1:  # a root
                if left < 0:
                    raise ValueError("a negative number has no real root")
                left, right = float(left), float(right)
        try:
            value = Fraction(OPERATORS[type(node.op)](left, right))
        except ZeroDivisionError:
            raise ValueError("division by zero") from None
    else:
        raise ValueError("only numbers and + - * / // % ** ( ) can be computed")
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("the result is too large")
    return value


class Corpus:
    """Documents in SQLite's full-text index FTS5, ranked by BM25. Built once, then only read, by any number of threads.

    path: what --corpus names; rows with `text` and, if they have one, `title`. The index is a temporary file.
    """

    def __init__(self, path: str, results: int):
        documents = Counter()
        for number, row in enumerate(load_rows(path, None, "train", (("text",),)), 1):
            title, text = row.get("title") or "", row["text"]
            if not isinstance(title, str) or not isinstance(text, str):
                sys.exit(f"{path}, row {number}: title and text of a document must be text.")
            documents[title.strip(), text.strip()] += 1
        empty = sum(count for (_, text), count in documents.items() if not text)
        kept = [document for document in documents if document[1]]
        total = documents.total()
        for count, what in ((empty, "are empty"), (total - empty - len(kept), "stand there twice")):
            if count:
                print(f"{path}: {count} of {total} documents {what}; they are left out.")
        if not kept:
            sys.exit(f"{path}: no document with any text is left of {total}.")
        self.results, self.local = results, threading.local()
        self.folder = tempfile.TemporaryDirectory(prefix="corpus-")
        self.file = Path(self.folder.name, "index.sqlite")
        with contextlib.closing(sqlite3.connect(self.file)) as index, index:
            try:
                index.execute("CREATE VIRTUAL TABLE documents USING fts5(title, text, tokenize='porter unicode61')")
            except sqlite3.OperationalError as error:
                sys.exit(
                    f"--tools search needs SQLite with its full-text index FTS5, which this Python lacks ({error}). "
                    "Use a Python from python.org, conda or a Linux distribution, or leave search out of --tools."
                )
            rows = [(utf8(title), utf8(text)) for title, text in kept]
            index.executemany("INSERT INTO documents VALUES (?, ?)", rows)

    def search(self, query: str) -> str:
        """Search the documents.

        Args:
            query: The words to look for.
        """
        terms = list(dict.fromkeys(re.findall(r"\w+", utf8(query))))[:32]
        if not terms:
            raise ValueError("the query holds no word")
        # Quoted, a term is a term to the query parser whatever it holds.  # detail 16
        wanted = " OR ".join(f'"{term}"' for term in terms)
        if not hasattr(self.local, "index"):  # a connection belongs to its thread
            self.local.index = sqlite3.connect(f"{self.file.as_uri()}?mode=ro", uri=True)
        found = self.local.index.execute(
            "SELECT title, text FROM documents WHERE documents MATCH ? ORDER BY rank, rowid LIMIT ?",
            (wanted, self.results),
        ).fetchall()
        passages = [text if re.match(rf"{re.escape(title)}\b", text) or not title else f"{title}: {text}"
                    for title, text in found]  # fmt: skip
        return "\n".join(passages) or "nothing found"


def utf8(text: str) -> str:
    """Text without what UTF-8 cannot hold: half a surrogate pair, as JSON lets a model write."""
    return text.encode("utf-8", "ignore").decode()


def build_tools(args: Args) -> list[Callable]:
    """The functions that --tools names, with what they share."""
    tools: list[Callable] = []
    for name in args.tools:
        if name == "calculator":
            tools.append(calculator)
        elif name == "search":
            tools.append(Corpus(args.corpus, args.search_results).search)
        else:
            sandbox = Sandbox(args.tool_seconds, args.python_memory_mb)
            if sandbox.gaps:
                print(f"notice: the sandbox of the python tool does not contain here: {', '.join(sandbox.gaps)}.")
            tools.append(sandbox.python)
    return tools


# ---------------------------------------------------------------------------------------------- calls


ERRORS = ("bad_json", "unknown_tool", "bad_arguments", "over_limit", "timed_out", "failed")


@dataclass
class Call:
    """A tool call as the model wrote it, and what came of it."""

    name: str
    arguments: dict
    observation: str = ""
    error: str | None = None  # one of ERRORS

    def fail(self, kind: str, why: str) -> Call:
        self.error, self.observation = kind, utf8(f"error: {why}")
        return self


def parse_calls(text: str) -> list[Call]:
    """The calls in a turn, in the form of Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any
    number of them. What stands in reasoning, before </think>, calls nothing."""
    opening, closing, calls = "<tool_call>", re.compile(r"\s*</tool_call>"), []
    at = len(text) - len(text.rpartition("</think>")[2])
    while (start := text.find(opening, at)) >= 0:
        at = start + len(opening)
        at += len(text[at:]) - len(text[at:].lstrip())
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)  # to the brace that closes it, strings understood
        except (ValueError, RecursionError) as error:
            calls.append(Call("", {}).fail("bad_json", f"a call must be one JSON object ({first_line(error)})"))
            continue
        closed = closing.match(text, end)
        at = closed.end() if closed else end
        if not closed:
            calls.append(Call("", {}).fail("bad_json", "a call must end with </tool_call> behind its JSON object"))
        elif not isinstance(value, dict) or not isinstance(value.get("name"), str):
            calls.append(Call("", {}).fail("bad_json", 'a call must be an object with "name" and "arguments"'))
        elif is_deeper(value, 32):
            calls.append(Call(value["name"], {}).fail("bad_arguments", "the arguments are nested too deeply"))
        elif not isinstance(value.get("arguments"), dict):
            calls.append(Call(value["name"], {}).fail("bad_arguments", '"arguments" must be an object'))
        else:
            calls.append(Call(value["name"], value["arguments"]))
    return calls


def is_deeper(value, levels: int) -> bool:
    """Whether lists and objects are nested in each other more than so many times."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [x for v in layer if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
    return bool(layer)


JSON_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
              "null": type(None)}  # fmt: skip


def argument_error(schema: dict, arguments: dict) -> str | None:
    """What is wrong with the arguments of a call, by its tool's schema; None if nothing is."""
    parameters = schema["function"]["parameters"]
    known, required = parameters.get("properties", {}), parameters.get("required", [])
    if unknown := [name for name in arguments if name not in known]:
        return f"there is no argument {unknown[0]!r}; the arguments are {', '.join(known) or 'none'}"
    if absent := [name for name in required if name not in arguments]:
        return f"the argument {absent[0]!r} is missing"
    for name, value in arguments.items():
        kinds = known[name].get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else [*kinds]
        if value is None and (known[name].get("nullable") or not kinds):
            continue
        is_boolean = isinstance(value, bool)  # which to Python is an integer
        fits = [isinstance(value, JSON_TYPES.get(k, object)) and (k == "boolean") == is_boolean for k in kinds]
        if kinds and not any(fits):
            return f"the argument {name!r} must be of type {' or '.join(kinds)}"
        if "enum" in known[name] and value not in known[name]["enum"]:
            return f"the argument {name!r} must be one of {', '.join(map(str, known[name]['enum']))}"
    return None


def make_call(call: Call, tools: dict[str, Tool]) -> None:
    """Make a call that parsed; what goes wrong becomes its observation.  # detail 15"""
    if call.error:
        return
    if call.name not in tools:
        call.fail("unknown_tool", f"there is no tool {call.name!r}; the tools are {', '.join(tools) or 'none'}")
    elif problem := argument_error(tools[call.name].schema, call.arguments):
        call.fail("bad_arguments", problem)
    else:
        try:
            call.observation = utf8(str(tools[call.name].function(**call.arguments))) or "(nothing)"
        except TimeoutError as error:
            call.fail("timed_out", str(error) or "it took too long")
        except (Exception, SystemExit) as error:  # the latter would end the thread
            call.fail("failed", str(error) or type(error).__name__)


class Job:
    """The calls of a turn, to be made one after the other by some thread."""

    def __init__(self, calls: list[Call], tools: dict[str, Tool]):
        self.calls, self.tools = calls, tools
        self.began, self.is_done, self.is_given_up = math.inf, False, False


class ToolThreads:
    """Threads that make calls while the model samples. One that hangs is given up and replaced."""

    def __init__(self, count: int, seconds: float):
        self.seconds, self.jobs = seconds, queue.SimpleQueue()
        for _ in range(count):
            self.start()

    def start(self) -> None:
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        is_needed = True
        while is_needed:
            job = self.jobs.get()
            job.began = time.monotonic()
            for call in job.calls:
                make_call(call, job.tools)
            job.is_done = True
            is_needed = not job.is_given_up

    def submit(self, calls: list[Call], tools: dict[str, Tool]) -> Job:
        job = Job(calls, tools)
        self.jobs.put(job)
        return job

    def is_over(self, job: Job) -> bool:
        """Whether a job is done, or given up for the time it takes: `python` keeps to it by itself, call by call."""
        if not (job.is_done or job.is_given_up) and time.monotonic() > job.began + self.seconds * len(job.calls) + 1:
            job.is_given_up = True
            self.start()
        return job.is_done or job.is_given_up

    def collect(self, job: Job) -> list[Call]:
        """The calls of a job that is over."""
        if job.is_done:
            return job.calls
        # Copies: the thread that hangs may yet write into its own.
        calls = [Call(call.name, call.arguments, call.observation, call.error) for call in job.calls]
        return [call if call.observation else call.fail("timed_out", "it took too long") for call in calls]


# ---------------------------------------------------------------------------------------------- trajectories


@dataclass
class Turn:
    """What the model wrote at a stretch: where it stands in the trajectory's ids, as text, and what it called."""

    start: int
    end: int
    text: str
    calls: list[Call]


class Trajectory:
    """A task in the course of being solved: every token that the model has read or written so far.

    `ids`, `action_mask` and `logprobs` are of one length. `ending` says why it is over: "answered", "cut" (a turn that
    used up its budget), "turn_limit", "token_limit", or None while it is not.
    """

    def __init__(self, prompt: list[int], environment: Environment):
        self.ids, self.action_mask, self.logprobs = list(prompt), [False] * len(prompt), [0.0] * len(prompt)
        self.prompt_length, self.environment = len(prompt), environment
        self.turns: list[Turn] = []
        self.ending: str | None = None
        self.job: Job | None = None

    def act(self, completion: Completion, text: str, calls: list[Call]) -> None:
        """Append what the sampler drew, as it is, end-of-turn token included.  # detail 2"""
        self.turns.append(Turn(len(self.ids), len(self.ids) + len(completion.ids), text, calls))
        self.ids += completion.ids
        self.action_mask += [True] * len(completion.ids)
        self.logprobs += completion.logprobs

    def observe(self, ids: list[int]) -> None:
        """Append what the model is to read.  # detail 4"""
        self.ids += ids
        self.action_mask += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)

    @property
    def answer(self) -> str | None:
        """The text of the last turn, if it is an answer.  # detail 14"""
        return self.turns[-1].text if self.ending == "answered" else None

    @property
    def calls(self) -> list[Call]:
        return [call for turn in self.turns for call in turn.calls]


class Dialogue:
    """How a chat template tells of tools and of what they answered.

    A template that knows tools, and has them called as `parse_calls` reads it, is given their schemas and messages of
    the role `tool`. For any other the tools are described in the system message, or before the first message where
    there can be none, and answers come as a user's turn in <tool_response> tags.
    """

    def __init__(self, tokenizer, max_observation_tokens: int):
        self.tokenizer, self.limit = tokenizer, max_observation_tokens
        if not tokenizer.chat_template:
            sys.exit(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template, and an agent lives in a chat. Use "
                "the instruct version of the model, or set tokenizer.chat_template and save it."
            )
        self.closing = tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))
        probe = {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}
        tool, seen = Tool(print, {"type": "function", "function": probe}), [Call("probe", {}, "OBSERVED")]
        self.is_native = knows_tools(tokenizer)
        if self.is_native:
            told = tokenizer.decode(self.prompt(as_messages("a", "user"), {"probe": tool}))
            writes_calls = "<tool_call>" in told or "<tool_call>" in tokenizer.get_vocab()
            self.is_native = writes_calls and "<function=" not in told and self.shows(seen)
        try:
            system = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "a"}]
            self.has_system = "SYSTEM" in tokenizer.decode(render_chat(tokenizer, system, None, True).ids)
        except Exception:  # whatever a template raises that wants no such message
            self.has_system = False
        if not self.is_native and not self.shows(seen):
            sys.exit(f"The chat template of {tokenizer.name_or_path} takes no user's turn after the assistant's.")
        opening, schemas = self.opening(as_messages("a", "user"), {"probe": tool})
        require_kept_history(tokenizer, opening, self.messages(seen), schemas)

    def shows(self, calls: list[Call]) -> bool:
        """Whether the template lets the model read what calls have answered."""
        try:
            return all(call.observation in self.tokenizer.decode(self.observation(calls)) for call in calls)
        except Exception:  # it may want the calls of the turn before spelled out, or know no such role
            return False

    def opening(self, messages: list[dict], tools: dict[str, Tool]) -> tuple[list[dict], list[dict] | None]:
        """The messages to begin with, and the schemas that the template is to be given."""
        schemas = [tool.schema for tool in tools.values()]
        if self.is_native or not schemas:
            return messages, schemas or None
        told, first = describe_tools(schemas), messages[0]
        if first["role"] == "system":
            return [{**first, "content": f"{first['content']}\n\n{told}"}, *messages[1:]], None
        if not self.has_system:
            return [{**first, "content": f"{told}\n\n{first['content']}"}, *messages[1:]], None
        return [{"role": "system", "content": told}, *messages], None

    def prompt(self, messages: list[dict], tools: dict[str, Tool]) -> list[int]:
        opening, schemas = self.opening(messages, tools)
        return render_chat(self.tokenizer, opening, schemas, generation_prompt=True).ids

    def messages(self, calls: list[Call]) -> list[dict]:
        texts = [(call.name, self.cut(call.observation)) for call in calls]
        if self.is_native:
            return [{"role": "tool", "name": name, "content": text} for name, text in texts]
        return as_messages("\n".join(f"<tool_response>\n{text}\n</tool_response>" for _, text in texts), "user")

    def observation(self, calls: list[Call]) -> list[int]:
        """Ids between a turn and the next: what its calls answered, and the header of the turn to come."""
        return encode_between_turns(self.tokenizer, self.messages(calls))

    def cut(self, text: str) -> str:
        """An observation of at most so many tokens; the template closes it behind the cut.  # detail 11"""
        text = text[: 100 * self.limit]  # no tokenizer of ours is to chew on megabytes
        ids = encode_text(self.tokenizer, text, begins=False)
        return text if len(ids) <= self.limit else self.tokenizer.decode(ids[: self.limit]).rstrip("\ufffd") + "..."


def describe_tools(schemas: list[dict]) -> str:
    """Tools in words, for templates that have none."""
    listed = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in schemas)
    return (
        f"You can call these tools:\n<tools>\n{listed}\n</tools>\n"
        "To call one, write its name and arguments as a JSON object between tags, like this:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        "Then end your turn. The result comes back in <tool_response> tags, and you go on from it."
    )


class Player:
    """Plays trajectories: lets the model sample, makes its calls, shows it what they answered, until all are over."""

    def __init__(self, sampler: Sampler, dialogue: Dialogue, environment: type, tools: list[Callable], args: Args):
        self.sampler, self.dialogue, self.environment, self.functions = sampler, dialogue, environment, tools
        self.args = args
        threads = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.threads = ToolThreads(max(1, threads), args.tool_seconds)

    def play(
        self,
        tasks: list[dict],
        indices: list[int],
        num_samples: int,
        seed: int,
        temperature: float,
        withheld: bool = False,
        progress=None,
    ) -> list[list[Trajectory]]:
        """`num_samples` trajectories of each task, as a list per task.

        Args:
            indices: the number of each task among those of all processes, by which its samples are seeded.
            withheld: without tools; whatever is called is unknown.
            progress: called with the number of trajectories that have ended since the last call.
        """
        groups = [[self.begin(task, withheld) for _ in range(num_samples)] for task in tasks]
        numbers = [[i * num_samples + k for k in range(num_samples)] for i in indices]
        # Cohorts of whole groups, fixed beforehand; equal prompts share one, for they may share keys.  # detail 17
        order = {prompt: n for n, prompt in enumerate(dict.fromkeys(tuple(group[0].ids) for group in groups))}
        parts = [[p for p, group in enumerate(groups) if order[tuple(group[0].ids)] % self.args.cohorts == c]
                 for c in range(self.args.cohorts)]  # fmt: skip
        cohorts = []
        for part in filter(None, parts):
            prompts = [groups[p][0].ids for p in part]
            sampling = {"num_samples": num_samples, "seed": seed * 64, "indices": [indices[p] for p in part]}
            drawn = self.sample(prompts, [self.budget(groups[p][0]) for p in part], temperature, **sampling)
            cohort = [(t, n) for p in part for t, n in zip(groups[p], numbers[p])]
            cohorts.append(self.act(cohort, [c for group in drawn for c in group], withheld, progress))
        turn = dict.fromkeys(range(len(cohorts)), 1)
        while open_cohorts := [c for c in range(len(cohorts)) if cohorts[c]]:
            ready = [c for c in open_cohorts if all([self.threads.is_over(t.job) for t, _ in cohorts[c]])]
            if not ready:
                time.sleep(0.001)
                continue
            c = ready[0]
            cohort = self.observe(cohorts[c], progress)
            cohorts[c] = []
            if cohort:
                prompts, budgets = [t.ids for t, _ in cohort], [self.budget(t) for t, _ in cohort]
                sampling = {"seed": seed * 64 + turn[c], "indices": [n for _, n in cohort]}
                drawn = self.sample(prompts, budgets, temperature, **sampling)
                cohorts[c] = self.act(cohort, [completion for (completion,) in drawn], withheld, progress)
                turn[c] += 1
        return groups

    def begin(self, task: dict, withheld: bool) -> Trajectory:
        environment = self.environment(self.functions, self.args)
        if first_messages(environment, task["row"]) != task["messages"]:
            sys.exit(
                f"{type(environment).__name__}.reset() gave other messages than before for the same row. The "
                "trajectories of a task are compared with each other, so they must begin alike."
            )
        return Trajectory(task["bare_ids"] if withheld else task["ids"], environment)

    def budget(self, trajectory: Trajectory) -> int:
        left = self.args.max_trajectory_tokens - (len(trajectory.ids) - trajectory.prompt_length)
        return min(left, self.args.max_completion_tokens)

    def sample(self, prompts, budgets, temperature, **sampling) -> list[list[Completion]]:
        return self.sampler.generate(prompts, budgets, temperature=temperature, keep=True, **sampling)  # detail 10

    def act(self, cohort: list[tuple], completions: list[Completion], withheld: bool, progress) -> list[tuple]:
        """Append a turn to each trajectory and hand its calls to the threads. Returns those that go on."""
        going = []
        for (trajectory, number), completion in zip(cohort, completions):
            text = self.dialogue.tokenizer.decode(completion.ids, skip_special_tokens=True)
            calls = parse_calls(text) if completion.stopped else []
            for number_of_call, call in enumerate(calls, 1):
                if call.error is None and len(trajectory.turns) + 1 == self.args.max_turns:
                    call.fail("over_limit", f"this was the last of {self.args.max_turns} turns")
                elif call.error is None and number_of_call > self.args.max_calls:
                    call.fail("over_limit", f"at most {self.args.max_calls} calls can be made in a turn")
            is_last = self.budget(trajectory) < self.args.max_completion_tokens
            trajectory.act(completion, text, calls)
            if not completion.stopped:
                trajectory.ending = "token_limit" if is_last else "cut"
            elif not calls:
                trajectory.ending = "answered"
            elif len(trajectory.turns) == self.args.max_turns:
                trajectory.ending = "turn_limit"
            elif completion.ids[-1] != self.dialogue.closing:  # the text has ended, not the turn: none can follow
                trajectory.ending = "cut"
            if trajectory.ending:
                self.over(trajectory, progress)
            else:
                tools = {} if withheld else toolset(trajectory.environment.tools)
                trajectory.job = self.threads.submit(calls, tools)
                going.append((trajectory, number))
        return going

    def observe(self, cohort: list[tuple], progress) -> list[tuple]:
        """Show each trajectory what its calls answered. Returns those that have room to go on."""
        going = []
        for trajectory, number in cohort:
            trajectory.turns[-1].calls = self.threads.collect(trajectory.job)
            trajectory.job = None
            ids = self.dialogue.observation(trajectory.turns[-1].calls)
            if len(trajectory.ids) + len(ids) - trajectory.prompt_length < self.args.max_trajectory_tokens:
                trajectory.observe(ids)
                going.append((trajectory, number))
            else:  # detail 12
                trajectory.ending = "token_limit"
                self.over(trajectory, progress)
        return going

    def over(self, trajectory: Trajectory, progress) -> None:
        self.sampler.kept.pop(tuple(trajectory.ids[:-1]), None)  # keys and values that no turn will continue
        if progress:
            progress(1)


def ask(environment: Environment, method: str, *arguments):
    """What an environment's method returns; what it raises is its author's to mend, who is told where."""
    try:
        return getattr(environment, method)(*arguments)
    except Exception as error:
        where = f"{type(environment).__name__}.{method}()"
        sys.exit(f"{where} of the environment has raised {type(error).__name__}: {first_line(error)}.")


def first_messages(environment: Environment, row: dict) -> list[dict]:
    """What a fresh environment begins with."""
    messages = ask(environment, "reset", row)
    if not is_conversation(messages):
        where = f"{type(environment).__name__}.reset()"
        sys.exit(f"{where} of the environment must return messages with role and content; not {str(messages)[:60]!r}.")
    return as_messages(messages, "user")


def number_from(environment: Environment, method: str, subject) -> float:
    """A reward that an environment gives, which must be a number."""
    value = ask(environment, method, subject)
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        where = f"{type(environment).__name__}.{method}()"
        sys.exit(f"{where} of the environment must return a number; it gave {value!r}.")
    return number


# ---------------------------------------------------------------------------------------------- data and experience


def encode_tasks(dialogue: Dialogue, rows: list[dict], source: str, environment: type, tools, args, longest: int):
    """Rows as tasks: prompt ids with the tools and without, the messages, the row. Prompts that are too long or that
    the template refuses are dropped and counted, and so are answers of which nothing is left."""
    tasks, refused, empty = [], 0, 0
    wants_answer = any("answer" in group for group in environment.columns)
    for number, row in enumerate(rows, 1):
        answer = row.get("answer") if wants_answer else None
        if not isinstance(answer, (str, type(None))):
            sys.exit(f"{source}, row {number}: an answer must be text or a number; it is {str(answer)[:60]}.")
        if answer is not None and not answer.rpartition("####")[2].strip():
            empty += 1
            continue
        instance = environment(tools, args)
        messages = first_messages(instance, row)
        available = toolset(instance.tools)
        try:
            ids, bare = dialogue.prompt(messages, available), dialogue.prompt(messages, {})
        except (TemplateError, TypeError, ValueError, IndexError):  # the latter two for an empty list of messages
            refused += 1
            continue
        if len(ids) <= longest:
            tasks.append({"ids": ids, "bare_ids": bare, "messages": messages, "row": row})
    if empty:
        print(f"{source}: {empty} of {len(rows)} prompts dropped: their answer is empty.")
    if refused:
        print(f"{source}: {refused} of {len(rows)} prompts dropped: the chat template refuses their roles or content.")
    if long := len(rows) - empty - refused - len(tasks):
        print(f"{source}: {long} of {len(rows)} prompts dropped: over {longest} tokens, tools included.")
    if rows and not tasks:
        sys.exit(
            f"{source}: no prompt is left of {len(rows)}: {empty} have an empty answer, {refused} are refused by the "
            f"chat template, {long} are longer than {longest} tokens, tools included (--max-prompt-tokens)."
        )
    return tasks


class Experience:
    """Trajectories of this process's tasks as rows: B = tasks × samples, those of a task adjacent; A actions.

    A row of tensors holds its actions alone. What was observed stands in `ids`, as the context of what follows it.
    """

    def __init__(self, groups: list[list[Trajectory]], device):
        self.group_size = len(groups[0])
        trajectories = [t for group in groups for t in group]
        self.prompts = [t.ids[: t.prompt_length] for t in trajectories]
        self.ids = [t.ids[t.prompt_length :] for t in trajectories]
        self.action_masks = [t.action_mask[t.prompt_length :] for t in trajectories]
        drawn = [[value for value, mine in zip(t.logprobs, t.action_mask) if mine] for t in trajectories]
        turns = [[k for k, turn in enumerate(t.turns) for _ in range(turn.end - turn.start)] for t in trajectories]
        self.old_logprobs = pad_rows([torch.tensor(row) for row in drawn]).to(device)  # [B, A]
        self.mask = pad_rows([torch.ones(len(row)) for row in drawn]).to(device)  # [B, A]
        self.turns = pad_rows([torch.tensor(row) for row in turns]).to(device)  # [B, A] the turn of each action

    def rows_of(self, tasks: list[int]) -> list[int]:
        return [p * self.group_size + g for p in sorted(tasks) for g in range(self.group_size)]

    def microbatches(self, rows: list[int], max_tokens: int) -> list[tuple[list[int], float]]:
        """`rows` in microbatches, each with its weight. A process with fewer of them than another repeats some with
        weight zero: sharded weights are gathered by all processes together."""
        split = split_by_tokens([self.ids[i] for i in rows], max_tokens, [self.prompts[i] for i in rows])
        parts = [([rows[j] for j in part], 1.0) for part in split]
        rounds = int(reduce_over_processes([len(parts)], self.mask.device, maximum=True)[0])
        return parts + [([0], 0.0)] * (rounds - len(parts))

    def token_logprobs(self, model, rows: list[int], temperature: float, bfloat16: bool):
        """Log-probabilities and entropies [b, A] of the actions in `rows` under `model`."""
        device, width = self.mask.device, self.mask.shape[1]
        prompts, ids, masks = ([column[i] for i in rows] for column in (self.prompts, self.ids, self.action_masks))
        packed = pack_completions(prompts, ids, masks)  # detail 9
        # A forward needs each weight once: a cache of their bfloat16 copies would only take memory.
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            logprobs, entropy = token_logprobs(model, packed.to(device), temperature)  # detail 3
        return pad_rows(logprobs.split(packed.lengths), width), pad_rows(entropy.split(packed.lengths), width)

    @torch.no_grad()
    def reference_logprobs(self, reference, args: Args, bfloat16: bool) -> torch.Tensor:
        """Log-probabilities [B, A] of the actions under the reference; zeros where there is none."""
        logprobs = torch.zeros_like(self.old_logprobs)
        if reference is not None:
            for rows, _ in self.microbatches(range(len(self.ids)), args.microbatch_tokens):
                logprobs[rows], _ = self.token_logprobs(reference, rows, args.temperature, bfloat16)
        return logprobs


class Rewards(NamedTuple):
    outcome: torch.Tensor  # [P, G] what the trajectories were worth in the end
    turns: torch.Tensor  # [P, G, K] what their turns were worth by themselves
    exists: torch.Tensor  # [P, G, K] whether there is such a turn

    @property
    def total(self) -> torch.Tensor:
        return self.outcome + self.turns.sum(-1)


def reward_trajectories(groups: list[list[Trajectory]], max_turns: int) -> Rewards:
    """What the environments say of their trajectories."""
    outcome = torch.tensor([[number_from(t.environment, "reward", t) for t in group] for group in groups])
    turns = torch.zeros(len(groups), len(groups[0]), max_turns)
    exists = torch.zeros(turns.shape, dtype=torch.bool)
    for p, group in enumerate(groups):
        for g, trajectory in enumerate(group):
            for k, turn in enumerate(trajectory.turns):
                turns[p, g, k] = number_from(trajectory.environment, "turn_reward", turn)
                exists[p, g, k] = True
    return Rewards(outcome, turns, exists)


def count_conduct(trajectories: list[Trajectory]) -> dict[str, float]:
    """Sums over trajectories of how they went about it."""
    calls = [call for t in trajectories for call in t.calls]
    lengths = [sum(t.action_mask) for t in trajectories]
    read = [len(t.ids) - t.prompt_length - n for t, n in zip(trajectories, lengths)]
    endings = Counter(t.ending for t in trajectories)
    errors = Counter(call.error for call in calls)
    return {
        "trajectories": len(trajectories), "tokens": sum(lengths), "observed": sum(read), "calls": len(calls),
        "turns": sum(len(t.turns) for t in trajectories),
        "used": sum(any(call.error is None for call in t.calls) for t in trajectories),
        "invalid": sum(call.error is not None for call in calls),
        **{kind: errors[kind] for kind in ERRORS},
        **{ending: endings[ending] for ending in ("answered", "cut", "turn_limit", "token_limit")},
    }  # fmt: skip


def conduct_metrics(sums: dict[str, float], prefix: str) -> dict[str, float]:
    """Tool use from those sums, over all processes."""
    count, calls = sums["trajectories"], max(sums["calls"], 1)
    return {
        f"{prefix}/tool_use_rate": sums["used"] / count,
        f"{prefix}/calls": sums["calls"] / count,
        f"{prefix}/turns": sums["turns"] / count,
        f"{prefix}/invalid_call_rate": sums["invalid"] / calls,
    }


def trajectory_metrics(rewards: Rewards, trajectories: list[Trajectory], device) -> dict:
    """What a rollout tells about itself, over all processes."""
    conduct = count_conduct(trajectories)
    total, right = rewards.total, rewards.outcome > 0
    sums = sum_over_processes({
        **conduct, "groups": len(total), "reward": total.sum(), "square": total.square().sum(),
        "outcome": rewards.outcome.sum(), "cost": rewards.turns.sum(), "all_correct": right.all(1).sum(),
        "all_wrong": (~right).all(1).sum(),
    }, device)  # fmt: skip
    count = sums["trajectories"]
    means = {name: value / count for name, value in sums.items()}
    return {
        "reward/mean": means["reward"],
        "reward/std": max(means["square"] - means["reward"] ** 2, 0.0) ** 0.5,
        "reward/outcome": means["outcome"],
        "reward/turns": means["cost"],
        "groups/all_correct": sums["all_correct"] / sums["groups"],
        "groups/all_wrong": sums["all_wrong"] / sums["groups"],
        "completions/length_mean": means["tokens"],
        "completions/length_max": reduce_over_processes(
            [max(sum(t.action_mask) for t in trajectories)], device, maximum=True
        )[0],
        "completions/stopped_fraction": means["answered"],
        "completions/truncated_fraction": 1 - means["answered"],
        **conduct_metrics(sums, "agent"),
        "agent/observed_tokens": means["observed"],
        **{f"agent/{ending}": means[ending] for ending in ("cut", "turn_limit", "token_limit")},
        **{f"agent/{kind}": sums[kind] / max(sums["calls"], 1) for kind in ERRORS},
    }


@torch.no_grad()
def evaluate_agent(player: Player, tasks: list[dict], args: Args, rank: int, world: int) -> tuple[dict, list, list]:
    """Held-out accuracy with the tools, sampled and greedy, and without them.

    Returns the metrics over all processes, one trajectory of each of this process's tasks for the log, and those
    trajectories themselves.
    """
    mine, indices = tasks[rank::world], list(range(rank, len(tasks), world))
    with tqdm(total=len(mine) * (2 * args.eval_samples + 1), desc="evaluating", leave=False, disable=None) as bar:
        sampling = {"seed": args.seed, "progress": bar.update}
        sampled = player.play(mine, indices, args.eval_samples, temperature=args.temperature, **sampling)
        greedy = player.play(mine, indices, 1, temperature=0.0, **sampling)
        bare = player.play(mine, indices, args.eval_samples, temperature=args.temperature, withheld=True, **sampling)
    played = {"accuracy": sampled, "accuracy_greedy": greedy, "accuracy_without_tools": bare}
    rewards = {
        name: [[number_from(t.environment, "reward", t) for t in group] for group in groups]
        for name, groups in played.items()
    }
    sums = {name: sum(sum(group) / len(group) for group in given) for name, given in rewards.items()}
    means = sum_over_processes({"tasks": len(mine), **sums}, player.sampler.device)
    conduct = sum_over_processes(count_conduct([t for group in sampled for t in group]), player.sampler.device)
    metrics = {f"eval/{name}": means[name] / means["tasks"] for name in played}
    metrics |= conduct_metrics(conduct, "eval")
    metrics["eval/completion_length"] = conduct["tokens"] / conduct["trajectories"]
    metrics["eval/truncated_fraction"] = 1 - conduct["answered"] / conduct["trajectories"]
    shown, tokenizer = [group[0] for group in sampled], player.dialogue.tokenizer
    given = [group[0] for group in rewards["accuracy"]]
    return metrics, [sample_row(tokenizer, *of) for of in zip(shown, mine, given)], shown


def sample_row(tokenizer, trajectory: Trajectory, task: dict, reward: float) -> dict:
    """A trajectory for samples.jsonl."""
    observed = [[call.observation for call in turn.calls] for turn in trajectory.turns]
    texts = [turn.text + "".join(f" ⇒ {text}" for text in seen) for turn, seen in zip(trajectory.turns, observed)]
    return {
        "prompt": tokenizer.decode(task["ids"], skip_special_tokens=True),
        "completion": "\n".join(texts),
        "reward": reward,
        "gold": task["row"].get("answer"),
        "ending": trajectory.ending,
        "calls": [vars(call) for call in trajectory.calls],
    }


def render_transcript(tokenizer, trajectory: Trajectory, title: str) -> str:
    """A trajectory as a person reads it: every token in its order, who wrote it, and whether it is trained on."""
    lines = [f"══ {title} · {trajectory.ending}"]

    def block(heading: str, ids: list[int], bar: str) -> None:
        lines.append(f"{heading} ({len(ids)} tokens)")
        lines.extend(f"  {bar} {line}" for line in tokenizer.decode(ids).split("\n"))

    block("prompt, not trained", trajectory.ids[: trajectory.prompt_length], "│")
    for k, turn in enumerate(trajectory.turns, 1):
        block(f"turn {k} of the model, TRAINED", trajectory.ids[turn.start : turn.end], "┃")
        for call in turn.calls:
            arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
            lines.append(f"    {'✗ ' + call.error if call.error else '→'} {call.name}({arguments})")
        following = trajectory.turns[k].start if k < len(trajectory.turns) else len(trajectory.ids)
        if following > turn.end:
            block("observed, not trained", trajectory.ids[turn.end : following], "│")
    return utf8("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------- main


def main(args: Args, environment: type[Environment] = ToolQuestions) -> dict:
    args = resumed_args(args, "agentic")
    check_agentic_args(args)
    device, rank, world = start_processes(args.device)
    stop = catch_stop_signals()

    # Data and tools, before any model is loaded.
    rows = load_rows(args.dataset, args.subset, args.split, environment.columns)
    if args.eval_dataset or args.dataset == Args.dataset:
        held_out_source = args.eval_dataset or str(TINY / "tools_test.jsonl")
        held_out = load_held_out(args, held_out_source, environment.columns)[: args.eval_rows]
    else:
        held_out_source = f"rows held out of {args.dataset}"
        rows, held_out = hold_out(rows, args)
    functions = build_tools(args)
    if "search" in args.tools and args.corpus == Args.corpus and args.dataset != Args.dataset:
        print("notice: `search` looks through the embedded corpus; --corpus names another, --tools leaves it out.")
    tokenizer = load_tokenizer(args.model)
    context = context_length(load_config(args.model, args.trust_remote_code))
    longest = min(args.max_prompt_tokens, context - args.max_trajectory_tokens)
    if longest < 1:
        sys.exit(f"--max-trajectory-tokens {args.max_trajectory_tokens} fills the model's whole context of {context}.")
    dialogue = Dialogue(tokenizer, args.max_observation_tokens)
    encoding = {"environment": environment, "tools": functions, "args": args, "longest": longest}
    tasks = encode_tasks(dialogue, rows, args.dataset, **encoding)
    held_out = encode_tasks(dialogue, held_out, held_out_source, **encoding)
    shuffle = torch.Generator().manual_seed(args.seed)  # passes over all tasks, as many as the steps take
    passes = math.ceil(args.steps * args.batch_size / len(tasks))
    order = torch.cat([torch.randperm(len(tasks), generator=shuffle) for _ in range(passes)]).tolist()

    # Models, optimizer, run folder.
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    policy = load_model(args, device)
    stops = stop_token_ids(tokenizer, policy)
    policy = shard(policy, world)
    reference = shard(load_model(args, device), world).requires_grad_(False) if args.beta else None
    sampler = Sampler(policy, stops, torch.bfloat16 if bfloat16 else torch.float32)
    player = Player(sampler, dialogue, environment, functions, args)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
    shown = {"reward/mean": "reward", "agent/calls": "calls", "agent/invalid_call_rate": "invalid calls"}
    run = Run(args, "agentic", rank, {**shown, "eval/accuracy": "accuracy", "eval/accuracy_without_tools": "without"})

    def evaluate(step: int) -> tuple[dict, list[dict]]:
        sampler.sync()
        metrics, samples, trajectories = evaluate_agent(player, held_out, args, rank, world)
        show_transcripts(run, tokenizer, step, samples, trajectories)
        return metrics, samples

    first = load_checkpoint(run, policy, optimizer, args.steps) if args.resume else 0
    name, kept = environment.__qualname__, run.carried.get("environment", environment.__qualname__)
    if kept != name:
        sys.exit(f"--resume {args.resume}: that run's environment is {kept}, not {name}; start the script that has it.")
    run.carried["environment"] = name
    command = f"python {'agentic.py' if environment is ToolQuestions else sys.argv[0]} --resume {run.folder}"
    if not args.resume:
        run.log(0, *evaluate(0))

    for step in range(first + 1, args.steps + 1):
        began = time.perf_counter()
        seed = args.seed * 1_000_003 + step
        batch = [tasks[i] for i in order[(step - 1) * args.batch_size : step * args.batch_size]]
        positions = list(range(rank, len(batch), world))  # of this process's tasks in the batch

        # Act and observe.
        sampler.sync()
        groups = player.play([batch[p] for p in positions], positions, args.num_samples, seed, args.temperature)
        sample_time = time.perf_counter() - began

        # Score, and compare within each group.
        rewards = reward_trajectories(groups, args.max_turns)
        experience = Experience(groups, device)
        of_turns = assign_credit(*rewards, args.credit, args.advantage)  # [P, G, K]
        advantages = of_turns.flatten(0, 1).to(device).gather(1, experience.turns)  # [B, A]
        ref_logprobs = experience.reference_logprobs(reference, args, bfloat16)  # [B, A]

        # Update.
        sums, first_sums, ratio_max, policy_losses, grad_norms = Counter(), Counter(), 0.0, [], []
        rate = learning_rate_at(step, args.steps, args)
        for epoch in range(args.update_epochs):
            shuffle = torch.Generator().manual_seed(seed * 97 + epoch)
            for chosen in torch.randperm(len(batch), generator=shuffle).view(args.minibatches, -1).tolist():
                chosen_rows = experience.rows_of([k for k, p in enumerate(positions) if p in chosen])
                sequences = len(chosen) * args.num_samples
                tokens = reduce_over_processes([float(experience.mask[chosen_rows].sum())], device)[0]
                total_loss = 0.0
                for part, weight in experience.microbatches(chosen_rows, args.microbatch_tokens):
                    logprobs, entropy = experience.token_logprobs(policy, part, args.temperature, bfloat16)  # [b, A]
                    old_logprobs, ref = experience.old_logprobs[part], ref_logprobs[part]
                    advantage, mask = advantages[part], experience.mask[part] * weight  # [b, A]
                    losses, ratio = policy_loss(
                        logprobs, old_logprobs, advantage, mask, args.clip_low, args.clip_high, args.ratio
                    )
                    if reference is not None:  # detail 7
                        losses = losses + args.beta * kl_estimate(logprobs, ref, args.kl_estimator)
                    constant = args.max_trajectory_tokens
                    loss = aggregate(losses, mask, args.loss_aggregation, sequences, tokens, constant)
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
                grad_norms.append(optimizer_step(policy, optimizer, args.max_grad_norm, rate))

        # Log, evaluate, save.
        elapsed = time.perf_counter() - began
        sums, first_sums = sum_over_processes(sums, device), sum_over_processes(first_sums, device)
        tokens = sums.pop("tokens")
        metrics, samples = {
            **trajectory_metrics(rewards, [t for group in groups for t in group], device),
            **{f"policy/{name}": value / tokens for name, value in sums.items()},
            "policy/sampler_gap": first_sums["sampler_gap"] / first_sums["tokens"],
            "policy/ratio_max": reduce_over_processes([ratio_max], device, maximum=True)[0],
            "loss/policy": sum(policy_losses) / len(policy_losses),
            "optim/grad_norm": sum(grad_norms) / len(grad_norms),
            "optim/learning_rate": rate,
            "time/step": elapsed,
            "time/sample": sample_time,
            "time/train": elapsed - sample_time,
            "throughput/tokens_per_second": tokens / args.update_epochs / elapsed,
            "memory/peak_gb": peak_memory_gb(device),
        }, []  # fmt: skip
        stopping = stop_requested(stop, device)
        if is_due(step, args.eval_every, args.steps) and (step == args.steps or not stopping):
            scores, samples = evaluate(step)
            metrics |= scores
        run.log(step, metrics, samples)
        if is_due(step, args.save_every, args.steps) or stopping:
            save_checkpoint(run, step, policy, optimizer)
        if stopping and step < args.steps:
            return run.finish(command, stopped=stopping)

    save_model(run, policy, tokenizer, stops, bfloat16)
    return run.finish(f"{command} --steps {2 * args.steps}")


def show_transcripts(run: Run, tokenizer, step: int, samples: list[dict], trajectories: list[Trajectory]) -> None:
    """transcripts/step-….txt, and the first of them on the terminal."""
    if run.is_main:
        titles = [f"step {step} · task {i} · reward {sample['reward']:.2f}" for i, sample in enumerate(samples)]
        texts = [render_transcript(tokenizer, t, title) for t, title in zip(trajectories, titles)]
        (run.folder / "transcripts").mkdir(exist_ok=True)
        (run.folder / "transcripts" / f"step-{step:06d}.txt").write_text("\n".join(texts), encoding="utf-8")
        for text in texts[: min(1, run.args.log_samples)]:
            run.bar.write(text)


def check_agentic_args(args: Args) -> None:
    """Refuse settings that cannot work together, before anything is loaded."""
    if args.num_samples < 2:
        sys.exit("--num-samples 1: a trajectory is compared with its siblings, so every task needs at least 2.")
    counts = ("batch_size", "microbatch_tokens", "minibatches", "update_epochs", "steps", "eval_rows", "eval_samples",
              "search_results", "max_turns", "max_calls", "max_observation_tokens", "cohorts",
              "max_completion_tokens", "max_prompt_tokens", "python_memory_mb")  # fmt: skip
    for name in counts:
        if getattr(args, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1.")
    if args.max_turns > 63:  # of each turn's seed
        sys.exit(f"--max-turns {args.max_turns} must be at most 63.")
    if args.temperature <= 0:
        sys.exit("--temperature must be above 0: greedy sampling leaves nothing to compare.")
    if args.tool_seconds <= 0:
        sys.exit(f"--tool-seconds {args.tool_seconds} must be above 0.")
    if args.max_trajectory_tokens < args.max_completion_tokens:
        sys.exit(
            f"--max-trajectory-tokens {args.max_trajectory_tokens} leaves no room for one turn of "
            f"--max-completion-tokens {args.max_completion_tokens}."
        )
    if args.batch_size % args.minibatches:
        sys.exit(f"--batch-size {args.batch_size} tasks cannot be divided into --minibatches {args.minibatches}.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        sys.exit(f"--batch-size {args.batch_size} cannot be divided among {world} processes; take a multiple of it.")


# ---------------------------------------------------------------------------------------------- the sandbox


def confine() -> None:
    """Runs in an interpreter of its own, from its source: gives up all rights, then executes main.py.

    With `check` as its last argument it prints which rows of Sandbox's table it could not establish.
    """
    import ctypes
    import os
    import platform
    import resource
    import struct
    import sys
    import traceback

    seconds, memory, file_size, parent = map(int, sys.argv[1:5])
    known = sys.argv[5]  # rows that are known not to hold, or "check"
    missing = []
    limits = {"CPU": seconds, "AS": memory, "FSIZE": file_size, "NOFILE": 64, "CORE": 0, "STACK": 8 << 20, "NPROC": 0}
    for name, value in limits.items():
        try:
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        except (AttributeError, ValueError, OSError):  # a system may not know it, or not obey
            missing += {"CPU": ["time"], "AS": ["memory"], "STACK": ["memory"], "FSIZE": ["files"]}.get(name, [])
    if known != "check":
        with open("main.py", "rb") as file:
            code = file.read()
    os.environ.clear()
    if sys.platform != "linux":
        missing += ["memory", "processes", "files", "network", "environment", "signals"]
    else:
        libc = ctypes.CDLL(None, use_errno=True)

        def call(function, *arguments) -> int:
            return function(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])

        if call(libc.prctl, 1, 9, 0, 0, 0) != 0:  # PR_SET_PDEATHSIG: killed when the thread that waits for it is gone
            missing += ["signals"]
        if os.getppid() != parent:  # which happened before
            os._exit(1)
        call(libc.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which both of the following want and will miss

        # Landlock: no file can be opened, made or removed but where a rule says so. Bits: 1 write, 2 read, 3 list,
        # 8 make file, 14 truncate; to remove, and to make folders, links and devices, are in no rule.
        handled, readable = (1 << 15) - 1, 1 << 2 | 1 << 3
        ruleset = -1
        if call(libc.syscall, 444, None, 0, 1) >= 3:  # landlock_create_ruleset, its version
            ruleset = call(libc.syscall, 444, struct.pack("Q", handled), 8, 0)
        library = os.path.dirname(os.__file__)  # of this Python, without what has been installed
        above = os.path.dirname(library)
        rules = {os.path.join(library, name): readable for name in os.listdir(library)}
        rules |= {os.path.join(above, name): readable for name in os.listdir(above) if ".so" in name}
        rules = {path: rights for path, rights in rules.items() if not path.endswith("-packages")}
        rules |= dict.fromkeys(["/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo"], readable) | {library: 1 << 3}
        rules |= {"/etc/ld.so.cache": 1 << 2, "/dev/urandom": 1 << 2, "/dev/null": 1 << 1 | 1 << 2}
        rules["."] = readable | 1 << 1 | 1 << 8 | 1 << 14
        for path, rights in rules.items():
            if ruleset >= 0 and os.path.exists(path):
                place = os.open(path, os.O_PATH)
                rights &= -1 if os.path.isdir(path) else ~(1 << 3)
                call(libc.syscall, 445, ruleset, 1, struct.pack("=Qi", rights, place), 0)
                os.close(place)
        if ruleset < 0 or call(libc.syscall, 446, ruleset, 0) != 0:  # landlock_restrict_self
            missing += ["files", "environment"]
        # Root's capabilities, but for that of reading a library in somebody else's home, or even that.
        for kept in (4, 0):
            sets = struct.pack("=6I", kept, kept, 0, 0, 0, 0)
            if call(libc.capset, struct.pack("=Ii", 0x20080522, 0), sets) == 0:
                break
        else:
            missing += ["files"]

        # seccomp: these system calls and no others; none starts a process or thread, opens a socket, sends a signal,
        # changes the owner, mode or times of a file, or takes its space without its length.
        machines = {
            "x86_64": (
                0xC000003E, {"fcntl": 72, "ioctl": 16, "openat": 257, "open": 2},
                "0-28 32-40 60-61 63 72-75 77-82 87 89 95-96 98-100 102 104 107-108 110-111 115 121 124 127-128 131 "
                "137-138 158 186 201-202 204 217-219 228-233 247 257 262-264 267 269-271 273 281 290-293 309 316 318 "
                "324 326 332 334 436 439",
            ),
            "aarch64": (
                0xC00000B7, {"fcntl": 25, "ioctl": 29, "openat": 56},
                "17 19-25 29 32 35 38 43-44 46 48-50 56-57 59 61-68 71-73 78-80 82-83 93-96 98-99 101-103 113-115 "
                "123-124 128 132 134-137 139 153 155-156 158 160 165-166 168-169 172-179 214-216 222 226-227 232-233 "
                "260 276 278 283 285 291 293 436 439",
            ),
        }  # fmt: skip
        architecture, special, numbers = machines.get(platform.machine(), (0, {}, ""))
        allowed = []
        for part in numbers.split():
            first, _, last = part.partition("-")
            allowed += range(int(first), int(last or first) + 1)
        load, equal, has_bits, end = 0x20, 0x15, 0x45, 0x06  # opcodes of classic BPF
        kill, deny, allow = 0x80000000, 0x00050001, 0x7FFF0000  # deny: the call fails with EPERM

        def only(number: int, offset: int, values: list[int]) -> list[tuple]:
            """A call is allowed if its argument, which lies at `offset`, is one of these."""
            tests = [(equal, len(values) - i, 0, value) for i, value in enumerate(values)]
            ends = [(end, 0, 0, deny), (end, 0, 0, allow)]
            return [(equal, 0, len(values) + 3, number), (load, 0, 0, offset), *tests, *ends]

        program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, kill), (load, 0, 0, 0)]
        if allowed:
            # fcntl without owners and signals of files, leases and the size of pipes; ioctl for terminals and pending
            # bytes alone; no files without a name.
            program += only(special["fcntl"], 24, [*range(8), 1030])
            program += only(special["ioctl"], 24, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451])
            for name, offset in (("open", 24), ("openat", 32)):
                if name in special:
                    program += [(equal, 0, 4, special[name]), (load, 0, 0, offset), (has_bits, 0, 1, 0x400000)]
                    program += [(end, 0, 0, deny), (end, 0, 0, allow)]
        program += [(equal, len(allowed) - i, 0, number) for i, number in enumerate(allowed)]
        program += [(end, 0, 0, deny), (end, 0, 0, allow)]
        filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
        described = struct.pack("HP", len(program), ctypes.addressof(filters))
        if not allowed or call(libc.prctl, 22, 2, described, 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
            missing += ["processes", "network", "signals"]
    if known == "check":
        print(" ".join(dict.fromkeys(missing)))
        return
    if unexpected := [row for row in missing if row not in known.split()]:
        sys.exit(f"the sandbox does not hold ({', '.join(unexpected)}): nothing was run")
    sys.argv[:] = ["main.py"]
    sys.modules["__main__"] = module = type(sys)("__main__")
    try:
        exec(compile(code, "main.py", "exec"), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        traceback.print_exception(type(error), error, error.__traceback__.tb_next)
        sys.exit(1)


CONFINE_SOURCE = inspect.getsource(confine) + "\nconfine()\n"  # now: the file may be edited later


class Sandbox:
    """Runs Python code that a model wrote, in a process of its own without rights. Root and ordinary users alike:

        what          how it is contained (Linux on x86-64 and ARM64)
        ------------  ----------------------------------------------------------------------------------------------
        time          killed after --tool-seconds by the clock; little more of one processor (RLIMIT_CPU)
        memory        --python-memory-mb of address space (RLIMIT_AS), 8 MB of stack; no memory that outlives it
        processes     none, and no threads, can be started, and no program executed (seccomp)
        files         reads this Python's standard library and /usr/lib, and makes and writes files in its empty scratch
                      folder alone (Landlock), of at most 8 MB each and 64 open at once; killed at 16 MB together, or
                      4,000 files, as a look every 20 ms finds them. It can remove nothing, make no folder or link,
                      and change nobody's owner, mode or times (seccomp, capabilities). The folder is removed
        output        killed at 64 kB; bytes that are no UTF-8 are replaced; standard input is empty
        network       no sockets of any kind (seccomp)
        environment   empty; /proc/…/environ cannot be read, nor the data, the graders or the model (Landlock)
        signals       none can be sent to another process, nor can one be traced (seccomp); it ends with its parent

    Not contained: it can tell which files exist, how large they are and where links lead; it shares the processor's
    caches and the kernel, whose faults are its ways out; a training that is killed by SIGKILL leaves the scratch folder
    behind. What it costs: asyncio, threads, temporary files, and packages beyond the standard library do not work.
    Without seccomp or Landlock (Linux ≥ 6.2), and on other systems, `gaps` names the rows that do not hold.
    """

    OUTPUT, FILES = 64_000, 16_000_000  # bytes

    def __init__(self, seconds: float, memory_mb: int):
        self.seconds, self.folder = seconds, tempfile.TemporaryDirectory(prefix="sandbox-")
        # One second more than the clock has, which otherwise might find it killed already.
        self.limits = [str(math.ceil(seconds) + 1), str(memory_mb << 20), str(self.FILES // 2), str(os.getpid())]
        try:
            check = subprocess.run(self.command("check"), capture_output=True, text=True, env={}, cwd=self.folder.name,
                                   timeout=60)  # fmt: skip
            told, failed = check.stdout, ""
            if check.returncode:
                failed = check.stderr.strip()[-200:] or f"exit status {check.returncode}"
        except (OSError, TypeError, subprocess.TimeoutExpired) as error:
            told, failed = "", first_line(error)
        if failed:
            sys.exit(f"--tools python: the sandbox cannot be started with {sys.executable} ({failed}).")
        self.gaps = told.split()  # rows of the table that this system cannot keep

    def command(self, known: str) -> list[str]:
        return [sys.executable, "-I", "-S", "-u", "-X", "utf8", "-c", CONFINE_SOURCE, *self.limits, known]

    def python(self, code: str) -> str:
        """Run Python code, which has the standard library and nothing else, and read what it prints.

        Args:
            code: A program that prints its result.
        """
        scratch = tempfile.mkdtemp(dir=self.folder.name)
        try:
            Path(scratch, "main.py").write_bytes(code.encode("utf-8", "replace"))
            return self.run(scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def run(self, scratch: str) -> str:
        """What main.py in `scratch` prints, and how it ended if not well. Raises TimeoutError."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = self.command(" ".join(self.gaps))
        process = subprocess.Popen(command, **pipes, cwd=scratch, env={}, start_new_session=True)
        began, pipe, output, is_closed, reason = time.monotonic(), process.stdout.fileno(), b"", False, ""
        os.set_blocking(pipe, False)
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        try:
            while not reason and not has_ended(process):
                if is_closed:
                    time.sleep(0.002 if time.monotonic() < began + 0.2 else 0.02)
                elif poller.poll(20):
                    with contextlib.suppress(BlockingIOError):  # it can read its own pipe, and may have been faster
                        chunk = os.read(pipe, 65536)
                        output, is_closed = output + chunk, not chunk
                if time.monotonic() > began + self.seconds:
                    reason = f"stopped: it took longer than {self.seconds:g} seconds"
                elif len(output) > self.OUTPUT:
                    reason = f"stopped: it printed more than {self.OUTPUT} bytes"
                elif folder_size(scratch) > self.FILES:
                    reason = f"stopped: its files take more than {self.FILES} bytes"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        with contextlib.suppress(BlockingIOError):  # raised where something else holds the pipe, and it is empty
            while len(output) <= self.OUTPUT and (chunk := os.read(pipe, 65536)):
                output += chunk
        process.stdout.close()
        text = output[: self.OUTPUT].decode("utf-8", "replace")
        if not reason and status:
            reason = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        told = "\n".join(filter(None, [text.rstrip("\n"), reason and f"[{reason}]"])) or "(it printed nothing)"
        if "took longer" in reason:
            raise TimeoutError(told)
        return told


def has_ended(process: subprocess.Popen) -> bool:
    """Whether a process has ended. It is left unreaped where that is possible: it keeps its number, so that who is
    killed by that number afterwards can be nobody else."""
    if hasattr(os, "waitid"):
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return process.poll() is not None


def folder_size(folder: str) -> int:
    """Bytes that the files in a folder without folders take or claim, at least a block for each."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                about = entry.stat(follow_symlinks=False)
                total += max(4096, about.st_size, 512 * about.st_blocks)
    return total


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
