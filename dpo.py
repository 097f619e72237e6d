"""DPO and its relatives: learn from pairs of a better and a worse answer, without a reward model and without sampling.

The policy is its own reward model: β times how far it has raised an answer's log-probability above the reference's is
an implicit reward, fitted so that the better answer gets more. Signal: which of two answers was preferred. Optimizer:
a classification loss. Leash: β, the pull to the reference inside the implicit reward. Defence against hacking: little
is sampled that could be hacked, but offline pairs say nothing about answers not in them, so generated text is judged
before, during and after; `--iterations` draws fresh pairs from the policy itself.

    Δ = [log π(y_w) − log ref(y_w)] − [log π(y_l) − log ref(y_l)]         y_w chosen, y_l rejected, log-probs summed
    loss = mean over pairs of −log σ(β·Δ)                                 and eight others, each a function below

Papers: DPO (arXiv:2305.18290); the others' stand beside their functions. Iterative: arXiv:2312.16682, 2404.19733.

    python dpo.py                                                              # laptop, embedded model, half a minute
    python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized --learning-rate 1e-6 \
        --max-completion-tokens 1024 --eval-rows 32                                                        # one GPU
    torchrun --nproc-per-node 8 dpo.py --model Qwen/Qwen2.5-7B-Instruct --dataset DATA --learning-rate 5e-7 …

What to look at: `loss/train` of DPO starts at log 2 = 0.693 to the digit, since policy and reference are equal, and
`eval/preference_accuracy` at 0, since ties count as wrong. `preference/margin` grows. Both raw log-probabilities,
`preference/chosen_logprob` too, may fall: the loss sees their difference only. That is normal in moderation; when the
chosen one falls by tens of nats, probability goes to answers in neither column (`--loss rpo` or a larger --beta holds
it). `eval/kl` of some to ten nats per answer is usual. `eval/preference_accuracy` may stand still while
`eval/accuracy`, what the samples are worth, still moves, and the other way round: believe the samples.

Implementation details that matter, each marked in the code under its number:
 1. Chosen and rejected share their prompt, trimmed on the left once for both, and its forward and backward.
 2. Log-probabilities are summed over the completion's own tokens, the end-of-turn token included.
 3. The reference is scored once, by the policy itself before its first update, and cached under a hash of weights,
    precision and token ids: training holds no second model, and losses without a reference never load one.
 4. Losses are divided by the pairs of the whole optimizer step, so microbatch size and processes change nothing.
 5. A tie counts as wrong: an untrained policy has accuracy 0, and no luck is taken for skill.
 6. KTO's baseline comes from real forwards on mismatched answers, detached, a mean over the step of all processes.
 7. What is a sum and what a mean per token follows the loss: IPO takes sums; DPO-norm, SimPO and ORPO take means.
 8. ORPO's log(1 − p) is computed so that p near 0 or 1 neither overflows nor loses its digits.
 9. Fresh pairs are the best and the worst sample of a prompt as the sampler's own ids; ties are dropped, and an answer
    that was cut pays for it.
10. All randomness is a function of seed and step, so a resumed run repeats the uninterrupted one bit for bit.
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
from common.kl import (
    has_known_logits,
    head_logits,
    hidden_states,
    local_token_logprobs,
    logit_shape,
    token_logprobs,
    use_layout,
)
from common.tokenizer import (
    Segment,
    as_messages,
    encode_continuation,
    encode_prompt,
    encode_text,
    load_tokenizer,
    pack,
    pack_completions,
    render_chat,
    split_by_tokens,
    stop_token_ids,
)

TINY = Path(__file__).resolve().parent / "common" / "tiny"


@dataclass
class Args:
    # model and data
    model: str = str(TINY)
    """folder or Hub name of a causal language model; it is the reference too"""
    dataset: str = str(TINY / "preferences_train.jsonl")
    """file, folder or Hub name; rows hold prompt + chosen + rejected, or chosen + rejected as whole conversations;
    for KTO also prompt + completion + label; with --iterations prompt or question, and answer"""
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
    max_prompt_tokens: int = 512
    """longer prompts lose their beginning, the same for both answers"""
    max_completion_tokens: int = 128
    """longer answers are cut, samples get as many; 1024 suits a real model"""
    trust_remote_code: bool = False
    """run code that comes with the model"""

    # algorithm
    loss: Literal["dpo", "cdpo", "rdpo", "ipo", "dpo_norm", "rpo", "simpo", "orpo", "kto"] = "dpo"
    """see the functions: ipo is on summed log-probabilities (TRL: on means per token), dpo_norm on means; simpo and
    orpo need no reference; kto takes each answer by itself"""
    beta: float | None = None
    """strength of the leash, orpo's λ; default 0.1, where means per token are compared more: dpo_norm 5, simpo 10"""
    label_smoothing: float = 0.1
    """cdpo, rdpo: the share ε of labels taken to be wrong"""
    simpo_gamma: float = 3.0
    """simpo: the margin γ itself, not γ/β, which here is 0.3; with --beta 2 take 0.5 to 1"""
    nll_weight: float = 1.0
    """rpo: weight α of the chosen answer's negative log-likelihood per token of its own"""
    desirable_weight: float = 1.0
    """kto: λ_D; times the number of desirable rows it should be 1 to 4/3 of λ_U times the undesirable ones'"""
    undesirable_weight: float = 1.0
    """kto: λ_U"""

    # online: pairs drawn from the policy itself
    iterations: int = 0
    """deal the prompts into so many parts, and before training on each sample its pairs from the current policy"""
    num_samples: int = 2
    """completions per prompt, of which the best and the worst make a pair"""
    reward_model: str | None = None
    """output of reward_model.py or any sequence classifier with one label, to rank the samples; without it or a judge,
    whether the answer is right does"""
    ensemble_score: Literal["mean", "min", "uwo"] = "mean"
    """where it is an ensemble: the mean of its members, the worst case, or mean − variance / 2 (arXiv:2310.02743)"""
    judge: str | None = None
    """causal language model that ranks the samples instead, by the probability it gives to preferring one to another"""
    principles: str | None = None
    """file with one principle a line, of which the judge is shown one per pair"""
    missing_eos_penalty: float = 1.0
    """taken off the reward of a completion that was cut"""

    # optimisation
    steps: int = 0
    """optimizer steps; 0 takes --epochs"""
    epochs: float = 1.0
    """passes over the data"""
    batch_size: int = 32
    """pairs (kto: answers) per optimizer step over all processes"""
    microbatch_tokens: int = 4096
    """tokens per forward and backward: a memory knob that does not change the result"""
    learning_rate: float = 2e-4
    """peak; 2e-4 suits the embedded model, 5e-7 to 1e-6 a pretrained one"""
    warmup_steps: int = 5
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
    eval_every: int = 25
    """steps between evaluations; 0 evaluates before and after only"""
    eval_rows: int = 192
    """held-out rows used"""
    eval_prompts: int = 192
    """of these, the number whose prompts are also answered, which costs far more than scoring their pairs"""
    eval_samples: int = 4
    """completions sampled per held-out prompt"""
    temperature: float = 1.0
    """of the samples, in evaluation and with --iterations"""
    style_text: str | None = None
    """report the share of samples that contain this text; on the embedded data `Gladly!`, its preferred style"""
    output_dir: str | None = None
    """default: runs/dpo/<date>_<time>"""
    overwrite: bool = False
    """replace the run that --output-dir holds"""
    resume: str | None = None
    """continue the run in this folder with its own arguments; only steps, epochs and logging may be changed"""
    save_every: int = 0
    """steps between checkpoints; 0 writes one at the end only"""
    log_samples: int = 3
    """completions shown per evaluation"""
    wandb_project: str | None = None
    """also log to Weights & Biases"""


