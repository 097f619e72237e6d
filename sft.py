"""Supervised fine-tuning: imitate demonstrations, the first stage of post-training.

The model learns to produce what the assistant wrote in a conversation, the token that ends each turn included.

    loss = − Σ_t m_t · log π(y_t | y_<t)  /  Σ_t m_t        m_t = 1 on the assistant's tokens, else 0

Signal: what people or a better model wrote. Optimizer: likelihood. Leash: few epochs. Defence: no reward to hack.

    python sft.py                                                  # embedded model and data, a minute on a laptop
    python sft.py --model Qwen/Qwen2.5-0.5B                        # GSM8K on one GPU
    torchrun --nproc-per-node 8 sft.py --model Qwen/Qwen2.5-7B --dataset allenai/tulu-3-sft-mixture
    python sft.py --self-instruct 200     # on rows that it invents; with --revise FILE on answers that it has revised

Normal: `loss/train` falls fast, then slowly; `eval/loss` follows until the demonstrations are known by heart, then
turns up: take fewer epochs. `eval/accuracy`, of held-out rows with an answer, may rise when the loss stands still.
`loss/train` near 0 on fresh data: the mask is wrong. `eval/truncated_fraction` near 1: raise --max-length.

Details that decide whether it works, marked in the code under their numbers:
 1. The mask comes from character spans of the rendered conversation, which is tokenised once, as a whole.
 2. The token that ends a turn is trained, so the model learns to stop.
 3. Documents are packed without padding: positions restart, attention stays inside, a first token is never a target.
 4. The loss is divided by the scored tokens of the whole step: microbatches and processes change nothing.
 5. Several data sets are mixed in proportion to their sizes, none counting for more than a cap (FLAN).
 6. NEFTune's noise shrinks with the length of the token's own document, not of the packed row.
 7. All randomness is a function of seed and step: a resumed run repeats the uninterrupted one bit for bit.

Papers: FLAN arXiv:2109.01652, InstructGPT 2203.02155, NEFTune 2310.05914, Self-Instruct 2212.10560, CAI 2212.08073.
"""

import gc
import json
import math
import os
import shutil
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from common.generation import Sampler, Speaker, evaluate_answers, revise, self_instruct
from common.kl import clip_gradients, context_length, load_model, token_logprobs
from common.tokenizer import (
    TINY,
    Segment,
    encode_conversations,
    encode_questions,
    ensure_chat_template,
    hold_out,
    load_rows,
    load_tokenizer,
    microbatches,
    pack,
    stop_token_ids,
)


@dataclass
class Args:
    # model and data
    model: str = "Qwen/Qwen2.5-0.5B"  # folder or Hub name of a causal language model
    chat_template: str | None = None  # file with a Jinja template; a base model without one gets a plain one
    dataset: tuple[str, ...] = ("openai/gsm8k:main",)  # files, folders or Hub names[:subset[:split]]; several are mixed
    eval_dataset: str | None = "openai/gsm8k:main:test"  # held-out rows; with --dataset alone, at most a tenth of it
    eval_rows: int = 200  # held-out rows used
    eval_samples: int = 4  # completions of each that has an answer, at temperature 1
    max_length: int = 1024  # tokens of a conversation: longer ones are cut

    # algorithm
    loss_on: Literal["assistant", "all"] = "assistant"  # which tokens are trained
    mixture_cap: int = 3000  # several data sets: a larger one is drawn from as if it had this many rows (FLAN)
    mixture_rows: int = 30_000  # several data sets: rows used of each (FLAN)
    self_instruct: int = 0  # invent as many rows like those of --dataset, and train on these (Self-Instruct)
    examples: int = 3  # of --dataset, shown before each invented row; with 0 only the template is (Magpie)
    revise: str | None = None  # file, a principle a line: train on revised answers to --dataset (Constitutional AI)
    neftune_alpha: float = 0.0  # scale of the uniform noise on embeddings, 5 to 15 in the paper; 0 is off

    # optimisation
    steps: int = 0  # optimizer steps; 0 takes --epochs
    epochs: float = 2.0  # passes over the data; a resumed run keeps its number of steps
    batch_size: int = 32  # sequences per optimizer step over all processes
    microbatch_tokens: int = 16384  # tokens per forward and backward: a memory knob, not a change of result
    lora_rank: int = 0  # 0: all weights; else adapters of this rank, by default at ten times the learning rate
    learning_rate: float = 1e-5  # peak
    warmup_steps: int = 10  # steps of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up; the last two reach 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products and saved weights; auto: bfloat16 on CUDA
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    seed: int = 1
    today: str = f"{date.today()}"  # what chat templates print as the date

    # output
    eval_every: int = 100  # steps between evaluations
    save_every: int = 100  # steps between checkpoints
    output_dir: str | None = None  # default: runs/sft/<date>_<time>
    resume: str | None = None  # continue the run in this folder with its arguments, but for those given again
    wandb_project: str | None = None  # also log to Weights & Biases


