"""Supervised fine-tuning: imitate demonstrations, the first stage of post-training.

A demonstration is a conversation; the model learns to produce what the assistant wrote in it, token by token, the
token that ends the turn included. Signal: what people (or a better model) wrote. Optimizer: likelihood. Leash: none
but a small learning rate and few epochs. Defence against hacking: there is no reward to hack, only data to copy.

    loss = − Σ_t m_t · log π(y_t | y_<t)  /  Σ_t m_t        m_t = 1 on the assistant's tokens, else 0

with both sums over the whole optimizer step, all microbatches and processes.
Papers: FLAN (arXiv:2109.01652, mixing), InstructGPT (arXiv:2203.02155), NEFTune (arXiv:2310.05914).

    python sft.py                                                                    # laptop, embedded model, 1 minute
    python sft.py --model Qwen/Qwen2.5-0.5B --dataset openai/gsm8k --subset main     # one GPU
    torchrun --nproc-per-node 8 sft.py --model Qwen/Qwen2.5-7B --dataset DATA        # many GPUs

What to look at: `loss/train` falls fast, then slowly; `eval/loss` follows until the demonstrations are learned by
heart, then turns up: stop there, or take fewer epochs. `eval/accuracy` is what the samples are worth and can keep
rising when the loss no longer falls. A `loss/train` near 0 on fresh data means that the mask is wrong.

Implementation details that matter, each marked in the code under its number:
 1. The mask comes from the rendered conversation's spans, not from re-tokenised pieces or pad ids.
 2. The end-of-turn token is trained, so the model learns to stop.
 3. Documents are packed without padding: positions restart, attention does not cross, first tokens are no targets.
 4. The loss is divided by the scored tokens of the whole step, so microbatch size and processes change nothing.
 5. Several data sets are mixed in proportion to their size, which counts up to a cap (FLAN).
 6. NEFTune's noise scales with the document's own length, not with the packed row's or a padded one.
 7. All randomness is a function of seed and step, so a resumed run repeats the uninterrupted one bit for bit.
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
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from common.generation import Sampler
from common.kl import has_known_logits, local_token_logprobs, supports_layout, token_logprobs, use_layout
from common.tokenizer import (
    Segment,
    as_messages,
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
    """folder or Hub name of a causal language model"""
    dataset: tuple[str, ...] = (str(TINY / "demonstrations_train.jsonl"),)
    """files, folders or Hub names; rows hold messages, prompt + completion, question + answer, or text"""
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
    """rows with more tokens than this before the assistant's first are dropped"""
    max_completion_tokens: int = 128
    """tokens from there on: rows are cut after them, evaluation samples at most as many; 1024 suits a real model"""
    trust_remote_code: bool = False
    """run code that comes with the model"""

    # algorithm
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """which tokens are trained: every assistant turn, the last one only, or every token"""
    packing: bool = True
    """lay documents end to end without padding; without it they are padded (same loss, slower)"""
    mixture_cap: int = 3000
    """with several data sets: rows a data set counts for at most in the mixing proportions (FLAN)"""
    mixture_rows: int = 30_000
    """with several data sets: rows of each that are used at all (FLAN)"""
    neftune_alpha: float = 0.0
    """scale of the uniform noise on embeddings, 5 to 15 in the NEFTune paper; 0 is off"""
    from_scratch: bool = False
    """start from random weights of the model's configuration (pre-training)"""

    # optimisation
    steps: int = 0
    """optimizer steps; 0 takes --epochs"""
    epochs: float = 2.0
    """passes over the data"""
    batch_size: int = 32
    """sequences per optimizer step over all processes"""
    microbatch_tokens: int = 4096
    """tokens per forward and backward: a memory knob that does not change the result"""
    learning_rate: float = 5e-4
    """peak; 5e-4 suits the embedded model, 1e-5 to 2e-5 a pretrained one of billions of parameters"""
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
    eval_rows: int = 128
    """held-out rows used"""
    eval_samples: int = 4
    """completions sampled per question in evaluation, where rows have an answer"""
    temperature: float = 1.0
    """of those samples"""
    output_dir: str | None = None
    """default: runs/sft/<date>_<time>"""
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


def sft_loss(logprobs: torch.Tensor, total_tokens: float) -> torch.Tensor:
    """Negative log-likelihood [S] of the scored tokens, summed and divided by those of the whole optimizer step."""
    return -logprobs.sum() / total_tokens  # detail 4


