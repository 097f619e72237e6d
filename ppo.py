"""PPO: reinforcement learning from a learned reward, with a critic that says how much each token was worth.

The policy writes completions, a reward model scores each as a whole, and every token pays for leaving the reference. A
critic learns to predict what is still to come, so that a token is credited with what it changed. Signal: a reward
model's score (or a plain reward function). Optimizer: a clipped policy gradient over several epochs, advantages by GAE.
Leash: KL to the reference inside the reward, its weight held to a target by a controller. Defence against hacking: that
leash, an ensemble of reward models, a stop at some KL; and the gold score beside the proxy, where the truth is known.

    r_t = −β·(log π_old(y_t) − log ref(y_t)) + [t is the last token]·score(y)
    δ_t = r_t + γ·V_{t+1} − V_t,   A_t = δ_t + γλ·A_{t+1},   R_t = A_t + V_t            V after the last token is 0
    policy loss = mean of max(−A·ρ, −A·clip(ρ, 1−ε, 1+ε)),   ρ_t = π(y_t) / π_old(y_t),   A whitened
    value loss  = mean of ½·max((V−R)², (V_old + clip(V−V_old, −ε, ε) − R)²)

Papers: PPO (arXiv:1707.06347), Ziegler et al. (arXiv:1909.08593), Stiennon et al. (arXiv:2009.01325), InstructGPT
(arXiv:2203.02155), the details collected in arXiv:2403.17031; over-optimisation: Gao et al. (arXiv:2210.10760).

    python reward_model.py && python ppo.py                                       # laptop, embedded model, 2 minutes
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --reward-model RM --dataset trl-lib/ultrafeedback-prompt \
        --learning-rate 1e-6 --critic-learning-rate 1e-5 --max-completion-tokens 256                       # one GPU
    torchrun --nproc-per-node 8 ppo.py --model Qwen/Qwen2.5-7B-Instruct --reward-model RM --dataset DATA …

What to look at: `reward/model`, the proxy, rises; `policy/kl_sequence` rises with it and then stays near --kl-target.
`eval/accuracy`, the gold score, should rise too: where the proxy goes on rising while it falls, the reward model is
being exploited, and overoptimisation.png shows from which KL on. `value/explained_variance` is how much of the returns
it learns from, in which its own later values weigh, the critic foresaw; `value/explained_outcome` how much of what
really followed. Near 0 or below the critic is only noise, and advantages are too. `policy/sampler_gap` is below 1e-6 in
float32: on the first minibatch every ratio is 1. `policy/clip_fraction` of up to 0.2 is usual, 0.5 too large a step.

Implementation details that matter, each marked in the code under its number:
 1. A completion that was cut has not earned its score: a penalty is taken off (the EOS trick).
 2. Token ids and old log-probabilities are the sampler's own; nothing that is trained on is tokenised again.
 3. Logits of completions are divided by the sampling temperature in every forward, of policy and reference.
 4. The stop token is an action; masks come from lengths, and nothing behind the last action is ever read.
 5. KL enters the reward as k1, detached: the gradient of k3 there has a wrong size and even a wrong sign.
 6. The score is added at the last action, the stop token where there is one, and what follows it is worth 0.
 7. V_t is read where token t is predicted, from the tokens before it.
 8. Returns are A + V before advantages are whitened, over all actions of the rollout and all processes.
 9. The completions of a prompt share its forward and backward; so minibatches are made of whole prompts.
10. All randomness is a function of seed and step, so a resumed run repeats the uninterrupted one bit for bit.
11. Rewards may be whitened too, without moving their mean, which would turn a good score into a bad one.
12. Values are clipped around the old ones as ratios are around 1, and the larger of both losses counts.
13. Losses are divided by the tokens of the whole minibatch, so microbatch size and processes change nothing.
14. Each epoch shuffles anew, and the epochs end early where the policy has gone further than --max-approx-kl.
15. The controller moves β by the KL summed over sequences, at most a fifth of n/horizon at a time.
16. The critic starts as the reward model, its normalisation folded in, so that it begins at the scores' scale.
17. Reference log-probabilities, scores and values are made in microbatches without gradient; at beta 0 a reference is
    there only while an evaluation measures the KL.
"""

from __future__ import annotations