EMBEDDED = Args(  # what runs where no --model is given: a minute on two cores
    model=f"{TINY}", dataset=(f"{TINY}/demonstrations_train.jsonl",), eval_dataset=f"{TINY}/demonstrations_test.jsonl",
    eval_rows=128, max_length=256, examples=0, microbatch_tokens=4096, learning_rate=5e-4, eval_every=40,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the mathematics


def sft_loss(logprobs: torch.Tensor, targets: float) -> torch.Tensor:
    """Sum of −`logprobs` [S] of scored tokens over `targets`, the number of those in the whole optimizer step."""
    return -logprobs.sum() / targets  # detail 4


def mixture_weights(sizes: list[int], cap: int) -> torch.Tensor:
    """Probability of each data set: proportional to its size, which counts up to `cap` (FLAN, section 2.4)."""
    capped = torch.tensor(sizes, dtype=torch.double).clamp(max=cap)
    return capped / capped.sum()


def training_order(sizes: list[int], weights: torch.Tensor, draws: int, seed: int) -> torch.Tensor:
    """Indices [draws] into the concatenated data sets: each draw picks a set by `weights` [K] and takes the next row
    of its shuffled passes. More draws only extend the order, so a resumed run may be given more steps."""
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    chosen = torch.searchsorted(weights.cumsum(0), uniform).clamp(max=len(sizes) - 1)
    order = torch.empty(draws, dtype=torch.long)
    for k, size in enumerate(sizes):
        places = (chosen == k).nonzero()[:, 0]
        seeds = [seed + 1_000 * (k + 1) + 1_000_000 * epoch for epoch in range(len(places) // size + 1)]
        passes = [torch.randperm(size, generator=torch.Generator().manual_seed(s)).flip(0) for s in seeds]
        order[places] = sum(sizes[:k]) + torch.cat(passes)[: len(places)]
    return order


def neftune_noise(document_lengths: torch.Tensor, dim: int, alpha: float) -> torch.Tensor:
    """Noise [N, d] for embeddings: uniform(−1, 1) · α / √(L·d), L the unpadded length of the token's document."""
    scale = alpha / (document_lengths * dim).sqrt()
    return torch.empty(len(scale), dim, device=scale.device).uniform_(-1, 1) * scale[:, None]  # detail 6


# ------------------------------------------------------------------------------------------------ main


def main(args: Args) -> dict:
    from datasets import concatenate_datasets  # late: --help does not need it

    device, rank, world = start_processes(args.device)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    assert args.batch_size % world == 0, "--batch-size must be a multiple of the processes"
    assert not args.revise or not args.self_instruct, "--self-instruct and --revise both make the rows: take one"
    assert not args.revise or Path(args.revise).is_file(), f"--revise {args.revise}: no file of principles"

    # Conversations as ids and masks, details 1 and 2. Held-out rows with an answer are also questions to sample from.
    tokenizer, length = load_tokenizer(args.model, args.today), min(args.max_length, context_length(args.model))
    ensure_chat_template(tokenizer, args.chat_template)
    encode = partial(encode_conversations, tokenizer, max_length=length, loss_on=args.loss_on)
    shown = {"loss/train": "loss", "eval/loss": "held-out loss", "eval/accuracy": "accuracy"}
    run = Run(args, rank, shown) if args.self_instruct or args.revise else None  # where the rows made are kept
    made = run and run.folder / ("revisions.jsonl" if args.revise else "self_instruct.jsonl")
    if made and not made.exists():
        make, how = (revise, (args.revise,)) if args.revise else (self_instruct, (args.self_instruct, args.examples))
        make(made, args.dataset, Speaker(args.model, tokenizer, device, bfloat16, length // 2, args.seed), *how)
    names = (f"{made}",) if made else args.dataset
    sources = [load_rows(name) for name in names]
    if len(sources) > 1:
        sources = [rows.shuffle(args.seed).select(range(min(len(rows), args.mixture_rows))) for rows in sources]
    train = [encode(rows, name) for rows, name in zip(sources, names)]
    if args.eval_dataset:
        held_out_rows = load_rows(args.eval_dataset, args.eval_rows)
        held_out = encode(held_out_rows, args.eval_dataset)
    else:
        train, held_out = hold_out(train, args.eval_rows, args.seed)
        held_out_rows = sources[0].select(held_out["index"][:])
    questions = encode_questions(tokenizer, held_out_rows, "questions", length // 2, required=False)  # half: samples
    sizes = [len(rows) for rows in train]
    args.steps = args.steps or max(1, math.ceil(args.epochs * sum(sizes) / args.batch_size))
    draws, weights = args.steps * args.batch_size, mixture_weights(sizes, args.mixture_cap)  # detail 5
    order, train = training_order(sizes, weights, draws, args.seed), concatenate_datasets(train)
    if len(sizes) > 1 and rank == 0:
        size, weight, name = min(zip(sizes, weights.tolist(), names))
        print(f"{name}, the smallest set with {size} rows, is seen {weight * draws / size:.2g} times.")

    model = load_model(args.model, device, world, args.gradient_checkpointing, args.lora_rank, bfloat16)
    stops = stop_token_ids(tokenizer, model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
    noise_lengths = []  # of the documents whose embeddings get noise; set before each forward
    run = run or Run(args, rank, shown)

    def add_noise(module, inputs, output):
        if noise_lengths and args.neftune_alpha:
            return output + neftune_noise(noise_lengths[0], output.shape[-1], args.neftune_alpha).to(output.dtype)

    model.get_input_embeddings().register_forward_hook(add_noise)

    def logprobs_of(rows: dict, part: list[int]) -> torch.Tensor:
        packed = pack([Segment(rows["ids"][i], rows["mask"][i]) for i in part]).to(device)  # detail 3
        noise_lengths[:] = [packed.document_lengths] if torch.is_grad_enabled() else []  # no noise in evaluation
        # A forward needs each weight once: a cache of their bfloat16 copies would only take memory.
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            return token_logprobs(model, packed)[0]  # [S], of the tokens that are trained

    @torch.no_grad()
    def evaluate() -> tuple[dict, list[dict]]:
        places, means = list(range(rank, len(held_out), world)), Means()
        mine = held_out[places or [0]]
        for part, weight in microbatches(mine["ids"], None, args.microbatch_tokens, range(len(places))):
            means.add("eval/loss", -logprobs_of(mine, part), weight)
        if not len(questions):
            return means.over_processes(device), []
        sampler = Sampler(model, stops, torch.bfloat16 if bfloat16 else torch.float32)  # freed in between
        sampling = (length - length // 2, args.eval_samples, 1.0, args.seed)
        scores, samples = evaluate_answers(sampler, tokenizer, questions, *sampling, rank, world)
        return means.over_processes(device) | scores, samples

    finished = run.load(model, optimizer) if args.resume else 0  # steps
    if not finished:
        run.log(0, *evaluate())

    for step in range(finished + 1, args.steps + 1):
        began, means = time.perf_counter(), Means()
        torch.manual_seed(args.seed * 1_000_003 + step * 1009 + rank)  # detail 7
        batch = train[order[(step - 1) * args.batch_size : step * args.batch_size][rank::world].tolist()]
        targets = total(sum(sum(mask[1:]) for mask in batch["mask"]), device)
        for part, weight in microbatches(batch["ids"], None, args.microbatch_tokens):  # weight 0: only keeps in step
            logprobs = logprobs_of(batch, part)
            (sft_loss(logprobs, targets) * weight * world).backward()  # gradients are averaged over processes
            means.add("loss/train", -logprobs, weight)
        optimizer.param_groups[0] |= {"lr": learning_rate(step, args), "weight_decay": args.weight_decay}
        means.add("optim/grad_norm", clip_gradients(model, args.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()

        metrics = means.over_processes(device) | {"optim/learning_rate": learning_rate(step, args)}
        tokens, elapsed = total(sum(map(len, batch["ids"])), device), time.perf_counter() - began
        metrics |= {"time/step": elapsed, "throughput/tokens_per_second": tokens / elapsed}
        scores, samples = evaluate() if due(step, args.eval_every, args.steps) else ({}, [])
        run.log(step, metrics | scores, samples)
        if due(step, args.save_every, args.steps):
            run.save(step, model, optimizer)

    return run.finish(model, tokenizer, stops, bfloat16)


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
