"""DAPO: GRPO with the five changes that let long reasoning go on improving.

For every prompt the policy writes G completions, each judged against its siblings, as in grpo.py; DAPO mends what
stalls that: clipping that holds rare tokens down, groups that teach nothing, long answers that count too little, and
noise from answers that were cut. Signal: whether the final answer is right, +1 or −1. Optimizer: a clipped policy
gradient with the group as baseline, several updates per rollout. Leash: none but the clip; there is no KL and no
reference. Defence against reward hacking: the reward is the truth itself, and overlong answers cost.

    keep a prompt only if 0 < #right < G, and sample until the batch is full                       (dynamic sampling)
    r_i = ±1 + overlong_i,  overlong = clip((L_max − L_cache − |y_i|) / L_cache, −1, 0)     (soft overlong punishment)
    A_i = (r_i − mean(r)) / std(r)
    loss = −Σ_i Σ_t m_it · min(ρ_it·A_i, clip(ρ_it, 1−ε_low, 1+ε_high)·A_i) / Σ_i Σ_t m_it       (token-level loss)
    ε_low = 0.2 < ε_high = 0.28  (clip-higher);   m_it = 0 where an answer was cut               (overlong filtering)

Paper: DAPO (arXiv:2503.14476). With all five switched off this is GRPO without a KL:

    python dapo.py                                                                   # laptop, embedded model, 1 minute
    python dapo.py --clip-high 0.2 --no-dynamic-sampling --no-token-level-loss --overlong-cache 0         # plain GRPO
    python dapo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k --subset main --learning-rate 1e-6 \
        --max-completion-tokens 1024 --batch-size 64 --generation-batch-size 192     # one GPU
    torchrun --nproc-per-node 8 dapo.py --model Qwen/Qwen2.5-7B --dataset openai/gsm8k --subset main …

What to look at: `eval/accuracy` rises, and `reward/answer` with it (−1 to 1, over all groups that were generated).
`prompts/rounds` and `prompts/generated` against `prompts/trained` say what dynamic sampling costs; it grows as the
policy improves, because more and more groups are all right, until a batch can no longer be filled: then these prompts
are learned, and the run ends with a sentence and its model. `policy/clip_fraction` is above 0, since a rollout brings
several updates, with `policy/clip_high_fraction` the part that clip-higher is about. `policy/entropy_generated` falls
as the policy makes up its mind; at 0 nothing is left to explore. `reward/overlong` near 0 means that answers fit.

Implementation details that matter, each marked in the code under its number:
 1. A group whose rewards are all equal gets advantages of exactly zero, not rounding noise divided by a tiny std.
 2. Token ids and old log-probabilities are the sampler's own; nothing sampled is decoded and tokenised again.
 3. Logits are divided by the sampling temperature in every forward.
 4. The stop token is an action; masks come from lengths; a completion that was cut has no stop token.
 5. Change 1, clip-higher: the upper bound of the ratio is wider than the lower, so a rare token can become frequent.
 6. Change 2, dynamic sampling: groups are kept by accuracy, not by reward, which length would make unequal even where
    all answers are right; sampling goes on until the batch is full.
 7. Change 3, token-level loss: every token of the whole optimizer step counts the same, over all microbatches and
    processes (the paper's formula says of a group, its authors' code of the step); --no-token-level-loss is the mean
    over tokens, then sequences.
 8. Change 4, overlong filtering: a cut completion leaves the loss and its denominators, but not the group's baseline.
 9. The G completions of a prompt share its forward and backward.
10. All randomness is a function of seed, step and the number of a prompt, and a checkpoint carries the position in the
    data and the surplus, so a resumed run repeats the uninterrupted one bit for bit.
11. Change 5, soft overlong punishment: added to the reward of ±1 over the last L_cache tokens of the budget.
12. Dual clip: for a negative advantage the loss of a token never exceeds c·|A|, however far its ratio has run.
13. Rewards, groups and lengths are logged of all that was generated, since of the kept groups none is all right or
    all wrong; what stands under policy/ is of what was trained on, but for policy/entropy_generated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import shlex
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
import tyro
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from common.generation import Completion, Sampler
from common.kl import has_known_logits, kl_estimate, local_token_logprobs, token_logprobs, use_layout
from common.tokenizer import (
    encode_prompt,
    load_tokenizer,
    pack_completions,
    pad_rows,
    split_by_tokens,
    stop_token_ids,
)

TINY = Path(__file__).resolve().parent / "common" / "tiny"


@dataclass
class Args:
    # model and data
    model: str = str(TINY)
    """folder or Hub name of a causal language model"""
    dataset: str = str(TINY / "maths_train.jsonl")
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
    max_prompt_tokens: int = 512
    """rows with a longer prompt are dropped"""
    max_completion_tokens: int = 64
    """budget of a completion (L_max); 64 suits the embedded model, 1024 and more a real one"""
    trust_remote_code: bool = False
    """run code that comes with the model"""

    # the five changes to GRPO, each with its own switch
    clip_high: float = 0.28
    """1, clip-higher: ratios are clipped above 1 + clip_high; equal to --clip-low it is off"""
    dynamic_sampling: bool = True
    """2: train on groups with right and wrong answers only, and sample until the batch is full of them"""
    token_level_loss: bool = True
    """3: mean over all tokens of the step; off, over the tokens of each completion and then over completions"""
    overlong_filtering: bool = False
    """4: completions that were cut do not enter the loss; a row of the paper's ablation that its best runs leave out,
    because it overlaps with the punishment"""
    overlong_cache: int | None = None
    """5, soft overlong punishment: over the last so many tokens of the budget it falls from 0 to −1 (L_cache); by
    default a fifth of the budget, as in the paper; 0 is off"""

    # algorithm
    num_samples: int = 8
    """completions per prompt (G); 16 in the paper"""
    temperature: float = 1.0
    """of sampling, and of every log-probability in training"""
    clip_low: float = 0.2
    """ratios are clipped below 1 − clip_low"""
    dual_clip: float = 0.0
    """bound of a token's loss in units of |A| where A is negative (c; 10 in the authors' script); 0 is off"""
    minibatches: int = 4
    """optimizer steps per rollout; 16 in the paper; with one, clipping is inert"""
    generation_batch_size: int = 32
    """dynamic sampling: prompts sampled per round, over all processes; three times the batch in the authors' script"""
    max_rounds: int = 10
    """dynamic sampling: rounds after which a batch that is not full ends the run; 10 in the authors' script"""
    surplus: Literal["drop", "keep"] = "drop"
    """dynamic sampling: groups beyond the batch are dropped (the authors' script), or kept for the next steps, older
    than their weights by then, which policy/sampler_gap shows"""

    # optimisation
    steps: int = 20
    """rollouts; each brings `minibatches` optimizer steps"""
    batch_size: int = 16
    """prompts per rollout that are trained on, over all processes; 512 in the paper"""
    microbatch_tokens: int = 4096
    """tokens per forward and backward: a memory knob that does not change the result"""
    learning_rate: float = 2e-4
    """peak; 2e-4 suits the embedded model, 1e-6 a pretrained one"""
    warmup_steps: int = 2
    """rollouts of linear warm-up; 10 in the authors' script"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """how the learning rate decays to zero after the warm-up"""
    weight_decay: float = 0.1
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
    eval_every: int = 5
    """steps between evaluations; 0 evaluates before and after only"""
    eval_rows: int = 192
    """held-out questions used"""
    eval_samples: int = 4
    """completions sampled per question in evaluation"""
    output_dir: str | None = None
    """default: runs/dapo/<date>_<time>"""
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


# ---------------------------------------------------------------------------------------------- the mathematics


def standardised_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(r − mean)/std over the completions of each prompt, with the unbiased std. rewards [P, G]; returns [P, G]."""
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    all_equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return advantages.masked_fill(all_equal, 0.0)  # detail 1


