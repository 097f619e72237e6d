"""Reward models: learn a score from comparisons, the signal that PPO, GRPO, best-of-n and iterative DPO optimise.

People, a judge or a verifier say which of several answers is better; a language model with a scalar head learns a
score r(x, y) that orders answers as they did.

    outcome   loss = mean_pairs[ −p·log σ(Δ) − (1−p)·log σ(−Δ) + c·(r_better + r_worse)² ],  Δ = r_better − r_worse − m
    process   loss = − mean_steps[ l·log σ(s) + (1−l)·log σ(−s) ],   steps up to and including the first wrong one

p is 1 or the probability that the better one is better, m a margin; the mean is over the pairs of a prompt first.
Signal: comparisons, or labels of single steps. Optimizer: likelihood. Leash: few epochs, and normalised scores; with
--normalisation scale a policy's KL weight keeps its meaning. Defence: an ensemble, and a report of what it follows.

    python reward_model.py                                           # embedded model and data, a minute on a laptop
    python reward_model.py --model Qwen/Qwen2.5-1.5B-Instruct        # UltraFeedback on one GPU
    torchrun --nproc-per-node 8 reward_model.py --model Qwen/Qwen2.5-7B-Instruct --learning-rate 3e-6
    python reward_model.py --judge MODEL --principles FILE           # its pairs, or two samples a prompt, are labelled
    python reward_model.py --kind process --dataset common/tiny/steps_train.jsonl            # scores single steps

Normal: `loss/train` starts near log 2 = 0.693. `eval/accuracy` on held-out pairs is what counts: 0.65 to 0.75 on human
preferences, which disagree among themselves, near 1 where a rule decides.
Wrong: `eval/length_correlation` near 1; `eval/loss` and `eval/calibration_error` rise while `eval/accuracy` does not.

model/ is a sequence classifier with one label, model/member_k the rest of an ensemble. The normalised score is (logit −
reward_mean) / reward_std of its config; with `reward_kind` process, sigmoid(logit) is a step's probability.

Details that decide whether it works, marked in the code under their numbers:
 1. A score is read at the conversation's last token, found from lengths; neither padding nor neighbours change it.
 2. A new head is drawn from a normal distribution with std 1/√(d+1), and every head runs in float32.
 3. The completions of a prompt share its forward, and each is forwarded once, however many pairs it stands in.
 4. Each pair of K completions counts 1/C(K,2); losses are divided by the prompts, or solution steps, of a whole batch.
 5. Scores are normalised on reference completions; loss and calibration use the raw ones, as training does.
 6. Members of an ensemble differ in a new head and in data order, and are normalised before they are joined.
 7. A step's target stands at its last token; after the first wrong step there are none.
 8. A judge sees every pair in both orders; what counts is its probability of A against B after a prefilled reply.
 9. All randomness is a function of seed and step: a resumed run repeats the uninterrupted one bit for bit.

Papers: InstructGPT arXiv:2203.02155, Llama 2 2307.09288, ensembles 2310.02743, process 2305.20050, RLAIF 2309.00267.
"""

import gc
import json
import math
import os
import shutil
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from common.generation import Sampler, sample_answers
from common.kl import (
    aggregate_scores,
    clip_gradients,
    context_length,
    load_model,
    load_scalar_model,
    option_probabilities,
    save_model,
    shard,
    token_scores,
)
from common.tokenizer import (
    TINY,
    encode_comparisons,
    encode_questions,
    ensure_chat_template,
    example_microbatches,
    load_rows,
    load_split,
    load_tokenizer,
    merged,
    opening_text,
    pack_scored,
    read_answers,
    read_lines,
    read_row,
    shuffled_passes,
    stop_token_ids,
    tell,
)


