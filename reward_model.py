"""Reward models: learn a score from comparisons, the signal that PPO, best-of-n and online DPO optimise.

People (or a judge model, or a verifier) say which of several answers is better; a language model with a scalar head
learns a score r(x, y) that orders answers as they did. Signal: comparisons, or labels of single steps. Optimizer:
likelihood of those. Leash: one or few epochs, and normalised scores, so that a policy's KL weight keeps its meaning.
Defence against hacking: an ensemble whose members must agree, and a report of what else the score correlates with.

    outcome   loss = − mean_pairs[ p·log σ(Δ) + (1−p)·log σ(−Δ) ] + c·(r_better + r_worse)²,  Δ = r_better − r_worse − m
    process   loss = − mean_steps[ l·log σ(s) + (1−l)·log σ(−s) ],   steps up to and including the first wrong one

with p = 1 or the probability that the better one is better, margin m, and the mean over the C(K,2) pairs of a prompt
first. Papers: InstructGPT (arXiv:2203.02155, K-wise rankings, normalisation), Llama 2 (arXiv:2307.09288, margin),
arXiv:2312.09244 (centring), Coste et al. (arXiv:2310.02743, ensembles), Let's Verify Step by Step (arXiv:2305.20050,
process), Constitutional AI (arXiv:2212.08073) and RLAIF (arXiv:2309.00267, labels by a judge).

    python reward_model.py                                                           # laptop, embedded model, 1 minute
    python reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset HuggingFaceH4/ultrafeedback_binarized \
        --split train_prefs --learning-rate 1e-5 --epochs 1 --batch-size 64          # one GPU
    torchrun --nproc-per-node 8 reward_model.py --model Qwen/Qwen2.5-7B-Instruct --dataset DATA --learning-rate 3e-6 …

and `--kind process` for a process model, `--judge MODEL --principles FILE` for labels by a judge.

What to look at: `loss/train` starts near log 2 = 0.693 and falls; `eval/accuracy` on held-out pairs is what counts:
0.65 to 0.75 is normal on human preferences, which disagree among themselves, near 1 where a rule decides. When
`eval/loss` turns up while `eval/accuracy` stands still the model grows too sure, and `eval/calibration_error` says by
how much. `eval/length_correlation` near 1, or an accuracy far higher where the chosen answer is longer, means that it
reads length. `eval/first_error_accuracy` is the share of solutions whose first wrong step, or lack of one, is found.

The result in model/ is a sequence classifier with one label whose config holds `reward_mean` and `reward_std`: the
normalised score is (logit − reward_mean) / reward_std. Member k ≥ 1 of an ensemble of `reward_members` lies in
model/member_k, in the same form. A process model has `reward_kind` "process": sigmoid(logit) at a step's end is the
probability that it is right.

Implementation details that matter, each marked in the code under its number:
 1. A score is read at the conversation's last token, found from lengths; neither padding nor neighbours change it.
 2. The head starts normal with std 1/√(d+1) and runs in float32; dropout is off.
 3. The completions of a prompt share its forward, and each is forwarded once, however many pairs it stands in.
 4. The pairs of a prompt count 1/C(K,2) each, and losses are divided by the prompts (or steps) of the whole optimizer
    step, so microbatch size and processes change nothing.
 5. A label below one half turns the pair round, its margin too, so "chosen" always is the more probable side.
 6. Pairs that teach nothing (equal, an empty side, different prompts, too long) are dropped, counted and named.
 7. Scores are normalised on reference completions, and the model's own config holds the constants.
 8. Members of an ensemble differ in head and data order, and are normalised before they are compared.
 9. A step's target stands at its last token; after the first wrong step there are none.
10. Steps and the separators behind them are tokenised apart, so a step's last token never merges with what follows.
11. A judge sees every pair in both orders, and only its two option tokens are compared.
12. All randomness is a function of seed and step, so a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
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

from common.generation import Sampler
from common.kl import has_known_logits, head_logits, hidden_states, logit_shape, use_layout
from common.tokenizer import (
    Packed,
    Segment,
    as_messages,
    encode_continuation,
    encode_prompt,
    encode_text,
    load_tokenizer,
    pack,
    render_chat,
    split_by_tokens,
    stop_token_ids,
)

TINY = Path(__file__).resolve().parent / "common" / "tiny"


@dataclass
class Args:
    # model and data
    model: str = str(TINY)
    """folder or Hub name of a causal language model, or of a reward model to go on from"""
    dataset: str | None = None
    """file, folder or Hub name; rows hold prompt, chosen and rejected (also margin, chosen_probability), or prompt and
    completions ranked best first; process: prompt, completions (the steps) and labels; default: the embedded data"""
    subset: str | None = None
    """configuration of a Hub data set"""
    split: str = "train"
    """split of a Hub data set"""
    eval_dataset: str | None = None
    """held-out rows; by default the embedded data's own, or else rows held out of --dataset"""
    eval_subset: str | None = None
    """configuration of --eval-dataset on the Hub (default: that of --subset, unless that is another Hub data set's)"""
    eval_split: str | None = None
    """split of --eval-dataset on the Hub (default: that of --split)"""
    reference_dataset: str | None = None
    """demonstrations to normalise scores on; by default the embedded ones, or else the chosen held-out answers"""
    max_prompt_tokens: int = 512
    """rows with a longer prompt are dropped"""
    max_completion_tokens: int = 512
    """rows with a longer completion are dropped: a text without its end has no place to read a score at"""
    trust_remote_code: bool = False
    """run code that comes with the model"""

    # algorithm
    kind: Literal["outcome", "process"] = "outcome"
    """score whole answers from comparisons, or each step of a solution from labels"""
    centering: float = 0.01
    """weight c of (r_better + r_worse)², which keeps scores around zero; 0.01 in arXiv:2312.09244"""
    normalisation: Literal["none", "shift", "scale"] = "shift"
    """give the scores of reference completions mean 0, or mean 0 and standard deviation 1"""
    ensemble_size: int = 1
    """members, each with its own head and data order; 4 or 5 in Coste et al."""
    ensemble_score: Literal["mean", "min", "uwo"] = "mean"
    """how evaluation joins them: mean, worst case, or mean − disagreement_penalty · variance"""
    disagreement_penalty: float = 0.5
    """λ of uwo"""
    step_separator: str = ","
    """process: text behind every step; the comma is the embedded data's, a line break or two suit most other"""
    step_aggregation: Literal["product", "min"] = "product"
    """process: a solution's score from the probabilities of its steps; the product punishes long solutions"""
    judge: str | None = None
    """causal language model that labels --dataset: its pairs, or two samples of --model for each of its prompts"""
    principles: str | None = None
    """file with one principle a line, of which the judge is shown one per pair"""
    temperature: float = 1.0
    """of those samples"""

    # optimisation
    steps: int = 0
    """optimizer steps; 0 takes --epochs"""
    epochs: float = 3.0
    """passes over the data; 1 for a pretrained model, which overfits after it (InstructGPT)"""
    batch_size: int = 32
    """prompts per optimizer step over all processes"""
    microbatch_tokens: int = 4096
    """tokens per forward and backward: a memory knob that does not change the result"""
    learning_rate: float = 1e-3
    """peak; 1e-3 suits the embedded model, 3e-6 to 1e-5 a pretrained one"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
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
    eval_every: int = 40
    """steps between evaluations; 0 evaluates before and after only"""
    eval_rows: int = 192
    """held-out rows used, and reference completions"""
    output_dir: str | None = None
    """default: runs/reward_model/<date>_<time>"""
    overwrite: bool = False
    """replace the run that --output-dir holds"""
    resume: str | None = None
    """continue the run in this folder with its own arguments; only steps, epochs and logging may be changed"""
    save_every: int = 0
    """steps between checkpoints; 0 writes one at the end only"""
    log_samples: int = 3
    """scored completions shown per evaluation"""
    wandb_project: str | None = None
    """also log to Weights & Biases"""


# ---------------------------------------------------------------------------------------------- the mathematics


def preference_loss(better: torch.Tensor, worse: torch.Tensor, margin=0.0, probability=1.0, centering: float = 0.0):
    """Bradley-Terry: cross-entropy of each pair. Scores better, worse [P]; margin, probability [P] or numbers."""
    difference = better - worse - margin
    loss = -probability * F.logsigmoid(difference) - (1 - probability) * F.logsigmoid(-difference)
    return loss + centering * (better + worse).square()


def ranked_pairs(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every pair of completions of a prompt, where prompt i has sizes[i] of them, best first, and all lie end to end.

    Returns: `better`, `worse` [P] indices of completions, `owner` [P] the prompt, `weight` [P] = 1/C(K,2).  # detail 4
    """
    better, worse, owner, weight = [], [], [], []
    start = 0
    for i, size in enumerate(sizes):
        first, second = torch.triu_indices(size, size, 1)
        better.append(start + first)
        worse.append(start + second)
        owner.append(torch.full_like(first, i))
        weight.append(torch.full(first.shape, 1 / max(len(first), 1)))
        start += size
    return torch.cat(better), torch.cat(worse), torch.cat(owner), torch.cat(weight)