def overlong_punishment(lengths: torch.Tensor, max_tokens: int, cache: int) -> torch.Tensor:
    """0 up to max_tokens − cache tokens, then falling to −1 at max_tokens, −1 beyond (eq. 13); 0 without a cache."""
    if not cache:
        return torch.zeros(lengths.shape)
    return ((max_tokens - cache - lengths) / cache).clamp(-1.0, 0.0)  # detail 11


def is_mixed(correct: list[bool]) -> bool:
    """Whether a group has right and wrong answers, so that its accuracy can teach something."""
    return 0 < sum(correct) < len(correct)  # detail 6


def dapo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate. logprobs, old_logprobs, mask [B, T], advantages [B, 1]; returns token losses, ratio [B, T]."""
    ratio = ((logprobs - old_logprobs) * mask).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # detail 5
    losses = torch.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip:  # where A is positive the loss is negative, and so below this bound anyway
        losses = torch.minimum(losses, dual_clip * advantages.abs())  # detail 12
    return losses, ratio.detach()


def mean_over_step(
    losses: torch.Tensor, mask: torch.Tensor, token_level: bool, sequences: float, tokens: float
) -> torch.Tensor:
    """One number from token losses [B, T]; `sequences` and `tokens` count what the whole optimizer step trains on.

    Token-level: Σ_i Σ_t / Σ_i T_i; else (1/N) Σ_i (1/T_i) Σ_t.
    """
    if token_level:
        return (losses * mask).sum() / max(tokens, 1)  # detail 7
    return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / max(sequences, 1)


# ---------------------------------------------------------------------------------------------- data and scoring


class Group(NamedTuple):
    """The completions of the prompt with this number in the endless shuffled data, and which of them are right."""

    number: int
    completions: list[Completion]
    correct: list[bool]


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
        except (TemplateError, ValueError):  # the latter for an empty list of messages
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


class Questions:
    """The data as an endless sequence: question number n, in passes that are each shuffled anew."""

    def __init__(self, questions: list[dict], seed: int):
        self.questions, self.seed, self.orders = questions, seed, {}

    def __getitem__(self, number: int) -> dict:
        which, place = divmod(number, len(self.questions))
        if which not in self.orders:
            shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + which)
            self.orders[which] = torch.randperm(len(self.questions), generator=shuffle).tolist()
        return self.questions[self.orders[which][place]]


def sample_groups(sampler, tokenizer, data: Questions, numbers: list[int], args: Args) -> list[Group]:
    """Groups of the questions with these numbers, sampled and judged."""
    sampling = {"num_samples": args.num_samples, "temperature": args.temperature, "seed": args.seed * 1_000_003}
    prompts = [data[n]["ids"] for n in numbers]
    groups = sampler.generate(prompts, args.max_completion_tokens, **sampling, indices=numbers)  # detail 10
    return [
        Group(n, group, [is_correct(tokenizer.decode(c.ids, skip_special_tokens=True), data[n]["gold"]) for c in group])
        for n, group in zip(numbers, groups)
    ]


def gather_groups(groups: list[Group], world: int) -> list[Group]:
    """Those of all processes, in the order of their numbers, on every process."""
    everyone = [groups]
    if world > 1:
        everyone = [[] for _ in range(world)]
        dist.all_gather_object(everyone, groups)
    return sorted((group for part in everyone for group in part), key=lambda group: group.number)


def rewards_of(groups: list[Group], args: Args) -> dict[str, torch.Tensor]:
    """Reward components of every completion, each [P, G], and their sum under "total"."""
    answer = torch.tensor([[1.0 if right else -1.0 for right in group.correct] for group in groups])
    lengths = torch.tensor([[len(c.ids) for c in group.completions] for group in groups])
    overlong = overlong_punishment(lengths, args.max_completion_tokens, args.overlong_cache)
    return {"answer": answer, "overlong": overlong, "total": answer + overlong}


@torch.no_grad()
def evaluate_answers(sampler, tokenizer, questions, args, rank: int, world: int) -> tuple[dict, list[dict], list]:
    """Gold accuracy on held-out questions: mean of `args.eval_samples` at the training temperature, and greedy.

    Returns the metrics over all processes, one sample of each of this process's questions for the log, and all that
    was sampled for these at the training temperature.
    """
    mine, indices = questions[rank::world], list(range(rank, len(questions), world))
    prompts, budget, samples = [q["ids"] for q in mine], args.max_completion_tokens, []
    with tqdm(total=len(mine) * (args.eval_samples + 1), desc="evaluating", leave=False, disable=None) as bar:
        sampling = {"num_samples": args.eval_samples, "temperature": args.temperature, "seed": args.seed}
        sampled = sampler.generate(prompts, budget, **sampling, indices=indices, progress=bar.update)
        greedy = sampler.generate(prompts, budget, temperature=0.0, progress=bar.update)
    sums = {"right": 0, "right_greedy": 0, "length": 0, "cut": 0, "sampled": 0, "known": 0}
    for question, group, best in zip(mine, sampled, greedy):
        gold = question["gold"]
        texts = [tokenizer.decode(c.ids, skip_special_tokens=True) for c in [*group, *best]]
        *right, right_greedy = [gold is not None and is_correct(text, gold) for text in texts]
        sums["right"] += sum(right) / len(group)
        sums["right_greedy"] += right_greedy
        sums["known"] += gold is not None
        sums["length"] += sum(len(c.ids) for c in group)
        sums["cut"] += sum(not c.stopped for c in group)
        sums["sampled"] += len(group)
        prompt = tokenizer.decode(question["ids"], skip_special_tokens=True)
        samples.append({"prompt": prompt, "completion": texts[0], "reward": float(right[0]), "gold": gold})
    sums = sum_over_processes(sums, sampler.device)
    metrics = {}
    if sums["known"]:
        metrics["eval/accuracy"] = sums["right"] / sums["known"]
        metrics["eval/accuracy_greedy"] = sums["right_greedy"] / sums["known"]
    metrics["eval/completion_length"] = sums["length"] / sums["sampled"]
    metrics["eval/truncated_fraction"] = sums["cut"] / sums["sampled"]
    return metrics, samples, sampled


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


def generation_metrics(generated: list[Group], elapsed: float, args: Args, device) -> dict:
    """What a step's own groups tell, kept or not; nothing where it lived on the surplus. generated: of this process."""
    if not generated:
        return {}
    logprobs = [logprob for group in generated for c in group.completions for logprob in c.logprobs]
    surprise, tokens = reduce_over_processes([-sum(logprobs), len(logprobs)], device)
    told = rollout_metrics(rewards_of(generated, args), [group.completions for group in generated], device)
    told |= {"policy/entropy_generated": surprise / tokens, "throughput/tokens_per_second": tokens / elapsed}
    return told  # detail 13