def mixture_weights(sizes: list[int], cap: int) -> list[float]:
    """Probability of each data set: proportional to its size, which counts up to `cap` (FLAN, section 2.1)."""
    capped = [min(size, cap) for size in sizes]
    return [size / sum(capped) for size in capped]


def neftune_noise(document_lengths: torch.Tensor, dim: int, alpha: float) -> torch.Tensor:
    """Noise [N, d] for embeddings: uniform(−1, 1) · α / √(L·d), L the unpadded length of the token's document."""
    scale = alpha / (document_lengths * dim).sqrt()
    return torch.empty(len(scale), dim, device=scale.device).uniform_(-1, 1) * scale[:, None]  # detail 6


# ---------------------------------------------------------------------------------------------- data and reward


COLUMNS = (("messages",), ("prompt", "completion"), ("question", "answer"), ("text",))


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


def row_messages(row: dict) -> tuple[list[dict], list[dict]]:
    """The messages of a row up to its last assistant turn, and that turn."""
    if "messages" in row:
        return row["messages"][:-1], row["messages"][-1:]
    if "prompt" in row and "completion" in row:
        return as_messages(row["prompt"], "user"), as_messages(row["completion"], "assistant")
    return as_messages(row["question"], "user"), as_messages(row["answer"], "assistant")


def render_row(tokenizer, row: dict, loss_on: str) -> Segment:
    """Token ids of a row and which of them are trained."""
    eos = tokenizer.eos_token_id
    if not any(all(c in row for c in group) for group in COLUMNS[:-1]):  # text is what a row is read as last
        ids = encode_text(tokenizer, row["text"]) + [eos]
        return Segment(ids, [True] * len(ids))
    before, after = row_messages(row)
    if not tokenizer.chat_template and "messages" not in row and isinstance(row.get("prompt", ""), str):
        prompt = encode_text(tokenizer, before[0]["content"])
        completion = encode_text(tokenizer, after[0]["content"]) + [eos]
        return Segment(prompt + completion, [loss_on == "all"] * len(prompt) + [True] * len(completion))
    ids, mask = render_chat(tokenizer, before + after, tools=row.get("tools"))  # details 1 and 2
    if loss_on == "all":
        return Segment(ids, [True] * len(ids))
    if loss_on == "completion":
        start = len(render_chat(tokenizer, before, tools=row.get("tools"), generation_prompt=True).ids)
        mask = [m and i >= start for i, m in enumerate(mask)]
    return Segment(ids, mask)


def render_rows(tokenizer, rows: list[dict], source: str, args: Args, context: int) -> list[Segment]:
    """Render all rows; those too long or without a trained token are dropped, cut ones are kept, all are counted."""
    segments = []
    too_long = cut = empty = refused = 0
    limit = min(args.max_prompt_tokens + args.max_completion_tokens, context)
    for row in tqdm(rows, desc=f"tokenising {Path(source).name}", leave=False, disable=len(rows) < 2000):
        try:
            ids, mask, _ = render_row(tokenizer, row, args.loss_on)
        except (TemplateError, ValueError):  # the latter for an empty list of messages
            refused += 1
            continue
        first = mask.index(True) if any(mask) else len(mask)
        if any(mask) and args.loss_on != "all" and first > min(args.max_prompt_tokens, context - 1):
            too_long += 1
            continue
        end = limit if args.loss_on == "all" else min(first + args.max_completion_tokens, context)
        cut += len(ids) > end and any(mask[end:])
        ids, mask = ids[:end], mask[:end]
        if not any(mask[1:]):
            empty += 1
            continue
        segments.append(Segment(ids, mask))
    if refused:
        print(f"{source}: {refused} rows dropped because the chat template refuses their roles or content.")
    if too_long or cut or empty:
        print(
            f"{source}: {too_long} rows dropped because their prompt is longer than --max-prompt-tokens "
            f"{args.max_prompt_tokens} or the model's context of {context}, {empty} dropped because no token of them "
            f"is trained, {cut} cut after --max-completion-tokens {args.max_completion_tokens}; {len(segments)} kept."
        )
    if not segments:
        sys.exit(f"{source}: no row is left to train on (see the line above for what was dropped and why).")
    return segments


