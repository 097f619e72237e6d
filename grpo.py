"""GRPO: reinforcement learning from rewards that can be checked, without a critic.

For every prompt the policy writes G completions; each is judged by how much better it scored than its siblings.
Signal: a reward function, here whether the final answer is right. Optimizer: a clipped policy gradient with the group
as its own baseline. Leash: KL to the starting model, in the loss. Defence against reward hacking: the reward is
the truth itself, checked by a program, and held-out accuracy is measured by the same program on other questions.

    A_i = (r_i − mean(r)) / std(r)                            over the G completions of a prompt
    ρ_t = π(y_t) / π_old(y_t)
    loss = mean[ −min(ρ_t·A_i, clip(ρ_t, 1−ε_low, 1+ε_high)·A_i) + β·k3_t ],   k3 = e^(−d) − 1 + d,  d = log π − log ref

Papers: GRPO (DeepSeekMath, arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783), RLOO (arXiv:2402.14740), GSPO
(arXiv:2507.18071), separate clip bounds (DAPO, arXiv:2503.14476).

    python grpo.py                                                                   # laptop, embedded model, 1 minute
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k --subset main --learning-rate 1e-6 \
        --max-completion-tokens 512 --batch-size 32                                  # one GPU
    torchrun --nproc-per-node 8 grpo.py --model Qwen/Qwen2.5-7B-Instruct --dataset openai/gsm8k --subset main …

What to look at: `reward/mean` and `eval/accuracy` rise together. The loss says nothing: with one update per rollout
every ratio is 1 and the loss near 0 while its gradient is not, so watch `optim/grad_norm`, and expect
`policy/clip_fraction` to stay 0 unless --update-epochs or --minibatches exceed 1. `policy/sampler_gap` should be
below 1e-5 in float32 and a few hundredths at most in bfloat16. When `groups/all_correct` + `groups/all_wrong` near 1
there is nothing left to learn from these prompts. `policy/entropy` falling to 0 early means collapse; length exploding
while the reward stands still means that something else than answering is being rewarded.

Implementation details that matter, each marked in the code under its number:
 1. A group whose rewards are all equal gets advantages of exactly zero, not rounding noise divided by a tiny std.
 2. Token ids and old log-probabilities are the sampler's own; nothing sampled is decoded and tokenised again.
 3. Logits are divided by the sampling temperature in every forward, of the policy and of the reference.
 4. The stop token is an action; masks come from lengths; a completion that was cut has no stop token.
 5. The minimum of clipped and unclipped objective bounds the gain for both signs of the advantage.
 6. Losses are divided by counts of the whole optimizer step, so microbatch size and processes change nothing.
 7. KL is estimated per token at the policy's own samples, with the gradient of common/kl.py's table; beta 0 loads no
    reference.
 8. GSPO's ratio is the geometric mean over the completion, clipped once per sequence.
 9. The G completions of a prompt share its forward and backward.
10. All randomness is a function of seed and step, so a resumed run repeats the uninterrupted one bit for bit.
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
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

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
    encode_prompt,
    load_tokenizer,
    pack,
    pack_completions,
    pad_rows,
    render_chat,
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
    """budget of a completion; 64 suits the embedded model, 256 and more a real one"""
    trust_remote_code: bool = False
    """run code that comes with the model"""

    # rewards: plain functions below, summed with these weights
    answer_weight: float = 1.0
    """of `answer_reward`: 1 where the final answer is right"""
    format_weight: float = 0.0
    """of `format_reward`: 1 where there is exactly one <answer>…</answer>, at the end"""
    length_weight: float = 0.0
    """of `length_penalty`: from 0 to −1 as the completion uses up its budget"""
    reward_model: str | None = None
    """output of reward_model.py or any sequence classifier with one label; its score is added, with weight 1; with
    --answer-weight 0 rows then need no answer"""
    ensemble_score: Literal["mean", "min", "uwo"] = "mean"
    """where it is an ensemble: the mean of its members, the worst case, or mean − variance / 2 (arXiv:2310.02743)"""

    # algorithm
    num_samples: int = 8
    """completions per prompt (G)"""
    temperature: float = 1.0
    """of sampling, and of every log-probability in training"""
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """baseline of the group: mean and std (GRPO), mean only (Dr. GRPO), mean of the others (RLOO)"""
    loss_aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """mean over tokens then sequences (GRPO), over all tokens (DAPO), or sum over a constant length (Dr. GRPO)"""
    ratio: Literal["token", "sequence"] = "token"
    """importance ratio of each token, or one per completion (GSPO: take --clip-low 3e-4 --clip-high 4e-4)"""
    clip_low: float = 0.2
    """ratios are clipped below 1 − clip_low"""
    clip_high: float = 0.2
    """and above 1 + clip_high; 0.28 is DAPO's clip-higher"""
    beta: float = 0.01
    """weight of the KL to the starting model in the loss; 0 loads no reference"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """GRPO takes k3; as a loss k1 has no gradient in expectation and only k2 has that of KL(π‖ref)"""
    update_epochs: int = 1
    """passes over each rollout"""
    minibatches: int = 1
    """optimizer steps per pass; more than one, or more passes, make clipping matter"""

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

    # evaluation and output
    eval_every: int = 20
    """steps between evaluations; 0 evaluates before and after only"""
    eval_rows: int = 192
    """held-out questions used"""
    eval_samples: int = 4
    """completions sampled per question in evaluation"""
    output_dir: str | None = None
    """default: runs/grpo/<date>_<time>"""
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


# ---------------------------------------------------------------------------------------------- rewards: edit here


def answer_reward(text: str, row: dict, used: float) -> float:
    """1 if the completion's final answer is right. `used` is the share of the token budget it took."""
    return float(is_correct(text, row["answer"]))