def why_unfilled(generated: list[Group], kept: int, args: Args, device) -> str:
    """What a user should know and do where a batch could not be filled. generated: of this process."""
    right, wrong = sum(all(g.correct) for g in generated), sum(not any(g.correct) for g in generated)
    right, wrong, count = reduce_over_processes([right, wrong, len(generated)], device)
    if right > 0.9 * count:
        advice = "The policy has learned these prompts: stop here, or go on with harder ones in --dataset"
    elif wrong > 0.9 * count:
        advice = (
            "The policy cannot solve these prompts, or its answers are not read: look at samples.jsonl, start with "
            "easier prompts or a better --model, or raise --num-samples or --max-completion-tokens"
        )
    else:
        advice = "Some prompts are learned and the rest are out of reach: change --dataset, or raise --num-samples"
    return (
        f"After {args.max_rounds} rounds of {args.generation_batch_size} prompts there are {kept} groups with right "
        f"and wrong answers, fewer than --batch-size {args.batch_size}: {right / count:.0%} are all right, "
        f"{wrong / count:.0%} all wrong. {advice}; more --max-rounds or a smaller --batch-size help where it is close."
    )


# ---------------------------------------------------------------------------------------------- main


def main(args: Args) -> dict:
    args = resumed_args(args, "dapo")
    if args.overlong_cache is None:
        args = replace(args, overlong_cache=args.max_completion_tokens // 5)
    check_dapo_args(args)
    device, rank, world = start_processes(args.device)
    stop = catch_stop_signals()

    # Data, before any model is loaded.
    columns = (("prompt", "answer"), ("question", "answer"))
    rows = load_rows(args.dataset, args.subset, args.split, columns)
    if args.eval_dataset or args.dataset == Args.dataset:
        held_out_source = args.eval_dataset or str(TINY / "maths_test.jsonl")
        held_out = load_held_out(args, held_out_source, columns)[: args.eval_rows]
    else:
        held_out_source = f"rows held out of {args.dataset}"
        rows, held_out = hold_out(rows, args)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    context = context_length(load_config(args.model, args.trust_remote_code))
    longest = min(args.max_prompt_tokens, context - args.max_completion_tokens)
    if longest < 1:
        sys.exit(f"--max-completion-tokens {args.max_completion_tokens} fills the model's whole context of {context}.")
    data = Questions(encode_questions(tokenizer, rows, args.dataset, longest), args.seed)
    held_out = encode_questions(tokenizer, held_out, held_out_source, longest)

    # Model, optimizer, run folder.
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    policy = load_model(args, device)
    stops = stop_token_ids(tokenizer, policy)
    policy = shard(policy, world)
    sampler = Sampler(policy, stops, torch.bfloat16 if bfloat16 else torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
    shown = {"reward/mean": "reward", "completions/length_mean": "length", "policy/entropy": "entropy"}
    run = Run(args, "dapo", rank, {**shown, "prompts/rounds": "rounds", "eval/accuracy": "accuracy"})

    data_flags = ("dataset", "subset", "split", "eval_dataset", "max_prompt_tokens", "max_completion_tokens")

    def evaluate() -> tuple[dict, list[dict]]:
        sampler.sync()
        return evaluate_answers(sampler, tokenizer, held_out, args, rank, world)[:2]

    run.carried = {"drawn": 0, "trained": 0, "surplus": []}  # numbers drawn from the data, trained on, groups left over
    first = load_checkpoint(run, policy, optimizer, args.steps) if args.resume else 0
    if not args.resume:
        run.log(0, *evaluate())

    for step in range(first + 1, args.steps + 1):
        began = time.perf_counter()

        # Sample and judge, until the batch is full of groups that can teach something.
        sampler.sync()
        drawn, rounds, generated = run.carried["drawn"], 0, []  # `generated` is of this process, `kept` of all
        kept = [Group(n, [Completion(*c) for c in group], correct) for n, group, correct in run.carried["surplus"]]
        size = args.generation_batch_size if args.dynamic_sampling else args.batch_size
        while len(kept) < args.batch_size and rounds < args.max_rounds:
            sampled = sample_groups(sampler, tokenizer, data, list(range(drawn + rank, drawn + size, world)), args)
            teaching = [group for group in sampled if is_mixed(group.correct) or not args.dynamic_sampling]
            kept += gather_groups(teaching, world)
            generated += sampled
            drawn, rounds = drawn + size, rounds + 1
        if len(kept) < args.batch_size:
            unfilled = why_unfilled(generated, len(kept), args, device)
            break
        batch, surplus = kept[: args.batch_size], kept[args.batch_size :]
        sample_time = time.perf_counter() - began

        # Score, and compare within each group.
        shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        order = torch.randperm(len(batch), generator=shuffle).view(args.minibatches, -1)
        order = order[:, rank::world]  # of every minibatch each process takes its share
        mine = [batch[i] for i in order.flatten().tolist()]
        rewards = rewards_of(mine, args)
        advantages = standardised_advantages(rewards["total"]).flatten().to(device)  # [B]
        rollout = Rollout([data[group.number]["ids"] for group in mine], [group.completions for group in mine], device)
        action_mask = rollout.mask  # [B, T]
        if args.overlong_filtering:
            stopped = torch.tensor([c.stopped for group in mine for c in group.completions], device=device)
            action_mask = action_mask * stopped[:, None]  # detail 8

        # Update.
        sums, first_sums, ratio_max, policy_losses, grad_norms = Counter(), Counter(), 0.0, [], []
        rate = learning_rate_at(step, args.steps, args)
        for chosen in torch.arange(len(mine)).view(order.shape).tolist():
            rows = rollout.rows_of(chosen)
            counts = [float(action_mask[rows].any(1).sum()), float(action_mask[rows].sum())]
            sequences, tokens = reduce_over_processes(counts, device)
            if not tokens:  # overlong filtering has left nothing: no step, for Adam moves without a gradient too
                continue
            total_loss = 0.0
            for part, weight in rollout.microbatches(rows, args.microbatch_tokens):
                logprobs, entropy = rollout.token_logprobs(policy, part, args.temperature, bfloat16)  # [b, T]
                old_logprobs, advantage = rollout.old_logprobs[part], advantages[part, None]  # [b, T], [b, 1]
                mask = action_mask[part] * weight  # [b, T]
                losses, ratio = dapo_loss(
                    logprobs, old_logprobs, advantage, mask, args.clip_low, args.clip_high, args.dual_clip
                )
                loss = mean_over_step(losses, mask, args.token_level_loss, sequences, tokens)
                (loss * world).backward()  # gradients are averaged over processes, the loss is a sum over them
                total_loss += loss.item()
                ratio_max = max(ratio_max, float((ratio * mask).max()))
                statistics = policy_statistics(logprobs, old_logprobs, None, entropy, ratio, advantage > 0, mask, args)
                statistics["clip_high_fraction"] = float(((ratio > 1 + args.clip_high) * (advantage > 0) * mask).sum())
                if args.dual_clip:
                    bounded = (ratio > args.dual_clip) * (advantage < 0)
                    statistics["dual_clip_fraction"] = float((bounded * mask).sum())
                sums.update(statistics)
                if not grad_norms:  # before the first update policy and sampler have the same weights
                    first_sums.update(statistics)
            policy_losses.append(require_finite(run, step, total_loss, device))
            grad_norms.append(optimizer_step(policy, optimizer, args.max_grad_norm, rate))

        # Log, evaluate, save.
        run.carried = {
            "drawn": drawn,
            "trained": run.carried["trained"] + len(batch),
            "surplus": surplus if args.surplus == "keep" else [],
        }
        elapsed = time.perf_counter() - began
        sums, first_sums = sum_over_processes(sums, device), sum_over_processes(first_sums, device)
        tokens = sums.pop("tokens", 0.0)
        trained = {f"policy/{name}": value / tokens for name, value in sums.items()}
        if tokens:
            trained["policy/sampler_gap"] = first_sums["sampler_gap"] / first_sums["tokens"]
            trained["policy/ratio_max"] = reduce_over_processes([ratio_max], device, maximum=True)[0]
        metrics, samples = {
            **generation_metrics(generated, elapsed, args, device),
            **trained,
            "prompts/rounds": rounds,
            "prompts/generated": drawn,
            "prompts/trained": run.carried["trained"],
            "loss/policy": sum(policy_losses) / max(len(policy_losses), 1),
            "optim/grad_norm": sum(grad_norms) / max(len(grad_norms), 1),
            "optim/learning_rate": rate,
            "time/step": elapsed,
            "time/sample": sample_time,
            "time/train": elapsed - sample_time,
            "memory/peak_gb": peak_memory_gb(device),
        }, []  # fmt: skip
        stopping = stop_requested(stop, device)
        if is_due(step, args.eval_every, args.steps) and (step == args.steps or not stopping):
            scores, samples = evaluate()
            metrics |= scores
        run.log(step, metrics, samples)
        if is_due(step, args.save_every, args.steps) or stopping:
            save_checkpoint(run, step, policy, optimizer)
        if stopping and step < args.steps:
            return run.finish(f"python dapo.py --resume {run.folder}", stopped=stopping)

    else:
        save_model(run, policy, tokenizer, stops, bfloat16)
        if args.dataset != Args.dataset and not args.eval_dataset:  # the rows held out are of this run alone
            return run.finish(f"python dapo.py --resume {run.folder} --steps {2 * args.steps}")
        command = f"python rlvr_math.py --model {run.folder / 'model'} --evaluate-only{flags_given(args, *data_flags)}"
        return run.finish(command)

    # A batch could not be filled: what has been learned is measured and kept.
    if not is_due(step - 1, args.eval_every, args.steps):
        run.log(step - 1, *evaluate())
    if step > 1 and not is_due(step - 1, args.save_every, args.steps):
        save_checkpoint(run, step - 1, policy, optimizer)
    save_model(run, policy, tokenizer, stops, bfloat16)
    if dist.is_initialized():
        dist.barrier()  # torchrun ends the other processes as soon as one has ended with an error
    flags = flags_given(args, *data_flags)
    run.finish(f"python dapo.py --model {run.folder / 'model'} --max-rounds {2 * args.max_rounds}{flags}")
    sys.exit(unfilled if run.is_main else 0)


def flags_given(args, *names: str) -> str:
    """Those of the named arguments that differ from their defaults, as one writes them behind a command."""
    given = [name for name in names if getattr(args, name) != getattr(type(args), name)]
    return "".join(f" --{name.replace('_', '-')} {shlex.quote(str(getattr(args, name)))}" for name in given)


def check_dapo_args(args: Args) -> None:
    """Refuse settings that cannot work together, before anything is loaded."""
    if args.num_samples < 2:
        sys.exit("--num-samples 1: a completion is compared with its siblings, so every prompt needs at least 2.")
    counts = ("batch_size", "microbatch_tokens", "minibatches", "steps", "max_rounds", "generation_batch_size",
              "eval_rows", "eval_samples")  # fmt: skip
    for name in counts:
        if getattr(args, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1.")
    if not (0 <= args.clip_low < 1 and args.clip_high >= 0):
        sys.exit(f"--clip-low {args.clip_low} must lie in [0, 1) and --clip-high {args.clip_high} be at least 0.")
    if args.temperature <= 0:
        sys.exit("--temperature must be above 0: greedy sampling leaves nothing to compare.")
    if not 0 <= args.overlong_cache < args.max_completion_tokens:
        sys.exit(
            f"--overlong-cache {args.overlong_cache} must be below the budget, --max-completion-tokens "
            f"{args.max_completion_tokens}: the punishment begins where the cache does (a fifth of the budget in the "
            "paper; 0 switches it off)."
        )
    if args.dual_clip and args.dual_clip <= 1:
        sys.exit(f"--dual-clip {args.dual_clip} must be above 1, or 0 for none: it bounds ratios that are beyond 1.")
    if args.batch_size % args.minibatches:
        sys.exit(f"--batch-size {args.batch_size} prompts cannot be divided into --minibatches {args.minibatches}.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if (args.batch_size // args.minibatches) % world:
        sys.exit(
            f"--batch-size {args.batch_size} in --minibatches {args.minibatches} cannot be divided among {world} "
            "processes."
        )
    if args.dynamic_sampling and args.generation_batch_size % world:
        sys.exit(f"--generation-batch-size {args.generation_batch_size} cannot be divided among {world} processes.")
    if args.dynamic_sampling and args.generation_batch_size * args.max_rounds < args.batch_size:
        sys.exit(
            f"--generation-batch-size {args.generation_batch_size} × --max-rounds {args.max_rounds} can never fill "
            f"--batch-size {args.batch_size}."
        )


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