def training_order(sizes: list[int], weights: list[float], draws: int, seed: int) -> list[tuple[int, int]]:
    """Which row of which data set each training example is: shuffled passes over every set, mixed by `weights`.

    A longer order begins with the shorter one, so that a resumed run may be given more steps.
    """
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.tensor(weights, dtype=torch.double).cumsum(0)
    chosen = torch.searchsorted(bounds, torch.rand(draws, generator=generator, dtype=torch.double) * bounds[-1])
    order, passes = [], [[] for _ in sizes]
    epochs = [0] * len(sizes)
    for k in chosen.clamp(max=len(sizes) - 1).tolist():
        if not passes[k]:
            shuffle = torch.Generator().manual_seed(seed + 1_000 * (k + 1) + 1_000_000 * epochs[k])
            passes[k] = torch.randperm(sizes[k], generator=shuffle).tolist()
            epochs[k] += 1
        order.append((k, passes[k].pop()))
    return order


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


# ---------------------------------------------------------------------------------------------- main


def main(args: Args) -> dict:
    args = resumed_args(args, "sft")
    check_sft_args(args)
    device, rank, world = start_processes(args.device)
    stop = catch_stop_signals()

    # Data, before any model is loaded.
    sources = [load_rows(name, args.subset, args.split, COLUMNS) for name in args.dataset]
    if args.eval_dataset or args.dataset == Args.dataset:
        held_out_source = args.eval_dataset or str(TINY / "demonstrations_test.jsonl")
        held_out = load_held_out(args, held_out_source, COLUMNS)[: args.eval_rows]
    else:
        held_out_source = f"rows held out of {args.dataset[0]}"
        sources[0], held_out = hold_out(sources[0], args)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    context = context_length(load_config(args.model, args.trust_remote_code))
    if len(sources) > 1:
        sources = [rows[: args.mixture_rows] for rows in sources]
    rendered = [render_rows(tokenizer, rows, name, args, context) for name, rows in zip(args.dataset, sources)]
    held_out_segments = render_rows(tokenizer, held_out, held_out_source, args, context)
    # Questions whose answer can be checked are sampled as well, if a completion fits behind them.
    asked = [row for row in held_out if "messages" not in row and ("prompt" in row or "question" in row)]
    questions = [row for row in asked if isinstance(row.get("answer"), str)]
    room = min(args.max_prompt_tokens, context - args.max_completion_tokens)
    questions = encode_questions(tokenizer, questions, held_out_source, room) if room > 0 else []

    steps = args.steps or max(1, math.ceil(args.epochs * sum(map(len, rendered)) / args.batch_size))
    weights = mixture_weights([len(r) for r in rendered], args.mixture_cap)  # detail 5
    order = training_order([len(r) for r in rendered], weights, steps * args.batch_size, args.seed)

    # Model, optimizer, run folder.
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    model = load_model(args, device, args.from_scratch)
    stops = stop_token_ids(tokenizer, model)
    model = shard(model, world)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
    noise_lengths: list[torch.Tensor] = []  # holds the document lengths of a microbatch while it is trained on
    if args.neftune_alpha:
        if not supports_layout(model):
            sys.exit(f"--neftune-alpha needs packed rows, and models such as --model {args.model} are not packed.")
        add_neftune(model, noise_lengths, args.neftune_alpha)
    run = Run(args, "sft", rank, {"loss/train": "loss", "eval/loss": "held-out loss", "eval/accuracy": "accuracy"})

    def evaluate() -> tuple[dict, list[dict]]:
        loss = evaluate_loss(model, held_out_segments, args, device, rank, world, bfloat16)
        if not questions:
            return {"eval/loss": loss}, []
        sampler = Sampler(model, stops, torch.bfloat16 if bfloat16 else torch.float32)  # its memory is free in between
        scores, samples, _ = evaluate_answers(sampler, tokenizer, questions, args, rank, world)
        return {"eval/loss": loss, **scores}, samples

    first = load_checkpoint(run, model, optimizer, steps) if args.resume else 0
    if not args.resume:
        run.log(0, *evaluate())

    for step in range(first + 1, steps + 1):
        began = time.perf_counter()
        torch.manual_seed(args.seed * 1_000_003 + step * 1009 + rank)  # detail 7
        batch = [rendered[k][i] for k, i in order[(step - 1) * args.batch_size : step * args.batch_size]][rank::world]
        parts = split_by_tokens([s.ids for s in batch], args.microbatch_tokens)
        packed = [pack([batch[i] for i in part]).to(device) for part in parts]  # detail 3
        counts = [sum(len(p.targets) for p in packed), sum(p.ids.numel() for p in packed)]
        total_targets, total_tokens = reduce_over_processes(counts, device)
        rounds = int(reduce_over_processes([len(packed)], device, maximum=True)[0])

        total_loss = 0.0
        for i in range(rounds):
            # A process with fewer microbatches than another repeats its last with weight zero: sharded weights are
            # gathered by all processes together.
            micro, weight = packed[min(i, len(packed) - 1)], float(i < len(packed))
            noise_lengths[:] = [micro.document_lengths]
            # A forward needs each weight once: a cache of their bfloat16 copies would only take memory.
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
                logprobs, _ = token_logprobs(model, micro, packing=args.packing)
            loss = sft_loss(logprobs, total_targets) * weight
            (loss * world).backward()  # gradients are averaged over processes, the loss is a sum over them
            total_loss += loss.item()
        noise_lengths.clear()

        total_loss = require_finite(run, step, total_loss, device)
        rate = learning_rate_at(step, steps, args)
        grad_norm = optimizer_step(model, optimizer, args.max_grad_norm, rate)

        elapsed = time.perf_counter() - began
        metrics, samples = (
            {
                "loss/train": total_loss,
                "optim/grad_norm": grad_norm,
                "optim/learning_rate": rate,
                "throughput/tokens_per_second": total_tokens / elapsed,
                "time/step": elapsed,
                "memory/peak_gb": peak_memory_gb(device),
            },
            [],
        )
        stopping = stop_requested(stop, device)
        if is_due(step, args.eval_every, steps) and (step == steps or not stopping):
            scores, samples = evaluate()
            metrics |= scores
        run.log(step, metrics, samples)
        if is_due(step, args.save_every, steps) or stopping:
            save_checkpoint(run, step, model, optimizer)
        if stopping and step < steps:
            return run.finish(f"python sft.py --resume {run.folder}", stopped=stopping)

    save_model(run, model, tokenizer, stops, bfloat16)
    return run.finish(f"python grpo.py --model {run.folder / 'model'}")