import gc
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
from common.kl import (
    AdaptiveKLController,
    has_known_logits,
    hidden_states,
    kl_estimate,
    local_token_logprobs,
    token_logprobs,
    use_layout,
    whiten,
)
from common.tokenizer import (
    Packed,
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
    """folder or Hub name of a causal language model, the policy's start and its reference"""
    dataset: str = str(TINY / "maths_train.jsonl")
    """file, folder or Hub name; rows hold prompt or question, and for the gold score the answer that is right"""
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

    # rewards: a model's score, and plain functions below with these weights
    reward_model: str = "runs/reward_model/latest/model"
    """output of reward_model.py or any sequence classifier with one label; `none` for the functions alone"""
    ensemble_score: Literal["mean", "min", "uwo"] = "mean"
    """where it is an ensemble: the mean of its members, the worst case, or mean − variance / 2 (arXiv:2310.02743)"""
    answer_weight: float = 0.0
    """of `answer_reward`: 1 where the final answer is right"""
    format_weight: float = 0.0
    """of `format_reward`: 1 where there is exactly one <answer>…</answer>, at the end"""
    length_weight: float = 0.0
    """of `length_penalty`: from 0 to −1 as the completion uses up its budget"""
    missing_eos_penalty: float = 1.0
    """taken off the score of a completion that was cut"""
    whiten_rewards: bool = False
    """scale the rewards of tokens to unit variance (arXiv:2403.17031)"""

    # algorithm
    num_samples: int = 4
    """completions per prompt; 1 is usual where prompts are many"""
    temperature: float = 1.0
    """of sampling, and of every log-probability in training"""
    beta: float = 0.5
    """weight of the KL to the reference in the reward, at first where there is a --kl-target; 0.05 is usual"""
    kl_target: float | None = 2.5
    """nats per completion to which the controller holds the KL; 6 is usual for real models, None keeps beta as it is"""
    kl_horizon: int = 500
    """completions over which the controller acts; 10,000 is usual in longer runs"""
    stop_kl: float | None = None
    """end the run at the first evaluation that finds more nats per completion than this; needs --eval-every"""
    gamma: float = 1.0
    """discount of later rewards"""
    gae_lambda: float = 0.95
    """λ of GAE: 1 trusts returns alone, 0 the critic alone"""
    clip_range: float = 0.2
    """ratios are clipped to 1 ± clip_range"""
    value_clip: float = 0.2
    """values are clipped to the old ones ± value_clip"""
    dual_clip: float | None = None
    """also bound the loss of a bad token at dual_clip times its advantage; 3 is usual (arXiv:1912.09729)"""
    update_epochs: int = 4
    """passes over each rollout"""
    minibatches: int = 2
    """optimizer steps per pass"""
    max_approx_kl: float | None = None
    """end the passes once ½(log ρ)² has exceeded this on average; 0.01 to 0.05 is usual"""
    critic: Literal["reward_model", "policy"] = "reward_model"
    """what the critic starts from: the reward model (of an ensemble the first), or the policy with a head of zeros"""
    ptx_dataset: str | None = None
    """demonstrations (prompt + completion; of a Hub data set its split train) mixed into the loss (PPO-ptx)"""
    ptx_weight: float = 0.1
    """of their mean negative log-likelihood per token"""

    # optimisation
    steps: int = 30
    """rollouts; each brings update_epochs × minibatches optimizer steps"""
    batch_size: int = 32
    """prompts per rollout over all processes"""
    microbatch_tokens: int = 4096
    """tokens per forward and backward: a memory knob that does not change the result"""
    learning_rate: float = 1e-4
    """peak, of the policy; 1e-4 suits the embedded model, 1e-6 to 3e-6 a pretrained one"""
    critic_learning_rate: float = 2e-3
    """peak, of the critic; 1e-5 suits a pretrained one"""
    warmup_steps: int = 5
    """rollouts of linear warm-up"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the learning rates decay to zero after the warm-up"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm, those of policy and critic apart"""
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
    """default: runs/ppo/<date>_<time>"""
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
# B completions of at most T tokens; `mask` [B, T] is 1 where the policy acted.


def token_rewards(logprobs, ref_logprobs, scores: torch.Tensor, mask: torch.Tensor, beta: float) -> torch.Tensor:
    """−β·k1 for every action, and the score where the last one is [B, T]. logprobs, ref_logprobs [B, T], scores [B]."""
    rewards = -beta * kl_estimate(logprobs, ref_logprobs, "k1") * mask  # detail 5
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    rewards[torch.arange(len(mask), device=mask.device), last] += scores  # detail 6
    return rewards


def gae(rewards, values, mask, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and returns [B, T] (arXiv:1506.02438). Tokens outside the mask are passed over:
    value and advantage go through them unchanged, and what they hold is never read."""
    advantages, is_action = torch.zeros_like(rewards), mask > 0  # detail 4
    next_value, next_advantage = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])  # detail 6
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(is_action[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(is_action[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = advantages.where(is_action, 0.0)
    return advantages, (advantages + values).where(is_action, 0.0)  # detail 8


def clipped_policy_loss(
    logprobs, old_logprobs, advantages, mask, clip: float, dual_clip: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """max(−A·ρ, −A·clip(ρ, 1±ε)), with a dual clip c also at most −c·A where A < 0. Returns losses and ρ [B, T]."""
    ratio = ((logprobs - old_logprobs) * mask).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return losses, ratio.detach()


def clipped_value_loss(values, old_values, returns, clip: float) -> torch.Tensor:
    """½·max((V−R)², (V_old + clip(V−V_old, ±ε) − R)²) [B, T]."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())  # detail 12


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


# ---------------------------------------------------------------------------------------------- rollout and critic


def critic_values(critic, rollout: Rollout, rows: list[int], bfloat16: bool) -> torch.Tensor:
    """V_t [b, T]: what the critic still expects before token t is chosen, so read where that token is predicted."""
    device, width = rollout.mask.device, rollout.mask.shape[1]
    packed = pack_completions([rollout.prompts[i] for i in rows], [rollout.ids[i] for i in rows]).to(device)
    places = packed.sources  # detail 7
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
        if hasattr(critic, "sharded_scores"):  # FSDP gathers weights only around methods registered with it
            values = critic.sharded_scores(packed, places)
        else:
            values = local_scores(critic, packed, places)
    return pad_rows(values.split(packed.lengths), width)


def load_critic(args: Args, tokenizer, device):
    """A language model with a scalar head: the reward model, its normalisation folded into the head, or the policy
    with a head of zeros."""
    from_reward = args.critic == "reward_model"
    path, flag = (args.reward_model, "--reward-model") if from_reward else (args.model, "--model")
    config = load_config(path, args.trust_remote_code, flag)
    if from_reward and load_tokenizer(path, flag=flag).get_vocab() != tokenizer.get_vocab():
        sys.exit(f"{flag} {path}: its tokenizer is not that of {args.model}, as a critic must; add --critic policy.")
    config.num_labels = 1
    transformers_logging.set_verbosity_error()  # that the head is new is no news here
    options = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, "use_safetensors": True}
    try:
        critic = AutoModelForSequenceClassification.from_pretrained(path, config=config, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"{flag} {path}: no critic could be made of it ({first_line(error)}).")
    if not isinstance(getattr(critic, "score", None), torch.nn.Linear):
        sys.exit(f"{flag} {path}: a {type(critic).__name__} has no linear head named `score`; add --critic policy.")
    mean, std = (getattr(config, name, value) for name, value in (("reward_mean", 0.0), ("reward_std", 1.0)))
    head, trained = torch.nn.Linear(critic.score.in_features, 1), critic.score
    bias = 0.0 if trained.bias is None else trained.bias.item()
    with torch.no_grad():
        head.weight.copy_(trained.weight / std if from_reward else torch.zeros_like(trained.weight))
        head.bias.fill_((bias - mean) / std if from_reward else 0.0)  # detail 16
    critic.score = head
    use_layout(critic.to(device).eval())
    if args.gradient_checkpointing:
        critic.gradient_checkpointing_enable()
    return critic.train(args.gradient_checkpointing)


def local_scores(model, packed: Packed, positions: torch.Tensor) -> torch.Tensor:
    """Scores of a model whose weights this process holds, or has gathered."""
    hidden = hidden_states(model, packed)[positions]
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.float())[:, 0]


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