# ---------------------------------------------------------------------------------------------- the mathematics
# All tensors are [B], one number a pair: `delta` is Δ of the docstring, a `ratio` is log π − log ref of one answer
# summed over its tokens, a `mean` is a log-probability or a ratio divided by the answer's tokens.


def dpo_loss(delta: torch.Tensor, beta: float) -> torch.Tensor:
    """−log σ(βΔ). Rafailov et al. 2023, arXiv:2305.18290."""
    return -F.logsigmoid(beta * delta)


def cdpo_loss(delta: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """−(1−ε)·log σ(βΔ) − ε·log σ(−βΔ): a share ε of the labels is wrong. Mitchell 2023, ericmitchell.ai/cdpo.pdf."""
    return -(1 - smoothing) * F.logsigmoid(beta * delta) - smoothing * F.logsigmoid(-beta * delta)


def rdpo_loss(delta: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """[−(1−ε)·log σ(βΔ) + ε·log σ(−βΔ)] / (1−2ε): unbiased under flipped labels. arXiv:2403.00409."""
    clean, flipped = -F.logsigmoid(beta * delta), -F.logsigmoid(-beta * delta)
    return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)


def ipo_loss(delta: torch.Tensor, beta: float) -> torch.Tensor:
    """(Δ − 1/(2β))²: regress to a finite margin. Azar et al. 2023, arXiv:2310.12036; sums as in its equation 17."""
    return (delta - 1 / (2 * beta)) ** 2


def dpo_norm_loss(chosen_mean: torch.Tensor, rejected_mean: torch.Tensor, beta: float) -> torch.Tensor:
    """−log σ(β(d̄_w − d̄_l)), d̄ the log-ratio per token. Tülu 3, arXiv:2411.15124."""
    return -F.logsigmoid(beta * (chosen_mean - rejected_mean))


def rpo_loss(delta: torch.Tensor, chosen_mean: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    """−log σ(βΔ) − α·ℓ̄_w, ℓ̄_w the chosen answer's mean log-probability. Pang et al. 2024, arXiv:2404.19733."""
    return dpo_loss(delta, beta) - alpha * chosen_mean


def simpo_loss(chosen_mean: torch.Tensor, rejected_mean: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """−log σ(β(ℓ̄_w − ℓ̄_l) − γ), ℓ̄ mean log-probabilities. Meng et al. 2024, arXiv:2405.14734."""
    return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - gamma)


def orpo_loss(chosen_mean: torch.Tensor, rejected_mean: torch.Tensor, beta: float) -> torch.Tensor:
    """−ℓ̄_w − λ·log σ(log odds_w − log odds_l), odds = p/(1−p) of p = e^ℓ̄. Hong et al. 2024, arXiv:2403.07691."""
    chosen, rejected = (mean.clamp(max=-1e-6) for mean in (chosen_mean, rejected_mean))
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -chosen_mean - beta * F.logsigmoid(log_odds)


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 − e^x) for x < 0, by whichever form keeps its digits (Mächler 2012)."""
    near = x > -math.log(2)  # detail 8
    # Each form sees only arguments of its own, or the other's infinite gradient times zero would be a NaN.
    return torch.where(
        near,
        torch.log(-torch.expm1(x.masked_fill(~near, -0.5))),
        torch.log1p(-torch.exp(x.masked_fill(near, -1.0))),
    )


def kto_loss(
    ratio: torch.Tensor, desirable: torch.Tensor, baseline: float, beta: float, weight_d: float, weight_u: float
) -> torch.Tensor:
    """λ_D·[1 − σ(β(h − z₀))] where `desirable`, else λ_U·[1 − σ(β(z₀ − h))]; h = `ratio` [B], one number an answer.

    Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    gain = beta * torch.where(desirable, ratio - baseline, baseline - ratio)
    return torch.where(desirable, weight_d, weight_u) * (1 - torch.sigmoid(gain))


def kto_baseline(mismatched_ratios: torch.Tensor) -> float:
    """z₀ = max(0, mean of h over prompts with an answer to another one): an estimate of KL(π‖ref), detached."""
    return max(0.0, float(mismatched_ratios.mean()))  # detail 6


NEEDS_NO_REFERENCE = ("simpo", "orpo")
BETAS = {"dpo_norm": 5.0, "simpo": 10.0}


# ---------------------------------------------------------------------------------------------- data


@dataclass
class Example:
    """A prompt with its chosen and its rejected answer as token ids, or with one answer and its label."""

    prompt: list[int]
    completions: list[list[int]]
    desirable: bool | None = None  # of a single answer
    gold: str | None = None
    ref_logprobs: list[float] | None = None  # summed over each completion
    mismatch: Example | None = None  # KTO: the same prompt with the answer to another one


PAIRS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
SINGLES = (("prompt", "completion", "label"),)


def wanted_columns(args: Args) -> tuple[tuple[str, ...], ...]:
    """What the rows must hold for this loss."""
    if args.iterations:
        is_ranked = args.reward_model or args.judge
        return (("prompt",), ("question",)) if is_ranked else (("prompt", "answer"), ("question", "answer"))
    return PAIRS + SINGLES if args.loss == "kto" else PAIRS


def conversation(row: dict, column: str, where: str) -> tuple[str | list[dict], dict]:
    """What stands before the answer in `column`, as text or messages, and the answer as a message.

    The column holds the answer behind the row's prompt, or the whole conversation: a list that does not begin with
    the assistant, or a text of HH-RLHF's form ("\\n\\nHuman: …\\n\\nAssistant: …").
    """
    prompt, value = row.get("prompt"), row[column]
    if isinstance(value, str) and prompt is None:
        turns = re.split(r"\n\n(Human|Assistant):", value)
        if len(turns) < 5 or turns[0].strip():
            sys.exit(f"{where}: {column} is text without a prompt; give a prompt column, or a list of messages.")
        roles = ["user" if name == "Human" else "assistant" for name in turns[1::2]]
        value = [{"role": role, "content": text.strip()} for role, text in zip(roles, turns[2::2])]
    if isinstance(value, str) or not value:
        return prompt, {"role": "assistant", "content": value or ""}
    before, answer = value[:-1], value[-1]
    if value[0]["role"] != "assistant":
        return before, answer
    if prompt is None:
        sys.exit(f"{where}: {column} begins with the assistant and there is no prompt.")
    return as_messages(prompt, "user") + before if before else prompt, answer


def encode_answers(tokenizer, prompt: str | list[dict], answers: list[dict], tools):
    """Token ids of a prompt, and of each answer up to its end-of-turn token, cut where sampling would begin."""
    if isinstance(prompt, str) and not tokenizer.chat_template:
        texts = [encode_continuation(tokenizer, prompt, answer["content"])[1] for answer in answers]
        return encode_text(tokenizer, prompt), texts
    messages, completions = as_messages(prompt, "user"), []
    prompt_ids = encode_prompt(tokenizer, messages, tools)
    for answer in answers:
        ids, mask = render_chat(tokenizer, [*messages, answer], tools)
        end = len(ids) - mask[::-1].index(True)  # detail 2: nothing of what the template writes after the turn
        completions.append(ids[len(prompt_ids) : end])
    return prompt_ids, completions


def encode_rows(tokenizer, rows: list[dict], source: str, max_prompt: int, max_completion: int) -> list[Example]:
    """Rows as examples. Those that teach nothing are dropped, long ones cut, and all of them counted."""
    examples, dropped, cut = [], Counter(), Counter()
    bar = tqdm(rows, desc=f"tokenising {Path(source).name}", leave=False, disable=len(rows) < 2000)
    for number, row in enumerate(bar, 1):
        where = f"{source}, row {number}"
        columns = ("chosen", "rejected") if row.get("chosen") is not None else ("completion",)
        desirable = row["label"] if columns == ("completion",) else None
        if desirable not in (None, True, False):
            sys.exit(f"{where}: label must be true or false (or 1 or 0), found {desirable!r}.")
        prompts, answers = zip(*(conversation(row, column, where) for column in columns))
        if any(prompt != prompts[0] for prompt in prompts):
            dropped["different prompts"] += 1
            continue
        if not all((a.get("content") or "").strip() for a in answers) or not prompts[0]:
            dropped["an empty side"] += 1
            continue
        if any(answer["role"] != "assistant" for answer in answers):
            dropped["an end that is not the assistant's"] += 1
            continue
        try:
            prompt, completions = encode_answers(tokenizer, prompts[0], answers, row.get("tools"))
        except (TemplateError, TypeError, ValueError):  # the latter for an empty list of messages
            dropped["roles or content that the chat template refuses"] += 1
            continue
        cut["prompts"] += len(prompt) > max_prompt
        cut["answers"] += sum(len(ids) > max_completion for ids in completions)
        prompt = prompt[-max_prompt:]  # detail 1: once, for both
        completions = [ids[:max_completion] for ids in completions]
        if len(completions) == 2 and completions[0] == completions[1]:
            dropped["equal answers"] += 1
            continue
        label = None if desirable is None else bool(desirable)
        gold = row.get("answer")
        examples.append(Example(prompt, completions, label, gold if isinstance(gold, str) else None))
    if dropped or +cut:
        reasons = ", ".join(f"{count} for {reason}" for reason, count in dropped.items())
        print(
            f"{source}: {sum(dropped.values())} rows dropped{f' ({reasons})' if reasons else ''}, {cut['prompts']} "
            f"prompts trimmed on the left to {max_prompt} tokens, {cut['answers']} answers cut after {max_completion}; "
            f"{len(examples)} rows kept."
        )
    if not examples:
        sys.exit(f"{source}: no row is left to train on (see the line above for what was dropped and why).")
    return examples


def split_pairs(examples: list[Example], seed: int, source: str) -> list[Example]:
    """KTO's examples: every answer by itself with its label, and with a mismatch for the baseline, which is the answer
    of the next example in a shuffled order that has another prompt."""
    singles = []
    for example in examples:
        labels = [True, False] if example.desirable is None else [example.desirable]
        singles += [Example(example.prompt, [ids], label) for ids, label in zip(example.completions, labels)]
    count = sum(single.desirable for single in singles)
    if singles and count in (0, len(singles)):
        kind = "desirable" if count else "undesirable"
        sys.exit(f"{source}: all {len(singles)} answers are {kind}; KTO learns from the contrast and needs both kinds.")
    order = torch.randperm(len(singles), generator=torch.Generator().manual_seed(seed)).tolist()
    for k, i in enumerate(order):
        others = (singles[j] for j in [*order[k + 1 :], *order[:k]])
        other = next((other for other in others if other.prompt != singles[i].prompt), None)
        if other is None:
            sys.exit(f"{source}: all prompts are the same; KTO's baseline needs answers to other prompts.")
        singles[i].mismatch = Example(singles[i].prompt, other.completions)
    return singles


def shuffled_passes(count: int, draws: int, seed: int) -> list[int]:
    """`draws` indices from passes over `count` examples, each pass in an order of its own. A longer list begins with
    the shorter one, so that a resumed run may be given more steps."""
    generator = torch.Generator().manual_seed(seed)  # detail 10
    passes = math.ceil(draws / count) if count else 0
    return [i for _ in range(passes) for i in torch.randperm(count, generator=generator).tolist()][:draws]


# ---------------------------------------------------------------------------------------------- scoring


def microbatches(examples: list[Example], max_tokens: int, device, rank: int, world: int):
    """This process's share of `examples`: lists of indices of at most `max_tokens` tokens, each with its weight. A
    process with fewer of them than another repeats some with weight zero: sharded weights are gathered by all
    processes together."""
    mine = list(range(rank, len(examples), world))
    texts = [sum(examples[i].completions, examples[i].prompt) for i in mine]
    parts = [([mine[j] for j in part], 1.0) for part in split_by_tokens(texts, max_tokens)]
    rounds = int(reduce_over_processes([len(parts)], device, maximum=True)[0])
    return parts + [([0], 0.0)] * (rounds - len(parts))


def completion_logprobs(model, examples: list[Example], device, bfloat16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities summed over each completion of `examples` [R], with gradient, and the completions' lengths."""
    prompts = [example.prompt for example in examples for _ in example.completions]
    completions = [ids for example in examples for ids in example.completions]
    packed = pack_completions(prompts, completions)  # detail 1
    # A forward needs each weight once, so keeping its bfloat16 copy for another use would only take memory.
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
        logprobs, _ = token_logprobs(model, packed.to(device))
    sums = torch.stack([part.sum() for part in logprobs.split(packed.lengths)])  # detail 2
    return sums, torch.tensor(packed.lengths, device=device)


@torch.no_grad()
def all_logprobs(model, examples: list[Example], max_tokens: int, device, rank: int, world: int, bfloat16: bool):
    """The same without gradient for any number of examples, over all processes: a list per example."""
    starts = torch.tensor([0] + [len(example.completions) for example in examples]).cumsum(0).tolist()
    sums = [0.0] * starts[-1]
    parts = microbatches(examples, max_tokens, device, rank, world)
    was_training = model.training
    model.eval()
    for part, weight in tqdm(parts, desc="scoring", leave=False, disable=len(parts) < 50):
        logprobs, _ = completion_logprobs(model, [examples[i] for i in part], device, bfloat16)
        if weight:
            places = [k for i in part for k in range(starts[i], starts[i + 1])]
            for k, value in zip(places, logprobs.tolist()):
                sums[k] = value
    model.train(was_training)
    sums = reduce_over_processes(sums, device)
    return [sums[a:b] for a, b in zip(starts, starts[1:])]


def hash_weights(model) -> str:
    """A digest of a model's parameters, by which cached log-probabilities know whose they are."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def score_reference(run, examples: list[Example], weights: str, args: Args, load, parallel: tuple) -> None:
    """Fill in `ref_logprobs` from the run's cache, or with the model that `load` returns.

    The key holds all that a log-probability depends on: the reference's weights, the device, the number of processes,
    the precision, and the token ids, which tokenizer, template and truncation have made of the data.  # detail 3
    """
    everything = [example for e in examples for example in (e, e.mismatch) if example is not None]
    device, _, world, bfloat16 = parallel
    digest = hashlib.sha256(f"{weights} {device.type} {world} {bfloat16}".encode())
    for example in everything:
        digest.update(repr((example.prompt, example.completions)).encode())
    path = run.folder / "reference" / f"{digest.hexdigest()[:16]}.json"
    values = read_round(path, run)
    if values is None:
        values = all_logprobs(load(), everything, args.microbatch_tokens, *parallel)
        gc.collect()  # a sharded reference points to itself; it must not stay for the training
        write_round(path, values, run)
    for example, value in zip(everything, values):
        example.ref_logprobs = value


def read_round(path: Path, run):
    """What `write_round` wrote, on all processes, or None."""
    content = [json.loads(path.read_text()) if run.is_main and path.is_file() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(content)
    return content[0]


def write_round(path: Path, content, run) -> None:
    """Keep what a round has drawn or judged, as JSON."""
    if run.is_main:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(content))


def implicit_rewards(loss: str, beta: float, logprobs, ratio, lengths) -> torch.Tensor:
    """What a loss takes for the reward of each answer [R], without gradient."""
    value = logprobs if loss in NEEDS_NO_REFERENCE else ratio
    per_token = loss in ("dpo_norm", *NEEDS_NO_REFERENCE)
    return (beta * (value / lengths if per_token else value)).detach()


def pair_losses(args: Args, beta: float, logprobs, ratio, lengths) -> torch.Tensor:
    """The loss of each pair [B]; the rows [2B] of the arguments are chosen and rejected in turn."""
    delta = ratio.view(-1, 2)[:, 0] - ratio.view(-1, 2)[:, 1]
    chosen_mean, rejected_mean = (logprobs / lengths).view(-1, 2).unbind(1)  # detail 7
    if args.loss == "dpo":
        return dpo_loss(delta, beta)
    if args.loss == "cdpo":
        return cdpo_loss(delta, beta, args.label_smoothing)
    if args.loss == "rdpo":
        return rdpo_loss(delta, beta, args.label_smoothing)
    if args.loss == "ipo":
        return ipo_loss(delta, beta)
    if args.loss == "dpo_norm":
        return dpo_norm_loss(*(ratio / lengths).view(-1, 2).unbind(1), beta)
    if args.loss == "rpo":
        return rpo_loss(delta, chosen_mean, beta, args.nll_weight)
    if args.loss == "simpo":
        return simpo_loss(chosen_mean, rejected_mean, beta, args.simpo_gamma)
    return orpo_loss(chosen_mean, rejected_mean, beta)


STATISTICS = (
    "examples", "tokens", "accuracy", "chosen", "chosen_reward", "chosen_logprob",
    "rejected", "rejected_reward", "rejected_logprob",
)  # fmt: skip


def batch_losses(args: Args, beta: float, baseline: float, examples: list[Example], logprobs, lengths):
    """The loss of each example [B] and, summed over them, what the means of preference/… are made of."""
    ratio = logprobs - reference_tensor(examples, logprobs.device)
    rewards = implicit_rewards(args.loss, beta, logprobs, ratio, lengths)
    if args.loss == "kto":
        is_chosen = torch.tensor([example.desirable for example in examples], device=logprobs.device)
        losses = kto_loss(ratio, is_chosen, baseline, beta, args.desirable_weight, args.undesirable_weight)
        right = torch.where(is_chosen, ratio > baseline, ratio < baseline)
    else:
        is_chosen = torch.tensor([True, False], device=logprobs.device).repeat(len(examples))
        losses = pair_losses(args, beta, logprobs, ratio, lengths)
        right = rewards[0::2] > rewards[1::2]  # detail 5
    sums = {"examples": len(examples), "tokens": lengths.sum(), "accuracy": right.sum()}
    for name, rows in (("chosen", is_chosen), ("rejected", ~is_chosen)):
        sums[name] = rows.sum()
        sums[f"{name}_reward"], sums[f"{name}_logprob"] = rewards[rows].sum(), logprobs.detach()[rows].sum()
    return losses, {name: float(value) for name, value in sums.items()}


def reference_tensor(examples: list[Example], device) -> torch.Tensor:
    """Reference log-probabilities of all completions of `examples` [R]; zeros where the loss needs none."""
    values = [value for e in examples for value in e.ref_logprobs or [0.0] * len(e.completions)]
    return torch.tensor(values, device=device)


def preference_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over the examples of all processes; for KTO accuracy is the share on the right side of the baseline."""
    means = {
        f"preference/{name}_{what}": sums[f"{name}_{what}"] / max(sums[name], 1.0)
        for name in ("chosen", "rejected")
        for what in ("reward", "logprob")
    }
    margin = means["preference/chosen_reward"] - means["preference/rejected_reward"]
    return {**means, "preference/margin": margin, "preference/accuracy": sums["accuracy"] / max(sums["examples"], 1.0)}


# ---------------------------------------------------------------------------------------------- sampling and judging


PRINCIPLE = "Choose the answer that is more helpful, honest and harmless."


def content(completion: str | list[dict]) -> str:
    """What is said in a completion."""
    texts = [completion] if isinstance(completion, str) else [m.get("content") or "" for m in completion]
    return "".join(texts).strip()


def judge_question(prompt: str | list[dict], first: str, second: str, principle: str) -> str:
    """What the judge is asked."""
    turns = "\n".join(f"{m['role'].capitalize()}: {content([m])}" for m in as_messages(prompt, "user"))
    return (
        f"Which answer to this conversation is better? {principle}\n\n{turns}\n\n"
        f"Answer A: {first}\n\nAnswer B: {second}\n\nReply with A or B."
    )


def judged_probability(first: float, swapped: float) -> float:
    """Probability that response 1 is better, from P(option A) with response 1 as A, and with response 2 as A."""
    return (first + 1 - swapped) / 2


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


def check_principles(args) -> None:
    """--principles must be a file that says something, and --judge there to read it."""
    if args.principles and not args.judge:
        sys.exit("--principles are shown to a judge: name one with --judge.")
    if args.principles and not (Path(args.principles).is_file() and Path(args.principles).read_text().strip()):
        sys.exit(f"--principles {args.principles}: no such file, or no principle in it (one a line).")


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


def win_rates(judge, prompts: list, texts: list[list[str]], numbers: list[int]) -> tuple[list[list[float]], list]:
    """For each sample of a prompt its mean probability of being better than another one; and what the judge said."""
    places = [(i, a, b) for i, row in enumerate(texts) for a in range(len(row)) for b in range(a)]
    readings = judge([(prompts[i], texts[i][a], texts[i][b]) for i, a, b in places], [numbers[i] for i, _, _ in places])
    rates = [[0.0] * len(row) for row in texts]
    for (i, a, b), reading in zip(places, readings):
        probability = judged_probability(*reading) if reading else 0.5
        rates[i][a] += probability / (len(texts[i]) - 1)
        rates[i][b] += (1 - probability) / (len(texts[i]) - 1)
    return rates, [reading for reading in readings if reading]


def rank_samples(tokenizer, questions, numbers, groups, reward_model, judge, penalty) -> tuple[list[list[float]], list]:
    """A reward for each sample of each question: from the reward model, the judge, or 1 for a right answer; less
    `penalty` for one that was cut. And what the judge said."""
    texts = [[tokenizer.decode(c.ids, skip_special_tokens=True) for c in group] for group in groups]
    prompts = [as_messages(q["row"].get("prompt", q["row"].get("question")), "user") for q in questions]
    readings = []
    if reward_model:
        scores = reward_model([(p, text) for p, row in zip(prompts, texts) for text in row]).tolist() if texts else []
        rewards = [[scores.pop(0) for _ in row] for row in texts]
    elif judge:
        rewards, readings = win_rates(judge, prompts, texts, numbers)
    else:
        rewards = [[float(is_correct(text, q["gold"])) for text in row] for q, row in zip(questions, texts)]
    rewards = [[r - penalty * (not c.stopped) for r, c in zip(row, group)] for row, group in zip(rewards, groups)]
    return rewards, readings


def sample_pairs(sampler, tokenizer, questions, rankers: tuple, args: Args, seed: int, rank: int, world: int):
    """Fresh pairs from the current policy, of all processes, as prompt, chosen and rejected ids; and metrics."""
    mine = list(range(rank, len(questions), world))
    asked = [questions[i] for i in mine]
    sampling = {"num_samples": args.num_samples, "temperature": args.temperature, "seed": seed, "indices": mine}
    with tqdm(total=len(mine) * args.num_samples, desc="sampling pairs", leave=False, disable=None) as bar:
        prompts = [question["ids"] for question in asked]
        groups = sampler.generate(prompts, args.max_completion_tokens, **sampling, progress=bar.update)
    rewards, readings = rank_samples(tokenizer, asked, mine, groups, *rankers, args.missing_eos_penalty)
    pairs = []
    for i, question, group, row in zip(mine, asked, groups, rewards):
        best, worst = row.index(max(row)), row.index(min(row))
        if row[best] > row[worst]:  # detail 9
            pairs.append((i, question["ids"], group[best].ids, group[worst].ids))
    gathered = [(pairs, sum(map(sum, rewards)), readings)]
    if dist.is_initialized():
        gathered = [None] * world
        dist.all_gather_object(gathered, (pairs, sum(map(sum, rewards)), readings))
    everything = sorted(pair for part, _, _ in gathered for pair in part)
    mean = sum(total for _, total, _ in gathered) / (len(questions) * args.num_samples)
    if rank == 0 and args.judge:
        readings = [reading for _, _, part in gathered for reading in part]
        report_flips(readings, math.comb(args.num_samples, 2) * len(questions))
    return [pair[1:] for pair in everything], {"reward/mean": mean, "preference/pairs": float(len(everything))}


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


def evaluate_drift(sampler, tokenizer, questions, reference, args: Args, style: str | None, parallel: tuple) -> dict:
    """On fresh samples at temperature 1: KL(π‖ref) per answer, from summed log-probs, and the share with `style`."""
    device, rank, world, bfloat16 = parallel
    indices = list(range(rank, len(questions), world))
    prompts = [questions[i]["ids"] for i in indices]
    sampling = {"num_samples": args.eval_samples, "seed": args.seed + 1, "indices": indices}
    groups = sampler.generate(prompts, args.max_completion_tokens, **sampling)
    sums = {"samples": sum(map(len, groups)), "kl": sum(sum(c.logprobs) for group in groups for c in group)}
    if style:
        sums["style"] = sum(style in tokenizer.decode(c.ids) for group in groups for c in group)
    sums = sum_over_processes(sums, device)
    if reference is not None:
        sampled = [Example(prompt, [c.ids for c in group]) for prompt, group in zip(prompts, groups)]
        shares = [sampled] * world
        if dist.is_initialized():
            dist.all_gather_object(shares, sampled)
        everything = [example for share in shares for example in share]
        sums["kl"] -= sum(map(sum, all_logprobs(reference, everything, args.microbatch_tokens, *parallel)))
    else:
        del sums["kl"]
    return {f"eval/{name}": sums[name] / sums["samples"] for name in ("kl", "style") if name in sums}


@torch.no_grad()
def evaluate_pairs(policy, pairs: list[Example], args: Args, beta: float, parallel: tuple) -> dict:
    """Whether the implicit reward prefers the chosen answer of held-out pairs, by how much, and the loss on them."""
    values = all_logprobs(policy, pairs, args.microbatch_tokens, *parallel)
    logprobs = torch.tensor(values).flatten()
    lengths = torch.tensor([len(ids) for pair in pairs for ids in pair.completions])
    ratio = logprobs - reference_tensor(pairs, "cpu")
    rewards = implicit_rewards(args.loss, beta, logprobs, ratio, lengths).view(-1, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = {
        "eval/preference_accuracy": float((margins > 0).double().mean()),  # detail 5
        "eval/preference_margin": float(margins.mean()),
    }
    if args.loss != "kto":  # whose loss is not one of pairs
        metrics["eval/loss"] = float(pair_losses(args, beta, logprobs, ratio, lengths).mean())
    return metrics


# ---------------------------------------------------------------------------------------------- main


def main(args: Args) -> dict:
    args = resumed_args(args, "dpo")
    check_dpo_args(args)
    beta = BETAS.get(args.loss, 0.1) if args.beta is None else args.beta
    style = args.style_text or ("Gladly!" if args.dataset == Args.dataset else None)
    device, rank, world = start_processes(args.device)
    stop = catch_stop_signals()

    # Data, before any model is loaded.
    columns = wanted_columns(args)
    rows = load_rows(args.dataset, args.subset, args.split, columns)
    if args.eval_dataset or args.dataset == Args.dataset:
        held_out_source = args.eval_dataset or str(TINY / "preferences_test.jsonl")
        held_out = load_held_out(args, held_out_source, columns)[: args.eval_rows]
    else:
        held_out_source = f"rows held out of {args.dataset}"
        rows, held_out = hold_out(rows, args)
    tokenizer = load_tokenizer(args.model)
    context = context_length(load_config(args.model, args.trust_remote_code))
    longest = min(args.max_prompt_tokens, context - args.max_completion_tokens)
    if longest < 1:
        sys.exit(f"--max-completion-tokens {args.max_completion_tokens} fills the model's whole context of {context}.")
    budget = (longest, args.max_completion_tokens)
    if args.iterations:
        examples, count = [], len(questions := encode_questions(tokenizer, rows, args.dataset, longest))
        if count < args.iterations:
            sys.exit(f"--iterations {args.iterations}: {args.dataset} has but {count} prompts to deal out among them.")
        held_out_pairs = [row for row in held_out if all(row.get(c) is not None for c in ("chosen", "rejected"))]
        held_out_questions = encode_questions(tokenizer, held_out[: args.eval_prompts], held_out_source, longest)
    else:
        examples = encode_rows(tokenizer, rows, args.dataset, *budget)
        if args.loss == "kto":
            examples = split_pairs(examples, args.seed, args.dataset)
        held_out_pairs, count = held_out, len(examples)
    held_out_examples = encode_rows(tokenizer, held_out_pairs, held_out_source, *budget) if held_out_pairs else []
    if not args.iterations:
        held_out_questions = [{"ids": e.prompt, "gold": e.gold} for e in held_out_examples[: args.eval_prompts]]
    pairs = [example for example in held_out_examples if example.desirable is None]

    # With --iterations, parts of the prompts in turn, and so many steps on the pairs of each.
    rounds = max(1, args.iterations)
    steps_per_round = max(1, math.ceil(args.epochs * count / rounds / args.batch_size))
    steps = args.steps or rounds * steps_per_round
    order = shuffled_passes(count, steps * args.batch_size, args.seed)

    # Model, optimizer, run folder.
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    parallel = (device, rank, world, bfloat16)
    reward_model = load_reward_model(args, device, bfloat16) if args.reward_model else None
    judge = load_judge(args, device, bfloat16) if args.judge else None
    policy = load_model(args, device)
    stops = stop_token_ids(tokenizer, policy)
    weights = "" if args.loss in NEEDS_NO_REFERENCE else hash_weights(policy)
    policy = shard(policy, world)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
    shown = {"loss/train": "loss", "preference/accuracy": "pair accuracy"}
    run = Run(args, "dpo", rank, {**shown, "eval/preference_accuracy": "held-out pairs", "eval/accuracy": "accuracy"})

    def load_reference():
        return shard(load_model(args, device), world).requires_grad_(False)

    def score_under_reference(examples: list[Example], load) -> None:
        if examples and args.loss not in NEEDS_NO_REFERENCE:
            score_reference(run, examples, weights, args, load, parallel)

    def new_sampler() -> Sampler:  # its memory is free in between
        return Sampler(policy, stops, torch.bfloat16 if bfloat16 else torch.float32)

    def evaluate(step: int) -> tuple[dict, list[dict]]:
        metrics = evaluate_pairs(policy, pairs, args, beta, parallel) if pairs else {}
        sampler, reference = new_sampler(), None
        if args.loss not in NEEDS_NO_REFERENCE:
            reference = load_reference() if step else policy
        scores, samples, _ = evaluate_answers(sampler, tokenizer, held_out_questions, args, rank, world)
        drift = evaluate_drift(sampler, tokenizer, held_out_questions, reference, args, style, parallel)
        del reference
        gc.collect()
        return {**metrics, **scores, **drift}, samples

    def fresh_examples(iteration: int) -> tuple[list[Example], dict]:
        """Pairs sampled from the current policy; or, in a resumed run, those that were drawn before it stopped."""
        path = run.folder / "pairs" / f"{iteration:04d}.json"
        drawn = read_round(path, run)
        if drawn is None:
            part = questions[iteration % args.iterations :: args.iterations]
            seed = args.seed * 1_000_003 + iteration  # detail 10
            drawn = sample_pairs(new_sampler(), tokenizer, part, (reward_model, judge), args, seed, rank, world)
            write_round(path, drawn, run)
        examples = [Example(prompt, [chosen, rejected]) for prompt, chosen, rejected in drawn[0]]
        if args.loss == "kto" and len({tuple(example.prompt) for example in examples}) < 2:
            if rank == 0:
                print(f"iteration {iteration}: no pairs of two prompts, which KTO's baseline needs; it trains nothing.")
            examples = []
        elif args.loss == "kto":
            examples = split_pairs(examples, args.seed + iteration, f"iteration {iteration}")
        score_under_reference(examples, load_reference)
        return examples, drawn[1]

    # The policy has not been trained nor its checkpoint loaded yet: it is the reference.  # detail 3
    began = time.perf_counter()
    for unscored in ([examples[i] for i in sorted(set(order))] if examples else [], pairs):
        score_under_reference(unscored, lambda: policy)
    reference_time = {"time/reference": time.perf_counter() - began}
    first = load_checkpoint(run, policy, optimizer, steps) if args.resume else 0
    if not args.resume:
        run.log(0, *evaluate(0))

    for step in range(first + 1, steps + 1):
        began = time.perf_counter()
        fresh, place = {}, step - 1
        if args.iterations:
            iteration, place = divmod(step - 1, steps_per_round)
            if place == 0 or step == first + 1:
                examples, fresh = fresh_examples(iteration)
                order = shuffled_passes(len(examples), steps_per_round * args.batch_size, args.seed + iteration)
        batch = [examples[i] for i in order[place * args.batch_size : (place + 1) * args.batch_size]]

        baseline = 0.0
        if args.loss == "kto" and batch:  # detail 6
            mismatches = [example.mismatch for example in batch]
            logprobs = torch.tensor(all_logprobs(policy, mismatches, args.microbatch_tokens, *parallel)).flatten()
            baseline = kto_baseline(logprobs - reference_tensor(mismatches, "cpu"))

        total_loss, sums = 0.0, Counter()
        for part, weight in microbatches(batch, args.microbatch_tokens, device, rank, world):
            micro = [batch[i] for i in part]
            logprobs, lengths = completion_logprobs(policy, micro, device, bfloat16)
            losses, statistics = batch_losses(args, beta, baseline, micro, logprobs, lengths)
            loss = losses.sum() / len(batch) * weight  # detail 4
            (loss * world).backward()  # gradients are averaged over processes, the loss is a sum over them
            total_loss += loss.item()
            sums.update({name: value * weight for name, value in statistics.items()})

        total_loss = require_finite(run, step, total_loss, device)
        rate = learning_rate_at(step, steps, args)
        grad_norm = optimizer_step(policy, optimizer, args.max_grad_norm, rate)

        elapsed = time.perf_counter() - began
        totals = sum_over_processes({name: sums[name] for name in STATISTICS}, device)
        metrics, samples = {
            "loss/train": total_loss,
            **preference_metrics(totals),
            **({"preference/baseline": baseline} if args.loss == "kto" else {}),
            **(fresh if place == 0 else {}),
            **(reference_time if step == 1 else {}),
            "optim/grad_norm": grad_norm,
            "optim/learning_rate": rate,
            "throughput/tokens_per_second": totals["tokens"] / elapsed,
            "time/step": elapsed,
            "memory/peak_gb": peak_memory_gb(device),
        }, []  # fmt: skip
        stopping = stop_requested(stop, device)
        if is_due(step, args.eval_every, steps) and (step == steps or not stopping):
            scores, samples = evaluate(step)
            metrics |= scores
        run.log(step, metrics, samples)
        if is_due(step, args.save_every, steps) or stopping:
            save_checkpoint(run, step, policy, optimizer)
        if stopping and step < steps:
            return run.finish(f"python dpo.py --resume {run.folder}", stopped=stopping)

    save_model(run, policy, tokenizer, stops, bfloat16)
    return run.finish(f"python rlvr_math.py --model {run.folder / 'model'}")


def check_dpo_args(args: Args) -> None:
    """Refuse settings that cannot work together, before anything is loaded."""
    if min(args.batch_size, args.microbatch_tokens, args.eval_samples, args.eval_prompts, args.eval_rows) < 1:
        sys.exit(
            "--batch-size, --microbatch-tokens, --eval-samples, --eval-prompts and --eval-rows must be at least 1."
        )
    if args.beta is not None and args.beta <= 0:
        sys.exit(f"--beta {args.beta}: must be above 0; the larger, the closer to the reference.")
    if not 0 <= args.label_smoothing < 0.5:
        sys.exit(f"--label-smoothing {args.label_smoothing}: the share of wrong labels lies from 0 to below 0.5.")
    if args.loss == "kto" and args.batch_size < 2:
        sys.exit("--batch-size 1: KTO's baseline is a mean over the mismatched answers of a step; take at least 2.")
    if args.iterations and (args.num_samples < 2 or args.temperature <= 0):
        sys.exit("--iterations makes pairs of different samples: it needs --num-samples 2 and a --temperature above 0.")
    if (args.reward_model or args.judge) and not args.iterations:
        sys.exit("--reward-model and --judge rank fresh samples, so they need --iterations: pairs are ranked already.")
    if args.reward_model and args.judge:
        sys.exit("--reward-model and --judge both rank the samples; give one of them.")
    check_principles(args)
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