def supervised_steps(labels: list[bool]) -> list[bool]:
    """Which steps have a target: those up to and including the first wrong one."""
    wrong = labels.index(False) if False in labels else len(labels)
    return [i <= wrong for i in range(len(labels))]  # detail 9


def process_loss(scores: torch.Tensor, labels: torch.Tensor, supervised: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each step, 0 where there is no target. scores, labels, supervised [S]."""
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none") * supervised


def solution_score(probabilities: torch.Tensor, how: str) -> torch.Tensor:
    """A solution's score from the probabilities [S] that its steps are right."""
    return probabilities.prod() if how == "product" else probabilities.min()


def normalisation_constants(scores: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [N, 1] that reference scores [N, R] of each member are to be normalised by."""
    mean, std = scores.mean(1, keepdim=True), scores.std(1, correction=0, keepdim=True).clamp(min=1e-6)
    return mean if how != "none" else torch.zeros_like(mean), std if how == "scale" else torch.ones_like(std)


def aggregate_scores(scores: torch.Tensor, how: str = "mean", penalty: float = 0.5) -> torch.Tensor:
    """One score from those of N members. scores [N, B], normalised; returns [B].

    mean; min: the worst case; uwo: mean − penalty · (population) variance, uncertainty-weighted (Coste et al.).
    """
    if how == "min":
        return scores.amin(0)
    return scores.mean(0) - (penalty * scores.var(0, correction=0) if how == "uwo" else 0)


def calibration_error(confidence: torch.Tensor, right: torch.Tensor, bins: int = 10) -> float:
    """Expected calibration error: |mean confidence − share right| in equal bins over [½, 1], weighted by their size."""
    which = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins).index_add(0, which, confidence - right.float())
    return float(gaps.abs().sum() / len(confidence))


def judged_probability(first: float, swapped: float) -> float:
    """Probability that response 1 is better, from P(option A) with response 1 as A, and with response 2 as A."""
    return (first + 1 - swapped) / 2


# ---------------------------------------------------------------------------------------------- data


COLUMNS = {
    "outcome": (("chosen", "rejected"), ("prompt", "completions"), ("prompt", "chosen", "rejected")),
    "process": (("prompt", "completions", "labels"),),
    "judge": (("chosen", "rejected"), ("prompt",), ("question",)),
    "reference": (("messages",), ("prompt", "completion"), ("question", "answer")),
}
PRINCIPLE = "Choose the answer that is more helpful, honest and harmless."


class Comparison(NamedTuple):
    """Completions of a prompt, best first, as text or messages."""

    prompt: str | list[dict]
    completions: list[str | list[dict]]
    margin: float = 0.0
    probability: float = 1.0


class Encoded(NamedTuple):
    """A prompt and what is scored behind it, as token ids. `ends` are the lengths at which a score is read."""

    prompt: list[int]
    completions: list[list[int]]  # outcome: best first; process: one, all steps with their separators
    ends: list[list[int]]  # outcome: the length of each completion; process: where each step ends
    labels: list[bool] = []  # process: whether each step is right
    margin: float = 0.0
    probability: float = 1.0

    def tokens(self) -> list[int]:
        return self.prompt + [token for ids in self.completions for token in ids]

    def count(self) -> int:
        return sum(map(len, self.ends))


def transcript(text: str, where: str) -> list[dict]:
    """Messages of a text in HH-RLHF's form, "\\n\\nHuman: …\\n\\nAssistant: …"."""
    pieces = re.split(r"\n\n(Human|Assistant):", text)[1:]
    if not pieces:
        sys.exit(f"{where}: without a prompt column, chosen and rejected must be messages or Human/Assistant turns.")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": said.strip()} for name, said in zip(pieces[::2], pieces[1::2])]


def content(completion: str | list[dict]) -> str:
    """What is said in a completion."""
    texts = [completion] if isinstance(completion, str) else [m.get("content") or "" for m in completion]
    return "".join(texts).strip()


def read_comparison(row: dict, where: str) -> Comparison | str:
    """The comparison a row states, or why it states none. Labels outside their range end the run."""
    if row.get("chosen") is None or row.get("rejected") is None:
        completions = row["completions"]
        if not isinstance(completions, list) or len(completions) < 2:
            sys.exit(f"{where}: completions must be a list of at least two, ranked best first.")
        prompts = [row["prompt"]]
    else:
        prompts, completions = [], []
        for side in (row["chosen"], row["rejected"]):
            prompt = row.get("prompt")
            side = transcript(side, where) if isinstance(side, str) and prompt is None else side
            if isinstance(side, list) and (prompt is None or side and side[0].get("role") != "assistant"):
                prompt, side = side[:-1], side[-1:]  # a whole conversation, whose last turn is what is compared
            prompts.append(prompt)
            completions.append(side)
    probability, margin = row.get("chosen_probability"), row.get("margin")
    probability, margin = 1.0 if probability is None else probability, 0.0 if margin is None else margin
    if not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
        sys.exit(f"{where}: chosen_probability must lie between 0 and 1, found {probability!r}.")
    if not isinstance(margin, (int, float)) or not math.isfinite(margin):
        sys.exit(f"{where}: margin must be a number, found {margin!r}.")
    if any(prompt != prompts[0] for prompt in prompts):  # detail 6
        return "their prompts differ"
    texts = [content(completion) for completion in completions]
    if not all(texts):
        return "a completion is empty"
    if len(set(texts)) < len(texts):
        return "two completions are equal"
    if probability < 0.5:  # detail 5
        completions, margin, probability = completions[::-1], -margin, 1 - probability
    return Comparison(prompts[0], completions, float(margin), float(probability))


def encode_comparison(tokenizer, comparison: Comparison) -> Encoded | str:
    """Token ids of a comparison: the prompt once, and each completion up to the conversation's last token."""
    prompt, completions = comparison.prompt, []
    try:
        before = encode_prompt(tokenizer, prompt)
        for completion in comparison.completions:
            if not tokenizer.chat_template and isinstance(prompt, str) and isinstance(completion, str):
                ids = before + encode_continuation(tokenizer, prompt, completion)[1]
            else:
                chat = as_messages(prompt, "user") + as_messages(completion, "assistant")
                ids = render_chat(tokenizer, chat).ids
            if ids[: len(before)] != before:
                return "their turns do not continue the prompt in the chat template"
            completions.append(ids[len(before) :])
    except (TemplateError, TypeError, ValueError):  # also the empty conversation before an opening assistant
        return "the chat template refuses them"
    return Encoded(
        before, completions, [[len(ids)] for ids in completions], [], comparison.margin, comparison.probability
    )


def encode_solution(tokenizer, row: dict, where: str, separator: str) -> Encoded | str:
    """Token ids of a solution, steps and separators tokenised apart, with the place where each step ends."""
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
        sys.exit(f"{where}: completions and labels must be lists of the same length, a label for every step.")
    if any(not isinstance(step, str) for step in steps) or any(label not in (0, 1) for label in labels):
        sys.exit(f"{where}: steps must be texts and labels true or false (decide first what a neutral rating is).")
    if not steps or not all(step.strip() for step in steps):
        return "a step is empty"
    ids, ends = [], []
    for step in steps:
        ids += [i for text in (step, separator) for i in encode_text(tokenizer, text, begins=False)]  # detail 10
        ends.append(len(ids))
    try:
        prompt = encode_prompt(tokenizer, row["prompt"])
    except (TemplateError, TypeError, ValueError):
        return "the chat template refuses them"
    return Encoded(prompt, [ids], [ends], [bool(label) for label in labels])


def encode_examples(tokenizer, rows: list[dict], source: str, args: Args, context: int) -> list[Encoded]:
    """All rows as examples; those that teach nothing or are too long are dropped, counted and named."""
    examples, dropped = [], Counter()
    longest = f"over --max-prompt-tokens {args.max_prompt_tokens}, --max-completion-tokens {args.max_completion_tokens}"
    for number, row in enumerate(tqdm(rows, desc=f"tokenising {Path(source).name}", leave=False, disable=None), 1):
        where = f"{source}, row {number}"
        if args.kind == "process":
            example = encode_solution(tokenizer, row, where, args.step_separator)
        else:
            read = read_comparison(row, where)
            example = read if isinstance(read, str) else encode_comparison(tokenizer, read)
        if isinstance(example, Encoded):
            width = max(map(len, example.completions))
            if len(example.prompt) > args.max_prompt_tokens or width > args.max_completion_tokens:
                example = f"they are too long ({longest})"
            elif len(example.prompt) + width > context:
                example = f"they are longer than the model's context of {context}"
        if isinstance(example, Encoded):
            examples.append(example)
        else:
            dropped[example] += 1  # detail 6
    if dropped:
        reasons = ", ".join(f"{count} because {reason}" for reason, count in dropped.items())
        print(f"{source}: {dropped.total()} of {len(rows)} rows dropped: {reasons}.")
    if not examples:
        sys.exit(f"{source}: no row is left (see the line above for what was dropped and why).")
    return examples


def row_messages(row: dict) -> tuple[list[dict], list[dict]]:
    """The messages of a row up to its last assistant turn, and that turn."""
    if "messages" in row:
        return row["messages"][:-1], row["messages"][-1:]
    if "prompt" in row and "completion" in row:
        return as_messages(row["prompt"], "user"), as_messages(row["completion"], "assistant")
    return as_messages(row["question"], "user"), as_messages(row["answer"], "assistant")


def encode_references(tokenizer, args: Args, held_out: list[Encoded], context: int) -> list[Encoded]:
    """The completions on which scores are normalised: demonstrations, or else the better held-out ones."""
    source = args.reference_dataset or (str(TINY / "demonstrations_test.jsonl") if args.dataset is None else None)
    if args.kind == "process" or args.normalisation == "none":
        return []
    if source is None:
        return [e._replace(completions=e.completions[:1], ends=e.ends[:1]) for e in held_out]
    subset = args.subset if source == args.dataset else None
    rows = load_rows(source, subset, args.split, COLUMNS["reference"])[: args.eval_rows]
    pairs = [row_messages(row) for row in rows]
    if not tokenizer.chat_template:
        pairs = [("".join(m["content"] for m in before), after[0]["content"]) for before, after in pairs]
    examples = [encode_comparison(tokenizer, Comparison(prompt, [completion])) for prompt, completion in pairs]
    examples = [e for e in examples if isinstance(e, Encoded) and len(e.tokens()) <= context]
    if not examples:
        sys.exit(f"--reference-dataset {source}: none of its rows can be scored.")
    return examples


def pack_examples(examples: list[Encoded]) -> tuple[Packed, torch.Tensor]:
    """Examples as one packed row, and where in it their scores are read [S]."""
    segments, positions, total = [], [], 0
    for example in examples:
        prefix = len(segments)
        segments.append(Segment(example.prompt, [False] * len(example.prompt)))
        total += len(example.prompt)
        for ids, ends in zip(example.completions, example.ends):
            segments.append(Segment(ids, [False] * len(ids), prefix))  # detail 3
            positions += [total + end - 1 for end in ends]  # detail 1
            total += len(ids)
    return pack(segments), torch.tensor(positions)


# ---------------------------------------------------------------------------------------------- AI feedback


def judge_question(prompt: str | list[dict], first: str, second: str, principle: str) -> str:
    """What the judge is asked."""
    turns = "\n".join(f"{m['role'].capitalize()}: {content([m])}" for m in as_messages(prompt, "user"))
    return (
        f"Which answer to this conversation is better? {principle}\n\n{turns}\n\n"
        f"Answer A: {first}\n\nAnswer B: {second}\n\nReply with A or B."
    )


def check_principles(args) -> None:
    """--principles must be a file that says something, and --judge there to read it."""
    if args.principles and not args.judge:
        sys.exit("--principles are shown to a judge: name one with --judge.")
    if args.principles and not (Path(args.principles).is_file() and Path(args.principles).read_text().strip()):
        sys.exit(f"--principles {args.principles}: no such file, or no principle in it (one a line).")


def last_hidden_states(model, rows: list[list[int]], device) -> torch.Tensor:
    """Hidden states [R, d] at the last token of each row, which no padding can displace: rows are packed."""
    packed = pack([Segment(row, [False] * len(row)) for row in rows]).to(device)
    last = torch.tensor([len(row) for row in rows], device=device).cumsum(0) - 1
    return hidden_states(model, packed)[last]


def load_judge(args, device, bfloat16: bool):
    """What --judge names, as a function from (prompt, answer, answer) triples to two probabilities each: that option A
    is better with the first answer as A, and with the second as A. None where its context is too short."""
    principles = Path(args.principles).read_text().splitlines() if args.principles else [PRINCIPLE]
    principles = [line.strip() for line in principles if line.strip()]
    tokenizer = load_tokenizer(args.judge, flag="--judge")
    context = context_length(load_config(args.judge, args.trust_remote_code, "--judge"))
    judge = load_model(replace(args, model=args.judge), device).requires_grad_(False)
    opening = encode_text(tokenizer, "The better answer is Answer ", begins=False)
    options = [encode_text(tokenizer, option, begins=False)[-1] for option in "AB"]
    head = judge.get_output_embeddings()
    weight, bias = head.weight[options], None if head.bias is None else head.bias[options]

    @torch.no_grad()
    def readings(triples: list[tuple], numbers: list[int]) -> list[tuple[float, float] | None]:
        """`numbers` counts the triples over all processes: each in turn is judged by the next principle."""
        ids = [
            encode_prompt(tokenizer, judge_question(prompt, *order, principles[number % len(principles)])) + opening
            for number, (prompt, first, second) in zip(numbers, triples)
            for order in ((first, second), (second, first))
        ]
        fits = [max(len(ids[i]), len(ids[i ^ 1])) <= context for i in range(len(ids))]
        found, kept = [None] * len(ids), [i for i in range(len(ids)) if fits[i]]
        with tqdm(total=len(kept), desc="judging", leave=False, disable=None) as bar:
            for part in split_by_tokens([ids[i] for i in kept], args.microbatch_tokens):
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
                    hidden = last_hidden_states(judge, [ids[kept[j]] for j in part], device)
                    logits = head_logits(hidden, weight, bias, hidden.dtype, logit_shape(judge))
                for j, probability in zip(part, logits.softmax(-1)[:, 0].tolist()):
                    found[kept[j]] = probability
                bar.update(len(part))
        return [(a, b) if a is not None else None for a, b in zip(found[::2], found[1::2])]

    return readings


def complete_prompts(args: Args, tokenizer, rows: dict[int, dict], device, context: int, bfloat16: bool):
    """Numbered rows that hold a prompt only, each with two samples of --model as its pair."""
    model = load_model(args, device)
    sampler = Sampler(model, stop_token_ids(tokenizer, model), torch.bfloat16 if bfloat16 else torch.float32)
    prompts = {i: row["prompt"] if row.get("prompt") is not None else row["question"] for i, row in rows.items()}
    ids = {}
    for i, prompt in prompts.items():
        try:
            ids[i] = encode_prompt(tokenizer, prompt)
        except (TemplateError, TypeError, ValueError):  # what the template refuses cannot be asked
            ids[i] = []
    kept = [i for i in rows if 0 < len(ids[i]) <= min(args.max_prompt_tokens, context - 1)]
    budgets = [min(args.max_completion_tokens, context - len(ids[i])) for i in kept]
    with tqdm(total=2 * len(kept), desc="sampling", leave=False, disable=None) as bar:
        groups = sampler.generate(
            [ids[i] for i in kept], budgets, 2, args.temperature, args.seed, indices=kept, progress=bar.update
        )
    texts = [[tokenizer.decode(c.ids, skip_special_tokens=True) for c in group] for group in groups]
    pairs = {i: {"prompt": prompts[i], "chosen": first, "rejected": second} for i, (first, second) in zip(kept, texts)}
    given = {i: {name: value for name, value in rows[i].items() if name != "margin"} for i in pairs}
    return {i: {**given[i], **pair} for i, pair in pairs.items()}


def ai_feedback(args: Args, rows: list[dict], tokenizer, run: Run, context: int, parallel: tuple) -> list[dict]:
    """Rows labelled by the judge, the processes sharing the work, as preference rows with soft labels. They are also
    written into the run's folder, with what else the rows held."""
    path, (device, rank, world, bfloat16) = run.folder / "labelled.jsonl", parallel
    kept = [path.read_text() if args.resume and run.is_main and path.exists() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(kept)
    if kept[0] is not None:
        return [json.loads(line) for line in kept[0].split("\n") if line]
    mine = {i: rows[i] for i in range(rank, len(rows), world)}
    if bare := {i: row for i, row in mine.items() if row.get("chosen") is None or row.get("rejected") is None}:
        mine = {i: mine[i] for i in mine.keys() - bare.keys()}
        mine |= complete_prompts(args, tokenizer, bare, device, context, bfloat16)
    read = {i: read_comparison({**mine[i], "chosen_probability": 1.0}, f"{args.dataset}, row {i + 1}") for i in mine}
    pairs = {i: pair for i, pair in read.items() if isinstance(pair, Comparison)}
    triples = [(pair.prompt, *map(content, pair.completions)) for pair in pairs.values()]
    readings = load_judge(args, device, bfloat16)(triples, list(pairs))  # detail 11
    judged = [(i, mine[i], pairs[i], *reading) for i, reading in zip(pairs, readings) if reading is not None]
    shares = [judged]
    if dist.is_initialized():
        shares = [None] * world
        dist.all_gather_object(shares, judged)
    judged = sorted((row for share in shares for row in share), key=lambda row: row[0])
    labelled = []
    for _, row, pair, first, swapped in judged:
        probability = judged_probability(first, swapped)
        sign, (chosen, rejected) = (1, pair.completions) if probability >= 0.5 else (-1, pair.completions[::-1])
        pair_row = {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}
        if pair.margin:  # detail 5: turned with the pair
            pair_row["margin"] = sign * pair.margin
        labelled.append({**row, **pair_row, "chosen_probability": max(probability, 1 - probability)})
    if run.is_main:
        report_flips([row[3:] for row in judged], len(rows))
        write_whole(path, "".join(json.dumps(row, default=str) + "\n" for row in labelled))
    return labelled


def report_flips(readings: list[tuple[float, float]], given: int) -> None:
    """How often the judge's choice follows the order instead of the answers."""
    flips = sum((first > 0.5) == (swapped > 0.5) for first, swapped in readings) / max(len(readings), 1)
    opening = sum(p > 0.5 for reading in readings for p in reading) / max(2 * len(readings), 1)
    print(f"The judge labelled {len(readings)} of {given} pairs; in {flips:.0%} its choice flips with the order.")
    if flips > 0.5:
        print(
            f"Warning: this judge mostly decides by the order (flip rate {flips:.0%}; the option shown first wins in "
            f"{opening:.0%} of all readings), so its labels say little. Take a stronger judge or clearer principles.",
            file=sys.stderr,
        )


# ---------------------------------------------------------------------------------------------- scoring and reports


def score_examples(model, examples: list[Encoded], device, bfloat16: bool) -> torch.Tensor:
    """Scores [S] of the completions or steps of `examples`, end to end, float32 with gradient."""
    packed, positions = pack_examples(examples)
    # A forward needs each weight once, so keeping its bfloat16 copy for another use would only take memory.
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
        if hasattr(model, "sharded_scores"):  # FSDP gathers weights only around methods registered with it
            return model.sharded_scores(packed.to(device), positions.to(device))
        return local_scores(model, packed.to(device), positions.to(device))


def local_scores(model, packed: Packed, positions: torch.Tensor) -> torch.Tensor:
    """Scores of a model whose weights this process holds, or has gathered."""
    hidden = hidden_states(model, packed)[positions]
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.float())[:, 0]


@torch.no_grad()
def score_all(models, examples: list[Encoded], args: Args, device, rank: int, world: int, bfloat16: bool) -> list:
    """Scores [N, s] of every example by each of the N members; the processes share the work."""
    mine = examples[rank::world]
    parts = split_by_tokens([e.tokens() for e in mine], args.microbatch_tokens)
    rounds = int(reduce_over_processes([len(parts)], device, maximum=True)[0])
    found: list[torch.Tensor] = []
    for i in range(rounds):
        part = [mine[j] for j in parts[i]] if i < len(parts) else examples[:1]
        scores = torch.stack([score_examples(model, part, device, bfloat16) for model in models]).cpu()  # [N, S]
        found += scores.split([e.count() for e in part], dim=1) if i < len(parts) else []
    shares = [found]
    if dist.is_initialized():
        shares = [None] * world
        dist.all_gather_object(shares, found)
    return [shares[i % world][i // world] for i in range(len(examples))]


def outcome_loss(scores: torch.Tensor, examples: list[Encoded], centering: float) -> tuple[torch.Tensor, dict]:
    """Sum over prompts of the mean loss of their pairs, and sums for the log. scores [S]."""
    better, worse, owner, weight = (x.to(scores.device) for x in ranked_pairs([len(e.ends) for e in examples]))
    margin = torch.tensor([e.margin for e in examples], device=scores.device)[owner]
    probability = torch.tensor([e.probability for e in examples], device=scores.device)[owner]
    losses = preference_loss(scores[better], scores[worse], margin, probability, centering)
    difference = (scores[better] - scores[worse]).detach()
    sums = {"preference/accuracy": ((difference > 0) * weight).sum(), "preference/margin": (difference * weight).sum()}
    return (losses * weight).sum(), sums


def step_loss(scores: torch.Tensor, examples: list[Encoded]) -> tuple[torch.Tensor, dict]:
    """Sum of the losses of all steps that have a target, and sums for the log. scores [S]."""
    labels = torch.tensor([float(label) for e in examples for label in e.labels], device=scores.device)
    supervised = [flag for e in examples for flag in supervised_steps(e.labels)]
    supervised = torch.tensor(supervised, dtype=torch.float32, device=scores.device)
    right = ((scores > 0) == (labels > 0.5)) * supervised
    return process_loss(scores, labels, supervised).sum(), {"process/accuracy": right.sum()}


def targets(examples: list[Encoded], kind: str) -> int:
    """What the losses of an optimizer step are divided by: its prompts, or its steps that have a target."""
    return len(examples) if kind == "outcome" else sum(sum(supervised_steps(e.labels)) for e in examples)  # detail 4


def outcome_report(scores: list[torch.Tensor], examples: list[Encoded]) -> tuple[dict, dict]:
    """What held-out pairs tell, and the scores of better and worse completions. scores: [K] per example."""
    flat = torch.cat(scores)
    better, worse, owner, weight = ranked_pairs([len(e.ends) for e in examples])
    loss, _ = outcome_loss(flat, examples, 0.0)
    difference = flat[better] - flat[worse]
    right = difference > 0  # a tie is wrong
    lengths = torch.tensor([float(len(ids)) for e in examples for ids in e.completions])
    longer = lengths[better] - lengths[worse]
    report = {
        "eval/loss": float(loss) / len(examples),
        "eval/accuracy": float((right * weight).sum()) / len(examples),
        "eval/margin": float((difference * weight).sum()) / len(examples),
        "eval/calibration_error": calibration_error(difference.abs().sigmoid(), right),
    }
    for name, group in (("longer", longer > 0), ("shorter", longer < 0)):
        if group.any():
            report[f"eval/accuracy_chosen_{name}"] = float(right[group].float().mean())
    if lengths.std(correction=0) > 0 and flat.std(correction=0) > 0:
        report["eval/length_correlation"] = float(torch.corrcoef(torch.stack([flat, lengths]))[0, 1])
    return report, {"chosen": flat[better], "rejected": flat[worse]}


def process_report(scores: list[torch.Tensor], examples: list[Encoded], how: str) -> tuple[dict, dict]:
    """What held-out solutions tell, and the probabilities of right and wrong steps. scores: [S] per example."""
    loss, sums = step_loss(torch.cat(scores), examples)
    count = targets(examples, "process")
    found = [supervised_steps((s > 0).tolist()).count(True) for s in scores]  # the first step held to be wrong
    known = [supervised_steps(e.labels).count(True) for e in examples]
    whole = [(s > 0).all().item() == all(e.labels) for s, e in zip(scores, examples)]
    located = [f == k and w for f, k, w in zip(found, known, whole)]
    solutions = torch.stack([solution_score(s.sigmoid(), how) for s in scores])
    is_right = torch.tensor([all(e.labels) for e in examples])
    report = {
        "eval/loss": float(loss) / count,
        "eval/accuracy": float(sums["process/accuracy"]) / count,
        "eval/first_error_accuracy": sum(located) / len(located),
    }
    if is_right.any() and not is_right.all():  # the share of (right, wrong) solutions that the score orders
        above = solutions[is_right][:, None] - solutions[~is_right]
        report["eval/solution_accuracy"] = float((above > 0).float().mean())
        wrong = [hit for hit, right in zip(located, is_right.tolist()) if not right]
        report["eval/first_error_accuracy_wrong"] = sum(wrong) / len(wrong)
    flags = torch.tensor([label for e in examples for label in e.labels])
    flags_used = torch.tensor([flag for e in examples for flag in supervised_steps(e.labels)])
    probabilities = torch.cat(scores).sigmoid()
    return report, {"right": probabilities[flags & flags_used], "wrong": probabilities[~flags & flags_used]}


def draw_scores(run: Run, step: int, groups: dict[str, torch.Tensor]) -> None:
    """scores.png and TensorBoard: histograms of the held-out scores of better and worse completions or steps."""
    groups = {name: values[values.isfinite()] for name, values in groups.items()}
    groups = {name: values for name, values in groups.items() if len(values)}  # there may be no wrong step at all
    if not run.is_main or not groups:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="tight")
    axis = figure.subplots()
    axis.hist([values.numpy() for values in groups.values()], bins=30, label=list(groups))
    axis.set(xlabel="score", ylabel="held-out count", title=f"step {step}")
    axis.legend()
    figure.savefig(run.folder / "scores.png", dpi=110)
    run.writer.add_figure("eval/scores", figure, step)
    for name, values in groups.items():
        run.writer.add_histogram(f"eval/scores_{name}", values, step)


# ---------------------------------------------------------------------------------------------- main


def main(args: Args) -> dict:
    args = resumed_args(args, "reward_model")
    check_reward_model_args(args)
    device, rank, world = start_processes(args.device)
    stop = catch_stop_signals()
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    outcome_shown = {"loss/train": "loss", "eval/accuracy": "accuracy", "eval/margin": "margin"}
    process_shown = {"loss/train": "loss", "eval/accuracy": "step accuracy", "eval/first_error_accuracy": "first error"}
    start_run = partial(Run, args, "reward_model", rank, outcome_shown if args.kind == "outcome" else process_shown)

    # Data, before any model is loaded.
    embedded = str(TINY / ("steps" if args.kind == "process" else "preferences"))
    source = args.dataset or f"{embedded}_train.jsonl"
    rows = load_rows(source, args.subset, args.split, COLUMNS["judge" if args.judge else args.kind])
    held_out_source = args.eval_dataset or (f"{embedded}_test.jsonl" if args.dataset is None else None)
    if held_out_source:
        held_out = load_held_out(args, held_out_source, COLUMNS[args.kind])[: args.eval_rows]
    tokenizer = load_tokenizer(args.model)
    context = context_length(load_config(args.model, args.trust_remote_code))
    run = None
    if args.judge:  # before the rest, because its labels are written into the run's folder
        run = start_run()
        rows = ai_feedback(args, rows, tokenizer, run, context, (device, rank, world, bfloat16))
    if not held_out_source:
        held_out_source = f"rows held out of {source}"
        rows, held_out = hold_out(rows, args)
    train = encode_examples(tokenizer, rows, source, args, context)
    held_out = encode_examples(tokenizer, held_out, held_out_source, args, context)
    references = encode_references(tokenizer, args, held_out, context)
    steps = args.steps or max(1, math.ceil(args.epochs * len(train) / args.batch_size))

    # Members, each with its optimizer and its order of the data; run folder.
    members = torch.nn.ModuleList()
    optimizers, orders = [], []
    for k in range(args.ensemble_size):  # detail 8
        members.append(shard_reward_model(load_reward_backbone(args, device, k), world))
        settings = {"weight_decay": args.weight_decay, "betas": (0.9, 0.95), "fused": True}
        optimizers.append(torch.optim.AdamW(members[k].parameters(), **settings))
        shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + k)  # detail 12
        passes = math.ceil(steps * args.batch_size / len(train))
        orders.append(torch.cat([torch.randperm(len(train), generator=shuffle) for _ in range(passes)]).tolist())
    run = run or start_run()
    constants = [torch.zeros(len(members), 1), torch.ones(len(members), 1)]  # of normalisation, set by evaluate()

    def evaluate(step: int) -> tuple[dict, list[dict]]:
        share = (args, device, rank, world, bfloat16)
        if references:
            reference_scores = torch.cat(score_all(members, references, *share), dim=1)  # [N, R]
            constants[:] = normalisation_constants(reference_scores, args.normalisation)  # detail 7
            run.carried["normalisation"] = [values.tolist() for values in constants]
        normal = [(s - constants[0]) / constants[1] for s in score_all(members, held_out, *share)]  # detail 8
        scores = [aggregate_scores(s, args.ensemble_score, args.disagreement_penalty) for s in normal]
        if args.kind == "outcome":
            report, groups = outcome_report(scores, held_out)
        else:
            report, groups = process_report(scores, held_out, args.step_aggregation)
        if len(members) > 1:
            report["eval/disagreement"] = float(torch.cat(normal, dim=1).std(0, correction=0).mean())
        draw_scores(run, step, groups)
        return report, scored_samples(tokenizer, held_out[:16], scores, args)

    first = load_checkpoint(run, members, optimizers, steps) if args.resume else 0
    if "normalisation" in run.carried:
        constants[:] = map(torch.tensor, run.carried["normalisation"])
    if not args.resume:
        run.log(0, *evaluate(0))

    for step in range(first + 1, steps + 1):
        began = time.perf_counter()
        rate = learning_rate_at(step, steps, args)
        sums, grad_norms = Counter(), []
        for model, optimizer, order in zip(members, optimizers, orders):
            batch = [train[i] for i in order[(step - 1) * args.batch_size : step * args.batch_size]]
            total, mine = targets(batch, args.kind), batch[rank::world]
            parts = split_by_tokens([e.tokens() for e in mine], args.microbatch_tokens)
            rounds = int(reduce_over_processes([len(parts)], device, maximum=True)[0])
            member_loss = 0.0
            for i in range(rounds):
                # A process with fewer microbatches than another repeats its last with weight zero: sharded weights
                # are gathered by all processes together.
                micro, weight = [mine[j] for j in parts[min(i, len(parts) - 1)]], float(i < len(parts))
                scores = score_examples(model, micro, device, bfloat16)  # [S]
                if args.kind == "outcome":
                    loss, counted = outcome_loss(scores, micro, args.centering)
                else:
                    loss, counted = step_loss(scores, micro)
                loss = loss * weight / total  # detail 4
                (loss * world).backward()  # gradients are averaged over processes, the loss is a sum over them
                member_loss += loss.item()
                for name, value in counted.items():
                    sums[name] += float(value) * weight / total / len(members)
            sums["loss/train"] += require_finite(run, step, member_loss, device) / len(members) / world
            sums["tokens"] += sum(len(e.tokens()) for e in mine)
            grad_norms.append(optimizer_step(model, optimizer, args.max_grad_norm, rate))

        sums = sum_over_processes(sums, device)
        elapsed = time.perf_counter() - began
        metrics, samples = (
            {
                **{name: value for name, value in sums.items() if name != "tokens"},
                "optim/grad_norm": sum(grad_norms) / len(grad_norms),
                "optim/learning_rate": rate,
                "throughput/tokens_per_second": sums["tokens"] / elapsed,
                "time/step": elapsed,
                "memory/peak_gb": peak_memory_gb(device),
            },
            [],
        )
        stopping = stop_requested(stop, device)
        if is_due(step, args.eval_every, steps) and (step == steps or not stopping):
            scores, samples = evaluate(step)
            metrics |= scores
        run.log(step, metrics, samples)
        if is_due(step, args.save_every, steps) or stopping:
            save_checkpoint(run, step, members, optimizers)
        if stopping and step < steps:
            return run.finish(f"python reward_model.py --resume {run.folder}", stopped=stopping)

    endings = {e.completions[0][-1] for e in train}
    save_reward_models(run, members, tokenizer, constants, endings, bfloat16)
    if args.kind == "process":
        return run.finish("python reward_model.py")
    policy = "" if args.model == Args.model else f" --model {args.model}"
    return run.finish(f"python ppo.py{policy} --reward-model {run.folder / 'model'}")


def check_reward_model_args(args: Args) -> None:
    """Refuse settings that cannot work together, before anything is loaded."""
    if min(args.batch_size, args.microbatch_tokens, args.ensemble_size, args.eval_rows) < 1:
        sys.exit("--batch-size, --microbatch-tokens, --ensemble-size and --eval-rows must be at least 1.")
    if args.judge and args.kind == "process":
        sys.exit("--judge compares whole answers: it goes with --kind outcome only.")
    check_principles(args)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        sys.exit(f"--batch-size {args.batch_size} cannot be divided among {world} processes; take a multiple of it.")


def scored_samples(tokenizer, examples: list[Encoded], scores: list[torch.Tensor], args: Args) -> list[dict]:
    """Held-out completions with their scores, for samples.jsonl."""
    samples = []
    for example, values in zip(examples, scores):
        prompt = tokenizer.decode(example.prompt, skip_special_tokens=True)
        if args.kind == "process":
            values = solution_score(values.sigmoid(), args.step_aggregation)[None]
        for rank, (ids, value) in enumerate(zip(example.completions, values.tolist()), 1):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            samples.append({"prompt": prompt, "completion": text, "reward": value, "rank": rank})
    return samples


def load_reward_backbone(args: Args, device, member: int):
    """The language model that `args` names with a scalar head, in float32, attention decided by the batch's layout."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # that the head is new is no news here
    config = load_config(args.model, args.trust_remote_code)  # detail 2: dropout off
    config.num_labels = 1
    options = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            args.model, config=config, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"--model {args.model}: no model with a scalar head could be made of it ({first_line(error)}).")
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        sys.exit(f"--model {args.model}: a {type(model).__name__} has no linear head named `score`; use a decoder.")
    if "score.weight" in info["missing_keys"]:
        head = torch.Generator().manual_seed(args.seed * 1_000_003 + member)  # detail 8, detail 12
        torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5, generator=head)  # detail 2
    use_layout(model.to(device).eval())
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train(args.gradient_checkpointing)


def shard_reward_model(model, world: int):
    """FSDP2: spread a model with a score head over the processes, layer by layer, around the method that gives scores.
    Weights are gathered in float32 and autocast rounds them, as in one process."""
    if world > 1:
        for module in [m for m in model.modules() if type(m).__name__ in set(model._no_split_modules or [])]:
            fully_shard(module)
        fully_shard(model)
        model.sharded_scores = partial(local_scores, model)
        register_fsdp_forward_method(model, "sharded_scores")
    return model


def save_reward_models(run: Run, members, tokenizer, constants, endings: set[int], bfloat16: bool) -> None:
    """model/, and model/member_k for the rest of an ensemble: weights, tokenizer, and a config with the constants."""
    options, part = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True), run.folder / ".writing-model"
    if run.is_main:
        shutil.rmtree(part, ignore_errors=True)
    for k, model in enumerate(members):
        state = sharded.get_model_state_dict(model, options=options)
        if not run.is_main:
            continue
        folder = part / (f"member_{k}" if k else "")
        config = model.config
        config.dtype = torch.bfloat16 if bfloat16 else torch.float32
        config.reward_kind, config.reward_members = run.args.kind, len(members)
        config.reward_mean, config.reward_std = (float(values[k]) for values in constants)  # detail 7
        if run.args.kind == "process":
            config.reward_separator, config.reward_aggregation = run.args.step_separator, run.args.step_aggregation
        # transformers finds the last token as the last one that is not the pad token. Where conversations end on
        # that very token, no pad token is named, so that a batch is refused instead of read at the wrong place.
        pad = tokenizer.pad_token_id
        config.get_text_config().pad_token_id = None if pad in endings else pad
        weights = {
            name: value.to(config.dtype) if value.is_floating_point() and not name.startswith("score.") else value
            for name, value in state.items()
        }  # the head stays float32, with which the constants were measured
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    if run.is_main:
        shutil.rmtree(run.folder / "model", ignore_errors=True)
        part.rename(run.folder / "model")


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