def encode_demonstrations(tokenizer, rows: list[dict], source: str, max_tokens: int) -> list[tuple[list, list]]:
    """Prompt and completion ids of demonstrations for PPO-ptx; what is too long or no chat is dropped and counted."""
    demonstrations = []
    for row in rows:
        chat = as_messages(row["prompt"], "user") + as_messages(row["completion"], "assistant")
        try:
            prompt, (ids, mask) = encode_prompt(tokenizer, row["prompt"]), render_chat(tokenizer, chat)
        except (TemplateError, TypeError, ValueError):  # the latter for an empty list of messages
            continue
        end = len(ids) - mask[::-1].index(True) if any(mask) else 0
        if ids[: len(prompt)] == prompt and len(prompt) < end <= max_tokens:
            demonstrations.append((prompt, ids[len(prompt) : end]))
    if len(demonstrations) < len(rows):
        print(
            f"--ptx-dataset {source}: {len(rows) - len(demonstrations)} of {len(rows)} demonstrations dropped: over "
            f"{max_tokens} tokens, or refused by the chat template."
        )
    if not demonstrations:
        sys.exit(f"--ptx-dataset {source}: none of its rows can be used (see the line above).")
    return demonstrations


def ptx_backward(policy, demonstrations: list, seed: int, count: int, args: Args, parallel: tuple) -> float:
    """Add the gradient of ptx_weight times the mean negative log-likelihood per token of `count` random demonstrations,
    which the processes share. Returns this process's part of that mean."""
    device, rank, world, bfloat16 = parallel
    drawn = torch.randint(len(demonstrations), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = sum(len(demonstrations[i][1]) for i in drawn)
    mine = drawn[rank::world]
    prompts, completions = ([demonstrations[i][side] for i in mine or drawn[:1]] for side in (0, 1))
    parts = split_by_tokens(completions, args.microbatch_tokens, prompts)
    rounds, total = int(reduce_over_processes([len(parts)], device, maximum=True)[0]), 0.0
    for k in range(rounds):  # a process with fewer parts repeats its last with weight zero, as microbatches() does
        part, weight = parts[min(k, len(parts) - 1)], float(bool(mine) and k < len(parts))
        packed = pack_completions([prompts[i] for i in part], [completions[i] for i in part]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            logprobs, _ = token_logprobs(policy, packed)
        loss = -logprobs.sum() / tokens * weight
        (args.ptx_weight * loss * world).backward()  # gradients are averaged over processes
        total += loss.item()
    return total


# ---------------------------------------------------------------------------------------------- what a rollout tells


@torch.no_grad()
def update_statistics(logprobs, old_logprobs, entropy, ratio, better, mask, clip: float) -> dict:
    """Sums over the tokens of a microbatch, from which the means of policy/… are made. All [b, T].

    `better` says where the advantage is positive: which bound of the clip binds depends on its sign.
    """
    log_ratio = logprobs - old_logprobs
    sums = {
        "tokens": torch.ones_like(mask),
        "entropy": entropy,
        "clip_fraction": torch.where(better, ratio > 1 + clip, ratio < 1 - clip),
        "approx_kl": log_ratio.square() / 2,
        "sampler_gap": log_ratio.abs(),
    }
    return {name: float((values * mask).sum()) for name, values in sums.items()}


def experience_metrics(
    rollout: Rollout, ref_logprobs, stopped, rewards: dict, gold: list, token_reward, values, targets: dict
) -> dict:
    """What a rollout tells about itself, over all processes: proxy and gold reward, KL, lengths, the critic's worth.

    value/explained_<name> is the share of the variance of targets[name] [B, T] that the critic foresaw.
    """
    mask, lengths, total = rollout.mask, [len(ids) for ids in rollout.ids], rewards["total"]
    kl = kl_estimate(rollout.old_logprobs, ref_logprobs, "k1") * mask
    sums = {
        "completions": len(lengths), "tokens": sum(lengths), "stopped": stopped.sum(), "kl": kl.sum(),
        "square": total.square().sum(), "gold": sum(gold), "known": len(gold), "objective": token_reward.sum(),
        "value": (values * mask).sum(), **{f"reward/{name}": x.sum() for name, x in rewards.items()},
    }  # fmt: skip
    for name, target in targets.items():
        residual = (target - values) * mask
        sums |= {name: target.sum(), f"{name}_square": target.square().sum()}
        sums |= {f"{name}_residual": residual.sum(), f"{name}_residual_square": residual.square().sum()}
    sums = sum_over_processes(sums, mask.device)
    count, tokens = sums["completions"], sums["tokens"]
    mean = sums["reward/total"] / count

    def variance(name: str) -> float:
        return sums[f"{name}_square"] / tokens - (sums[name] / tokens) ** 2

    return {
        "reward/mean": mean,
        "reward/std": max(sums["square"] / count - mean**2, 0.0) ** 0.5,
        **{f"reward/{name}": sums[f"reward/{name}"] / count for name in rewards if name != "total"},
        **({"reward/gold": sums["gold"] / sums["known"]} if sums["known"] else {}),
        "reward/objective": sums["objective"] / count,
        "policy/kl": sums["kl"] / tokens,
        "policy/kl_sequence": sums["kl"] / count,
        "value/mean": sums["value"] / tokens,
        **{
            f"value/explained_{name}": 1 - variance(f"{name}_residual") / max(variance(name), 1e-12) for name in targets
        },
        "completions/length_mean": tokens / count,
        "completions/length_max": reduce_over_processes([max(lengths)], mask.device, maximum=True)[0],
        "completions/stopped_fraction": sums["stopped"] / count,
        "completions/truncated_fraction": 1 - sums["stopped"] / count,
    }


@torch.no_grad()
def evaluate_proxy(tokenizer, questions, groups, reference, reward_model, args: Args, device, bfloat16: bool):
    """What held-out completions are worth to the reward that is optimised, and how far they are from the reference.

    Returns the means over all processes, and the rewards [P, G] of this process's completions.
    """
    rollout = Rollout([q["ids"] for q in questions], groups, device)
    ref_logprobs = reference_logprobs(reference, rollout, args, bfloat16)
    rewards = score(tokenizer, questions, groups, args, reward_model)["total"]
    sums = {
        "completions": len(rollout.ids),
        "reward": rewards.sum(),
        "kl": (kl_estimate(rollout.old_logprobs, ref_logprobs, "k1") * rollout.mask).sum(),
    }
    sums = sum_over_processes(sums, device)
    return {f"eval/{name}": sums[name] / sums["completions"] for name in ("reward", "kl")}, rewards


def draw_overoptimisation(run: Run) -> None:
    """overoptimisation.png: proxy and gold reward of the evaluations over the root of the KL, as Gao et al. draw it."""
    if not run.is_main:
        return
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "eval/kl" in row]
    distance = [max(row["eval/kl"], 0.0) ** 0.5 for row in rows]
    figure = Figure(figsize=(5, 3.2), layout="tight")
    axis = figure.subplots()
    lines = axis.plot(distance, [row["eval/reward"] for row in rows], marker="o", ms=3, label="proxy")
    axis.set(xlabel="√KL to the reference, of nats per completion", ylabel="proxy reward")
    if "eval/accuracy" in rows[0]:
        gold = axis.twinx()
        shares = [row["eval/accuracy"] for row in rows]
        lines += gold.plot(distance, shares, marker="o", ms=3, color="C1", label="gold")
        gold.set(ylabel="gold: share right", ylim=(0, 1.02))
    axis.legend(handles=lines, loc="lower right")
    figure.savefig(run.folder / "overoptimisation.png", dpi=110)


def warn_if_all_are_cut(run: Run, step: int, told: dict, args: Args) -> None:
    """Say so when no completion of a rollout ended by itself, unless that was so before."""
    if run.is_main and told["completions/stopped_fraction"] == 0 < run.last.get("completions/stopped_fraction", 1):
        run.bar.write(
            f"  Every completion of step {step} was cut at {args.max_completion_tokens} tokens and pays "
            f"--missing-eos-penalty {args.missing_eos_penalty:g}, so nothing tells them apart by their end: raise "
            "--max-completion-tokens, or start from a model that has learned to stop (sft.py)."
        )


def report_controller(run: Run, args: Args) -> None:
    """Say where the controller had nothing to hold or did not manage to."""
    if not (run.is_main and args.beta and args.kl_target):
        return
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found = [row["policy/kl_sequence"] for row in rows if "policy/kl_sequence" in row]
    beta, last = run.last["policy/next_beta"], sum(found[-5:]) / len(found[-5:])
    if max(found) < args.kl_target:
        run.bar.write(
            f"  --kl-target {args.kl_target:g} was never reached: at most {max(found):.3g} nats per completion, and "
            f"beta only fell, from {args.beta:g} to {beta:.3g}. For a shorter leash give a lower target."
        )
    elif last > 1.2 * args.kl_target:
        run.bar.write(
            f"  --kl-target {args.kl_target:g} was not held: {last:.3g} nats per completion in the last steps, beta "
            f"at {beta:.3g}. Raise --beta, or lower --kl-horizon, with which beta is moved faster."
        )


# ---------------------------------------------------------------------------------------------- main


def main(args: Args) -> dict:
    args = resumed_args(args, "ppo")
    check_ppo_args(args)
    device, rank, world = start_processes(args.device)
    stop = catch_stop_signals()

    # Data, before any model is loaded.
    columns = (("prompt", "answer"), ("question", "answer")) if args.answer_weight else (("prompt",), ("question",))
    rows = load_rows(args.dataset, args.subset, args.split, columns)
    if args.eval_dataset or args.dataset == Args.dataset:
        held_out_source = args.eval_dataset or str(TINY / "maths_test.jsonl")
        held_out = load_held_out(args, held_out_source, columns)[: args.eval_rows]
    else:
        held_out_source = f"rows held out of {args.dataset}"
        rows, held_out = hold_out(rows, args)
    tokenizer = load_tokenizer(args.model)
    context = context_length(load_config(args.model, args.trust_remote_code))
    longest = min(args.max_prompt_tokens, context - args.max_completion_tokens)
    if longest < 1:
        sys.exit(f"--max-completion-tokens {args.max_completion_tokens} fills the model's whole context of {context}.")
    questions = encode_questions(tokenizer, rows, args.dataset, longest)
    held_out = encode_questions(tokenizer, held_out, held_out_source, longest)
    if len(held_out) < world:
        sys.exit(f"{held_out_source}: {len(held_out)} held-out questions are too few for {world} processes.")
    demonstrations = []
    if args.ptx_dataset:
        rows = load_rows(args.ptx_dataset, None, "train", (("prompt", "completion"),))
        longest = min(args.max_prompt_tokens + args.max_completion_tokens, context)
        demonstrations = encode_demonstrations(tokenizer, rows, args.ptx_dataset, longest)
    shuffle = torch.Generator().manual_seed(args.seed)  # passes over all questions, as many as the steps take
    passes = math.ceil(args.steps * args.batch_size / len(questions))
    order = torch.cat([torch.randperm(len(questions), generator=shuffle) for _ in range(passes)]).tolist()

    # Models, optimizers, run folder.
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    parallel = (device, rank, world, bfloat16)
    policy = load_model(args, device)
    stops = stop_token_ids(tokenizer, policy)
    policy = shard(policy, world)
    reward_model = load_reward_model(args, device, bfloat16) if args.reward_model != "none" else None
    critic = shard_reward_model(load_critic(args, tokenizer, device), world)

    def load_reference():
        return shard(load_model(args, device), world).requires_grad_(False)

    reference = load_reference() if args.beta else None  # detail 17
    sampler = Sampler(policy, stops, torch.bfloat16 if bfloat16 else torch.float32)
    models, optimizers = torch.nn.ModuleList([policy, critic]), []
    for model in models:
        settings = {"weight_decay": args.weight_decay, "betas": (0.9, 0.95), "eps": 1e-5, "fused": True}
        optimizers.append(torch.optim.AdamW(model.parameters(), **settings))
    controller = AdaptiveKLController(args.beta, args.kl_target or math.inf, args.kl_horizon)
    shown = {"reward/mean": "proxy reward", "eval/kl": "KL", "value/explained_variance": "critic"}
    run = Run(args, "ppo", rank, {**shown, "eval/accuracy": "accuracy"})

    def evaluate(step: int) -> tuple[dict, list[dict]]:
        sampler.sync()
        scores, samples, groups = evaluate_answers(sampler, tokenizer, held_out, args, rank, world)
        start = policy if step == 0 else load_reference() if reference is None else reference
        mine = held_out[rank::world]
        proxy, rewards = evaluate_proxy(tokenizer, mine, groups, start, reward_model, args, device, bfloat16)
        del start
        gc.collect()  # a sharded reference points to itself; it must not stay for the training
        for sample, reward in zip(samples, rewards[:, 0].tolist()):
            sample["reward"] = reward
        return {**proxy, **scores}, samples

    first = load_checkpoint(run, models, optimizers, args.steps) if args.resume else 0
    if args.resume:
        controller.coefficient = run.last["policy/next_beta"]
        if args.stop_kl is not None and run.last.get("eval/kl", 0.0) > args.stop_kl:
            if has_saved_model(run, newest_checkpoint(run.folder)):
                sys.exit(f"{run.folder}: the run has ended, its KL of {run.last['eval/kl']:.3g} is above --stop-kl.")
            first = args.steps  # all that is missing is its model
    else:
        run.log(0, *evaluate(0))

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

        # Score.
        rollout = Rollout(prompts, groups, device)
        mask, old_values = rollout.mask, torch.zeros_like(rollout.mask)  # [B, T]
        rewards = score(tokenizer, mine, groups, args, reward_model)
        stopped = torch.tensor([c.stopped for group in groups for c in group], device=device)  # [B]
        scores = rewards["total"].flatten().to(device) - args.missing_eos_penalty * ~stopped  # detail 1
        ref_logprobs = reference_logprobs(reference, rollout, args, bfloat16)  # [B, T]
        for part, _ in rollout.microbatches(range(len(rollout.ids)), args.microbatch_tokens):
            with torch.no_grad():  # detail 17
                old_values[part] = critic_values(critic, rollout, part, bfloat16)

        # Credit each token.
        beta = controller.coefficient
        token_reward = token_rewards(rollout.old_logprobs, ref_logprobs, scores, mask, beta)
        add_up = partial(reduce_over_processes, device=device)
        if args.whiten_rewards:
            token_reward = whiten(token_reward, mask, shift_mean=False, add_up=add_up)  # detail 11
        advantages, returns = gae(token_reward, old_values, mask, args.gamma, args.gae_lambda)
        advantages = whiten(advantages, mask, add_up=add_up)  # detail 8
        gold = [float(is_correct(tokenizer.decode(c.ids, skip_special_tokens=True), q["gold"]))
                for q, group in zip(mine, groups) for c in group if q["gold"] is not None]  # fmt: skip
        targets = {"variance": returns, "outcome": gae(token_reward, old_values, mask, args.gamma, 1.0)[1]}
        told = experience_metrics(rollout, ref_logprobs, stopped, rewards, gold, token_reward, old_values, targets)
        if reference is None:
            del told["policy/kl"], told["policy/kl_sequence"]
        elif args.kl_target:
            controller.update(told["policy/kl_sequence"], len(batch) * args.num_samples)  # detail 15

        # Update.
        sums, first_sums, ratio_max, losses, grad_norms = Counter(), Counter(), 0.0, [], []
        rate = learning_rate_at(step, args.steps, args)
        critic_rate = learning_rate_at(step, args.steps, replace(args, learning_rate=args.critic_learning_rate))
        for epoch in range(args.update_epochs):
            shuffle = torch.Generator().manual_seed(seed * 97 + epoch)  # detail 14
            moved = Counter()
            for chosen in torch.randperm(len(batch), generator=shuffle).view(args.minibatches, -1).tolist():
                rows = rollout.rows_of([k for k, p in enumerate(positions) if p in chosen])
                tokens = reduce_over_processes([float(mask[rows].sum())], device)[0]
                total = Counter()
                for part, weight in rollout.microbatches(rows, args.microbatch_tokens):
                    acted, advantage, old_logprobs = mask[part] * weight, advantages[part], rollout.old_logprobs[part]
                    logprobs, entropy = rollout.token_logprobs(policy, part, args.temperature, bfloat16)  # [b, T]
                    policy_losses, ratio = clipped_policy_loss(
                        logprobs, old_logprobs, advantage, acted, args.clip_range, args.dual_clip
                    )
                    policy_loss = (policy_losses * acted).sum() / tokens  # detail 13
                    (policy_loss * world).backward()  # gradients are averaged over processes, the loss is their sum
                    values = critic_values(critic, rollout, part, bfloat16)  # [b, T]
                    value_losses = clipped_value_loss(values, old_values[part], returns[part], args.value_clip)
                    value_loss = (value_losses * acted).sum() / tokens
                    (value_loss * world).backward()
                    total.update(policy=policy_loss.item(), value=value_loss.item())
                    statistics = update_statistics(
                        logprobs, old_logprobs, entropy, ratio, advantage > 0, acted, args.clip_range
                    )
                    moved.update(statistics)
                    ratio_max = max(ratio_max, float((ratio * acted).max()))
                    if not losses:  # before the first update policy and sampler have the same weights
                        first_sums.update(statistics)
                if demonstrations:
                    ptx_seed, count = seed * 9973 + len(losses), len(chosen)
                    total["ptx"] = ptx_backward(policy, demonstrations, ptx_seed, count, args, parallel)
                losses.append({name: require_finite(run, step, x, device) for name, x in total.items()})
                grad_norms.append([
                    optimizer_step(model, optimizer, args.max_grad_norm, rate)
                    for model, optimizer, rate in zip(models, optimizers, (rate, critic_rate))
                ])  # fmt: skip
            sums.update(moved)
            moved = sum_over_processes(moved, device)
            approx_kl = moved["approx_kl"] / moved["tokens"]
            if args.max_approx_kl is not None and approx_kl > args.max_approx_kl:  # detail 14
                break

        # Log, evaluate, save.
        elapsed = time.perf_counter() - began
        sums, first_sums = sum_over_processes(sums, device), sum_over_processes(first_sums, device)
        tokens = sums.pop("tokens")
        metrics, samples = {
            **told,
            **{f"policy/{name}": value / tokens for name, value in sums.items()},
            "policy/sampler_gap": first_sums["sampler_gap"] / first_sums["tokens"],
            "policy/ratio_max": reduce_over_processes([ratio_max], device, maximum=True)[0],
            "policy/beta": beta,
            "policy/next_beta": controller.coefficient,
            "policy/epochs": epoch + 1,
            **{f"loss/{name}": sum(loss[name] for loss in losses) / len(losses) for name in losses[0]},
            "optim/grad_norm": sum(norms[0] for norms in grad_norms) / len(grad_norms),
            "optim/critic_grad_norm": sum(norms[1] for norms in grad_norms) / len(grad_norms),
            "optim/learning_rate": rate,
            "time/step": elapsed,
            "time/sample": sample_time,
            "time/train": elapsed - sample_time,
            "throughput/tokens_per_second": told["completions/length_mean"] * len(batch) * args.num_samples / elapsed,
            "memory/peak_gb": peak_memory_gb(device),
        }, []  # fmt: skip
        stopping = stop_requested(stop, device)
        decides = step == args.steps or args.stop_kl is not None  # such an evaluation is not put off by a signal
        if is_due(step, args.eval_every, args.steps) and (decides or not stopping):
            scores, samples = evaluate(step)
            metrics |= scores
        warn_if_all_are_cut(run, step, told, args)
        run.log(step, metrics, samples)
        if samples:
            draw_overoptimisation(run)
        is_far = args.stop_kl is not None and metrics.get("eval/kl", 0.0) > args.stop_kl
        if is_due(step, args.save_every, args.steps) or stopping or is_far:
            save_checkpoint(run, step, models, optimizers)
        if is_far:
            if run.is_main and step < args.steps:
                run.bar.write(f"  {metrics['eval/kl']:.3g} nats per completion: --stop-kl ends the run at step {step}.")
            break
        if stopping and step < args.steps:
            return run.finish(f"python ppo.py --resume {run.folder}", stopped=stopping)

    report_controller(run, args)
    save_model(run, policy, tokenizer, stops, bfloat16)
    return run.finish(f"python rlvr_math.py --model {run.folder / 'model'}")


def check_ppo_args(args: Args) -> None:
    """Refuse settings that cannot work together, before anything is loaded."""
    if args.reward_model == Args.reward_model:
        if not Path(args.reward_model).exists():
            sys.exit(
                f"--reward-model {args.reward_model}: there is none yet. `python reward_model.py` trains one; or name "
                "another, or take a reward function: --reward-model none --answer-weight 1 --critic policy."
            )
    for name in ("model", "reward_model"):  # `latest` may be another when the run is resumed
        if getattr(args, name) != "none" and Path(getattr(args, name)).exists():
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    has_function = any(getattr(args, f"{name}_weight") for name in REWARDS)
    if args.reward_model == "none" and not has_function:
        sys.exit("--reward-model none leaves nothing to reward: add --answer-weight 1, or another function's weight.")
    if args.reward_model == "none" and args.critic == "reward_model":
        sys.exit("--critic reward_model needs a --reward-model to start from; add --critic policy.")
    counts = ("batch_size", "num_samples", "microbatch_tokens", "minibatches", "update_epochs", "steps", "kl_horizon")
    for name in (*counts, "max_completion_tokens", "eval_samples", "eval_rows"):
        if getattr(args, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    if args.temperature <= 0:
        sys.exit("--temperature must be above 0: greedy samples have nothing to learn from.")
    if args.beta < 0 or (args.kl_target is not None and args.kl_target <= 0):
        sys.exit("--beta must be 0 or more, and --kl-target above 0, or none.")
    if args.stop_kl is not None and args.eval_every < 1:
        sys.exit("--stop-kl looks at evaluations: give --eval-every as well.")
    if args.max_approx_kl is not None and args.max_approx_kl <= 0 or args.dual_clip is not None and args.dual_clip <= 1:
        sys.exit("--max-approx-kl must be above 0, and --dual-clip above 1.")
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