@dataclass
class Args:
    # model and data
    model: str = "Qwen/Qwen2.5-1.5B-Instruct"  # folder or Hub name: a language model, or a reward model to go on from
    dataset: str = "trl-lib/ultrafeedback_binarized"  # file, folder or Hub name[:subset[:split]]; chosen and rejected
    eval_dataset: str | None = "trl-lib/ultrafeedback_binarized::test"  # with --dataset alone, at most a tenth of it
    reference_dataset: str | None = None  # demonstrations to normalise on; default: the better held-out answers
    eval_rows: int = 200  # held-out rows used, and demonstrations
    max_prompt_tokens: int = 1024  # rows with a longer prompt are dropped
    max_completion_tokens: int = 1024  # rows with a longer answer are dropped; budget of a sample for the judge

    # algorithm
    kind: Literal["outcome", "process"] = "outcome"  # score whole answers from comparisons, or each step from labels
    centering: float = 0.01  # weight c of (r_better + r_worse)², which keeps scores around zero; arXiv:2312.09244
    normalisation: Literal["none", "shift", "scale"] = "shift"  # to mean 0, or to mean 0 and standard deviation 1
    ensemble_size: int = 1  # members, each with its own head and data order; 4 or 5 in arXiv:2310.02743
    ensemble_score: Literal["mean", "min", "uwo"] = "mean"  # how evaluation joins them; uwo: mean − variance / 2
    step_separator: str = "\n"  # process: text behind every step
    judge: str | None = None  # language model that labels --dataset: its pairs, or two samples of --model a prompt
    principles: str | None = None  # file with one principle a line; the judge is shown one for each pair, in turn

    # optimisation
    steps: int = 0  # optimizer steps; 0 takes --epochs
    epochs: float = 1.0  # passes over the data; a resumed run keeps its number of steps
    batch_size: int = 64  # prompts per optimizer step over all processes
    microbatch_tokens: int = 16384  # tokens per forward and backward: a memory knob, not a change of result
    lora_rank: int = 0  # 0: all weights; else adapters of this rank, by default at ten times the learning rate
    learning_rate: float = 5e-6  # peak
    warmup_steps: int = 30  # steps of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up; the last two reach 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products and saved weights; auto: bfloat16 on CUDA
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    seed: int = 1
    today: str = f"{date.today()}"  # what chat templates print as the date

    # output
    eval_every: int = 200  # steps between evaluations
    save_every: int = 200  # steps between checkpoints
    output_dir: str | None = None  # default: runs/reward_model/<date>_<time>
    resume: str | None = None  # continue the run in this folder with its arguments, but for those given again
    wandb_project: str | None = None  # also log to Weights & Biases