def check_sft_args(args: Args) -> None:
    """Refuse settings that cannot work together, before anything is loaded."""
    if min(args.batch_size, args.microbatch_tokens, args.eval_samples, args.eval_rows) < 1:
        sys.exit("--batch-size, --microbatch-tokens, --eval-samples and --eval-rows must be at least 1.")
    if args.neftune_alpha and not args.packing:
        sys.exit("--neftune-alpha needs packed documents, whose lengths it scales with; leave --packing on.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not args.packing:
        sys.exit("Several processes train packed rows only: leave --packing on, or take one process.")
    if args.batch_size % world:
        sys.exit(f"--batch-size {args.batch_size} cannot be divided among {world} processes; take a multiple of it.")


def add_neftune(model, lengths: list[torch.Tensor], alpha: float) -> None:
    """Add NEFTune's noise to what the embedding layer returns while `lengths` holds a row's document lengths."""

    def add_noise(module, inputs, output):
        return output + neftune_noise(lengths[0], output.shape[-1], alpha).to(output.dtype) if lengths else output

    model.get_input_embeddings().register_forward_hook(add_noise)


@torch.no_grad()
def evaluate_loss(model, segments: list[Segment], args: Args, device, rank: int, world: int, bfloat16: bool) -> float:
    """Mean negative log-likelihood per trained token of the held-out rows, over all processes."""
    mine = segments[rank::world]
    groups = split_by_tokens([s.ids for s in mine], args.microbatch_tokens)
    rounds = int(reduce_over_processes([len(groups)], device, maximum=True)[0])
    nll, count = 0.0, 0
    for i in range(rounds):
        micro = pack([mine[j] for j in groups[i]] if i < len(groups) else segments[:1]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            logprobs, _ = token_logprobs(model, micro, packing=args.packing)
        if i < len(groups):
            nll -= float(logprobs.sum())
            count += len(logprobs)
    nll, count = reduce_over_processes([nll, count], device)
    return nll / max(count, 1)


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