def format_reward(text: str, row: dict, used: float) -> float:
    """1 if the completion ends with its only <answer>…</answer>."""
    return float(text.count("<answer>") == 1 and text.rstrip().endswith("</answer>"))


def length_penalty(text: str, row: dict, used: float) -> float:
    """0 for an empty completion, −1 for one that takes the whole budget."""
    return -used


REWARDS = {"answer": answer_reward, "format": format_reward, "length": length_penalty}


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


def score(tokenizer, questions: list[dict], groups: list[list[Completion]], args: Args, reward_model) -> dict:
    """Reward components of every completion, each [P, G], and their weighted sum under "total"."""
    texts = [[tokenizer.decode(c.ids, skip_special_tokens=True) for c in group] for group in groups]
    weights = {name: getattr(args, f"{name}_weight") for name in REWARDS}
    components = {}
    for name in (name for name, weight in weights.items() if weight):
        components[name] = torch.tensor([
            [REWARDS[name](text, q["row"], len(c.ids) / args.max_completion_tokens) for text, c in zip(row, group)]
            for q, row, group in zip(questions, texts, groups)
        ])  # fmt: skip
    if reward_model:
        rows = [q["row"] for q in questions]
        prompts = [as_messages(r["prompt"] if r.get("prompt") is not None else r["question"], "user") for r in rows]
        components["model"] = reward_model([(p, text) for p, row in zip(prompts, texts) for text in row])
        components["model"] = components["model"].view(len(questions), -1)
    components["total"] = sum(weights.get(name, 1.0) * values for name, values in components.items())
    return components


def last_hidden_states(model, rows: list[list[int]], device) -> torch.Tensor:
    """Hidden states [R, d] at the last token of each row, which no padding can displace: rows are packed."""
    packed = pack([Segment(row, [False] * len(row)) for row in rows]).to(device)
    last = torch.tensor([len(row) for row in rows], device=device).cumsum(0) - 1
    return hidden_states(model, packed)[last]