EMBEDDED = Args(  # what runs where no --model is given: a minute on two cores
    model=f"{TINY}", dataset=f"{TINY}/preferences_train.jsonl", eval_dataset=f"{TINY}/preferences_test.jsonl",
    reference_dataset=f"{TINY}/demonstrations_test.jsonl", eval_rows=192, max_prompt_tokens=128,
    max_completion_tokens=128, step_separator=",", epochs=3, batch_size=32, microbatch_tokens=4096, learning_rate=1e-3,
    warmup_steps=10, eval_every=40,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the mathematics


def preference_loss(better: torch.Tensor, worse: torch.Tensor, margin=0.0, probability=1.0, centering: float = 0.0):
    """Bradley-Terry: cross-entropy of each pair. Scores better, worse [P]; margin, probability [P] or numbers."""
    difference = better - worse - margin
    loss = -probability * F.logsigmoid(difference) - (1 - probability) * F.logsigmoid(-difference)
    return loss + centering * (better + worse).square()


def ranked_pairs(sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """All pairs of the sizes[i] completions of prompt i, best first, end to end: indices [P] of the better and
    worse ones, the prompt [P], and the weight [P] = 1/C(K,2)."""
    pairs = [torch.triu_indices(size, size, 1) for size in sizes]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    better, worse = torch.cat([pair + start for pair, start in zip(pairs, starts)], dim=1)
    counts = torch.tensor([pair.shape[1] for pair in pairs])
    owner = torch.arange(len(sizes)).repeat_interleave(counts)
    return better, worse, owner, 1 / counts[owner]  # detail 4


def supervised_steps(labels: list[bool]) -> int:
    """How many steps have a target: those up to and including the first wrong one."""
    return labels.index(False) + 1 if False in labels else len(labels)  # detail 7


def normalisation_constants(scores: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [N, 1] that reference scores [N, R] of each member are to be normalised by."""
    mean, std = scores.mean(1, keepdim=True), scores.std(1, correction=0, keepdim=True).clamp(min=1e-6)
    return mean * (how != "none"), std if how == "scale" else torch.ones_like(std)


def calibration_error(confidence: torch.Tensor, right: torch.Tensor, bins: int = 10) -> float:
    """Expected calibration error: |mean confidence − share right| in equal bins over [½, 1], weighted by their size."""
    which = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins).index_add(0, which, confidence - right.float())
    return float(gaps.abs().sum() / len(confidence))


# ------------------------------------------------------------------------------------------------ main


def main(args: Args) -> dict:
    device, rank, world = start_processes(args.device)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    is_process = args.kind == "process"
    assert args.batch_size % world == 0, "--batch-size must be a multiple of the processes"
    assert not (args.judge and is_process), "--judge compares whole answers: --kind outcome only"
    assert args.judge or not args.principles, "--principles are shown to a judge: add --judge"
    assert not args.principles or Path(args.principles).is_file(), f"--principles {args.principles}: no such file"
    shown = {"loss/train": "loss", "eval/accuracy": "accuracy", "eval/margin": "margin"}
    run = Run(args, rank, shown) if args.judge else None  # whose labels are kept in its folder

    # Comparisons, or solutions in steps, as ids.
    tokenizer, source = load_tokenizer(args.model, args.today), args.dataset
    ensure_chat_template(tokenizer)
    longest = min(args.max_prompt_tokens, context_length(args.model) - args.max_completion_tokens)
    if args.judge and not (source := run.folder / "labelled.jsonl").exists():
        label_pairs(source, args, tokenizer, longest, device, bfloat16, rank, world)
    encode = partial(encode_comparisons, tokenizer, max_prompt=longest, max_completion=args.max_completion_tokens)
    encode_rows = partial(encode, whole=True, separator=args.step_separator if is_process else None)
    train, held_out = load_split(encode_rows, f"{source}", args.eval_dataset, args.eval_rows, args.seed)
    held_out = list(held_out)
    references = [{**row, "completions": row["completions"][:1], "ends": row["ends"][:1]} for row in held_out]
    if args.reference_dataset and not is_process:
        rows = load_rows(args.reference_dataset, args.eval_rows)
        references = list(encode(rows=rows, source=args.reference_dataset, least=1, whole=True))
    args.steps = args.steps or max(1, math.ceil(args.epochs * len(train) / args.batch_size))

    members, orders = torch.nn.ModuleList(), []  # detail 6
    for k in range(args.ensemble_size):
        seed = args.seed * 1_000_003 + k  # detail 9
        how = (args.gradient_checkpointing, args.lora_rank, bfloat16)
        member = load_scalar_model(args.model, device, *how, head_seed=seed)  # detail 2
        members.append(shard(member, world))
        orders.append(shuffled_passes(len(train), args.steps * args.batch_size, seed))
    optimizer = torch.optim.AdamW(members.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
    run = run or Run(args, rank, shown)

    def scores_of(model, examples: list[dict]) -> torch.Tensor:
        packed, places = pack_scored(examples)  # details 1 and 3
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            return token_scores(model, packed.to(device), places.to(device))  # [S], of all completions or steps

    @torch.no_grad()
    def score_all(examples: list[dict]) -> list[torch.Tensor]:
        """Scores [N, s] of each example's completions or steps by the N members; the processes share the work."""
        mine, found = list(range(rank, len(examples), world)), {}
        batch = [examples[i] for i in mine or [0]]
        for part, weight in example_microbatches(batch, args.microbatch_tokens, len(mine)):
            some = [batch[i] for i in part]
            scores = torch.stack([scores_of(model, some) for model in members]).cpu()  # [N, S]
            if weight:
                found |= zip([mine[i] for i in part], scores.split([sum(map(len, one["ends"])) for one in some], 1))
        return merged(found)

    def constants() -> tuple[torch.Tensor, torch.Tensor]:
        how = "none" if is_process else args.normalisation  # detail 5
        return normalisation_constants(torch.cat(score_all(references), 1), how)

    def evaluate() -> tuple[dict, list[dict]]:
        (mean, std), raw, samples = constants(), score_all(held_out), []
        joined = [aggregate_scores((scores - mean) / std, args.ensemble_score) for scores in raw]  # detail 6
        metrics = report(raw, joined, held_out, is_process, device)
        for i, (row, scores) in enumerate(zip(held_out[:20], joined)):
            k = i % len(row["completions"])
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (row["ids"], row["completions"][k])]
            score = scores.sigmoid().prod() if is_process else scores[k]  # a solution's: the product of its steps'
            samples.append({"prompt": texts[0], "completion": texts[1], "reward": float(score)})
        return metrics, samples

    finished = run.load(members, optimizer) if args.resume else 0  # steps
    if not finished:
        run.log(0, *evaluate())

    for step in range(finished + 1, args.steps + 1):
        began, means = time.perf_counter(), Means()
        for model, order in zip(members, orders):
            batch = [train[i] for i in order[(step - 1) * args.batch_size : step * args.batch_size][rank::world]]
            targets = total(sum(supervised_steps(one["labels"]) for one in batch) if is_process else len(batch), device)
            for part, weight in example_microbatches(batch, args.microbatch_tokens):
                some = [batch[i] for i in part]
                losses, weights, margins = losses_of(scores_of(model, some), some, is_process, args.centering)
                weights = weights * weight  # 0 where a process only keeps step with the others, else 1
                loss = (losses * weights).sum() / targets  # detail 4
                (loss * world).backward()  # gradients are averaged over processes, the loss is a sum over them
                means.add("loss/train", losses, weights)
                means.add("preference/accuracy", margins > 0, weights)
                means.add("preference/margin", margins, weights)
            means.add("optim/grad_norm", clip_gradients(model, args.max_grad_norm))
        rate = learning_rate(step, args)
        optimizer.param_groups[0] |= {"lr": rate, "weight_decay": args.weight_decay}
        optimizer.step()
        optimizer.zero_grad()

        # Log, evaluate, save.
        metrics, samples = means.over_processes(device), []
        metrics |= {"optim/learning_rate": rate, "time/step": time.perf_counter() - began}
        if due(step, args.eval_every, args.steps):
            scores, samples = evaluate()
            metrics |= scores
        run.log(step, metrics, samples)
        if due(step, args.save_every, args.steps):
            run.save(step, members, optimizer)

    for k, (model, mean, std) in enumerate(zip(members, *constants())):
        config, pad = model.config, tokenizer.pad_token_id
        config.reward_kind, config.reward_members = args.kind, len(members)
        config.reward_mean, config.reward_std, config.reward_separator = float(mean), float(std), args.step_separator
        # transformers reads the last token that is not the pad token. Where pad ends conversations, none is named.
        config.get_text_config().pad_token_id = None if held_out[0]["completions"][0][-1] == pad else pad
        if k:
            save_model(model, run.folder / "model.writing" / f"member_{k}", bfloat16)
    return run.finish(members[0], tokenizer, [], bfloat16)


def losses_of(scores: torch.Tensor, examples: list[dict], is_process: bool, centering: float = 0.0):
    """Losses, weights and margins of all pairs of completions or all steps; margins above 0 are right. scores [S]."""
    if is_process:
        labels = torch.tensor([label for one in examples for label in one["labels"]], device=scores.device)
        weights = [k < supervised_steps(one["labels"]) for one in examples for k in range(len(one["labels"]))]
        margins = torch.where(labels, scores, -scores)
        return -F.logsigmoid(margins), torch.tensor(weights).to(scores), margins
    better, worse, owner, weights = (x.to(scores.device) for x in ranked_pairs([len(one["ends"]) for one in examples]))
    margin, probability = (torch.tensor([one[name] for one in examples])[owner] for name in ("margin", "probability"))
    losses = preference_loss(scores[better], scores[worse], margin.to(scores), probability.to(scores), centering)
    return losses, weights, scores[better] - scores[worse]


def report(raw: list[torch.Tensor], joined: list[torch.Tensor], examples: list[dict], is_process: bool, device) -> dict:
    """Metrics of held-out examples, from `raw` scores [N, s] of N members, and from `joined`, normalised ones [s]."""
    means, flat = Means(), torch.cat(joined)
    for scores in torch.cat(raw, 1):  # detail 5
        losses, weights, margins = losses_of(scores, examples, is_process)
        means.add("eval/loss", losses, weights)
        margins = margins[weights > 0]
        means.add("eval/calibration_error", calibration_error(margins.abs().sigmoid(), margins > 0))
    _, weights, margins = losses_of(flat, examples, is_process)
    means.add("eval/accuracy", margins > 0, weights)  # a tie is wrong
    means.add("eval/margin", margins, weights)
    if is_process:
        for own, one in zip(((scores > 0).tolist() for scores in joined), examples):
            is_found = all(own) == all(one["labels"]) and supervised_steps(own) == supervised_steps(one["labels"])
            means.add("eval/first_error_accuracy", is_found)
    else:
        lengths = torch.tensor([float(len(ids)) for one in examples for ids in one["completions"]])
        means.add("eval/length_correlation", torch.corrcoef(torch.stack([flat, lengths]))[0, 1].nan_to_num())
    return means.over_processes(device)


QUESTION = (
    "Which answer to this conversation is better: more helpful, honest and harmless? {principle}\n\n{conversation}\n\n"
    "Answer A: {first}\n\nAnswer B: {second}\n\nReply with A or B."
)


def label_pairs(path: Path, args: Args, tokenizer, longest: int, device, bfloat16: bool, rank: int, world: int) -> None:
    """Write to `path` the pairs of --dataset, or two samples of --model for each of its prompts, with the judge's soft
    labels. The processes share the work; rows that cannot be read or asked are dropped and counted."""
    rows, pairs = load_rows(args.dataset), {}
    for i in range(rank, len(rows), world):
        with suppress(Exception):  # whatever a row may be; counted below
            pairs[i] = ((row := read_row(rows[i])) | {"margin": float(row.get("margin", 0))}, read_answers(row))
    if not total(len(pairs), device):  # prompts alone
        questions = encode_questions(tokenizer, rows, args.dataset, longest, needs_answer=False)
        model = load_model(args.model, device)
        sampler = Sampler(model, stop_token_ids(tokenizer, model), torch.bfloat16 if bfloat16 else torch.float32)
        sampling = (args.max_completion_tokens, 2, 1.0, args.seed)
        for i, (question, _, texts) in sample_answers(sampler, tokenizer, questions, sampling, rank, world).items():
            row = {**question["row"], "chosen": texts[0], "rejected": texts[1], "margin": 0.0}
            with suppress(ValueError):  # an empty sample
                pairs[i] = (row, read_answers(row))
    judge = load_model(args.judge, device, flag="--judge")
    judge_tokenizer = load_tokenizer(args.judge, args.today, "--judge")
    ensure_chat_template(judge_tokenizer)
    principles, asked = read_lines(args.principles, "--principles") if args.principles else [""], []
    for i, (_, answers) in pairs.items():
        said = [answer[-1].get("content") or "" for answer in answers]
        turns = "\n".join(f"{m['role'].capitalize()}: {m.get('content') or ''}" for m in answers[0][:-1])
        about = {"principle": principles[i % len(principles)], "conversation": turns}
        for first, second in ((said[0], said[-1]), (said[-1], said[0])):  # detail 8
            texts = (QUESTION.format(**about, first=first, second=second), "The better answer is Answer")
            chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]
            asked.append(opening_text(judge_tokenizer, chat)[0])
    limits = (context_length(args.judge), args.microbatch_tokens, bfloat16)
    readings = option_probabilities(judge, judge_tokenizer, asked, [" A", " B"], *limits)[:, 0].view(-1, 2).tolist()
    judged = {i: (*pairs[i], *reading) for i, reading in zip(pairs, readings) if math.isfinite(sum(reading))}
    lines, flips = [], 0
    for row, answers, first, swapped in merged(judged):
        probability = (first + 1 - swapped) / 2  # that the first answer is better
        chosen, rejected = (answers[0], answers[-1]) if probability >= 0.5 else (answers[-1], answers[0])
        row |= {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
        row["margin"] *= 1 if probability >= 0.5 else -1
        lines.append(json.dumps(row | {"chosen_probability": max(probability, 1 - probability)}, default=str) + "\n")
        flips += (first > 0.5) == (swapped > 0.5)
    tell(f"The judge labelled {len(lines)} of {len(rows)} rows; its choice flips with the order of the answers in "
         f"{flips / max(1, len(lines)):.0%}.")  # fmt: skip
    if rank == 0:
        path.with_suffix(".writing").write_text("".join(lines))
        path.with_suffix(".writing").rename(path)
    if world > 1:
        dist.barrier()


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