def aggregate_scores(scores: torch.Tensor, how: str = "mean", penalty: float = 0.5) -> torch.Tensor:
    """One score from those of N members. scores [N, B], normalised; returns [B].

    mean; min: the worst case; uwo: mean − penalty · (population) variance, uncertainty-weighted (Coste et al.).
    """
    if how == "min":
        return scores.amin(0)
    return scores.mean(0) - (penalty * scores.var(0, correction=0) if how == "uwo" else 0)


def load_scalar_models(path: str, flag: str, config, trust_remote_code: bool, device) -> tuple:
    """Tokenizer and members of the sequence classifier with one label at `path`, which `flag` named."""
    if getattr(config, "num_labels", 0) != 1:
        sys.exit(f"{flag} {path}: needs a sequence classifier with one label; this has {config.num_labels}.")
    tokenizer, members = load_tokenizer(path, trust_remote_code, flag), []
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


def load_reward_model(args, device, bfloat16: bool):
    """What --reward-model names, as a function from (prompt messages, completion text) pairs to scores [B].

    Its own tokenizer and template render the texts. Of what reward_model.py leaves in its config, `reward_mean` and
    `reward_std` normalise a score; --ensemble-score joins those of the members of an ensemble.
    """
    path, flag = args.reward_model, "--reward-model"
    config = load_config(path, args.trust_remote_code, flag)
    if getattr(config, "reward_kind", "outcome") != "outcome":
        sys.exit(f"{flag} {path}: a process model, which scores single steps; take one trained with --kind outcome.")
    tokenizer, members = load_scalar_models(path, flag, config, args.trust_remote_code, device)
    context = context_length(config)

    def score_rows(model, rows: list[list[int]]) -> torch.Tensor:
        """Scores [B] of packed rows, or of one row at a time where the head is of another kind."""
        if not isinstance(getattr(model, "score", None), torch.nn.Linear):
            with torch.autocast(device.type, enabled=False):  # which would round scores until they tie
                return torch.stack([model(input_ids=torch.tensor([ids], device=device)).logits[0, 0] for ids in rows])
        scores = torch.zeros(len(rows), device=device)
        for part in split_by_tokens(rows, args.microbatch_tokens):
            hidden = last_hidden_states(model, [rows[i] for i in part], device).float()
            with torch.autocast(device.type, enabled=False):
                scores[part] = model.score(hidden)[:, 0]
        return scores

    @torch.no_grad()
    def reward_model(pairs: list[tuple[list[dict], str]]) -> torch.Tensor:
        chats = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in pairs]
        try:
            rows = [render_chat(tokenizer, chat).ids[-context:] for chat in chats]
        except TemplateError as error:
            sys.exit(f"{flag} {path}: its chat template refuses a prompt of the data ({first_line(error)}).")
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            logits = [score_rows(model, rows).float().cpu() for model in members]
        if not all(x.isfinite().all() for x in logits):
            bad = next(int((~x.isfinite()).nonzero()[0, 0]) for x in logits if not x.isfinite().all())
            sys.exit(f"{flag} {path}: gave no number for {pairs[bad][1][:60]!r}; its weights may be damaged.")
        constants = [(getattr(m.config, "reward_mean", 0.0), getattr(m.config, "reward_std", 1.0)) for m in members]
        scores = torch.stack([(x - mean) / std for x, (mean, std) in zip(logits, constants)])  # [N, B]
        return aggregate_scores(scores, args.ensemble_score)

    return reward_model


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
    args = resumed_args(args, "grpo")
    check_grpo_args(args)
    device, rank, world = start_processes(args.device)
    stop = catch_stop_signals()

    # Data, before any model is loaded.
    needs_answer = args.answer_weight or not args.reward_model
    columns = (("prompt", "answer"), ("question", "answer")) if needs_answer else (("prompt",), ("question",))
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
    questions = encode_questions(tokenizer, rows, args.dataset, longest)
    held_out = encode_questions(tokenizer, held_out, held_out_source, longest)
    shuffle = torch.Generator().manual_seed(args.seed)  # passes over all questions, as many as the steps take
    passes = math.ceil(args.steps * args.batch_size / len(questions))
    order = torch.cat([torch.randperm(len(questions), generator=shuffle) for _ in range(passes)]).tolist()

    # Models, optimizer, run folder.
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    policy = load_model(args, device)
    stops = stop_token_ids(tokenizer, policy)
    policy = shard(policy, world)
    reference = shard(load_model(args, device), world).requires_grad_(False) if args.beta else None
    reward_model = load_reward_model(args, device, bfloat16) if args.reward_model else None
    sampler = Sampler(policy, stops, torch.bfloat16 if bfloat16 else torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
    shown = {"reward/mean": "reward", "completions/length_mean": "length", "policy/kl": "KL"}
    run = Run(args, "grpo", rank, {**shown, "eval/accuracy": "accuracy"})

    def evaluate() -> tuple[dict, list[dict]]:
        sampler.sync()
        return evaluate_answers(sampler, tokenizer, held_out, args, rank, world)[:2]

    first = load_checkpoint(run, policy, optimizer, args.steps) if args.resume else 0
    if not args.resume:
        run.log(0, *evaluate())

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

        # Score, and compare within each group.
        rewards = score(tokenizer, mine, groups, args, reward_model)
        advantages = group_advantages(rewards["total"], args.advantage).flatten().to(device)  # [B]
        rollout = Rollout(prompts, groups, device)
        ref_logprobs = reference_logprobs(reference, rollout, args, bfloat16)  # [B, T]

        # Update.
        sums, first_sums, ratio_max, policy_losses, grad_norms = Counter(), Counter(), 0.0, [], []
        rate = learning_rate_at(step, args.steps, args)
        for epoch in range(args.update_epochs):
            shuffle = torch.Generator().manual_seed(seed * 97 + epoch)
            for chosen in torch.randperm(len(batch), generator=shuffle).view(args.minibatches, -1).tolist():
                rows = rollout.rows_of([k for k, p in enumerate(positions) if p in chosen])
                sequences = len(chosen) * args.num_samples
                tokens = reduce_over_processes([float(rollout.mask[rows].sum())], device)[0]
                total_loss = 0.0
                for part, weight in rollout.microbatches(rows, args.microbatch_tokens):
                    logprobs, entropy = rollout.token_logprobs(policy, part, args.temperature, bfloat16)  # [b, T]
                    old_logprobs, ref = rollout.old_logprobs[part], ref_logprobs[part]
                    advantage, mask = advantages[part, None], rollout.mask[part] * weight  # [b, 1], [b, T]
                    losses, ratio = policy_loss(
                        logprobs, old_logprobs, advantage, mask, args.clip_low, args.clip_high, args.ratio
                    )
                    if reference is not None:  # detail 7
                        losses = losses + args.beta * kl_estimate(logprobs, ref, args.kl_estimator)
                    loss = aggregate(losses, mask, args.loss_aggregation, sequences, tokens, args.max_completion_tokens)
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
            **rollout_metrics(rewards, groups, device),
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
            scores, samples = evaluate()
            metrics |= scores
        run.log(step, metrics, samples)
        if is_due(step, args.save_every, args.steps) or stopping:
            save_checkpoint(run, step, policy, optimizer)
        if stopping and step < args.steps:
            return run.finish(f"python grpo.py --resume {run.folder}", stopped=stopping)

    save_model(run, policy, tokenizer, stops, bfloat16)
    return run.finish(f"python grpo.py --resume {run.folder} --steps {2 * args.steps}")


def check_grpo_args(args: Args) -> None:
    """Refuse settings that cannot work together, before anything is loaded."""
    if args.num_samples < 2:
        sys.exit("--num-samples 1: a completion is compared with its siblings, so every prompt needs at least 2.")
    for name in (
        "batch_size",
        "microbatch_tokens",
        "minibatches",
        "update_epochs",
        "steps",
        "eval_rows",
        "eval_samples",
    ):
        if getattr(args, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1.")
    if args.temperature <= 0:
        sys.exit("--temperature must be above 0: greedy sampling leaves nothing to compare.")
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
