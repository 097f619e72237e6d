"""DPO and its relatives: learn from pairs of a better and a worse answer, without a reward model and without sampling.

The policy is its own reward model: β times how far it has raised an answer's log-probability above the reference's is
an implicit reward, fitted so that the better answer gets more.

    Δ = [log π(y_w) − log ref(y_w)] − [log π(y_l) − log ref(y_l)]        y_w chosen, y_l rejected; summed over tokens
    loss = mean over pairs of −log σ(β·Δ)                                and eight others, each a function below

Signal: which answer was preferred. Optimizer: a classification loss. Leash: β, the pull to the reference in that
reward. Defence: pairs say nothing about answers that are not in them, so samples are judged before, during and after;
`--iterations` draws fresh pairs from the policy itself.

    python dpo.py                                                # embedded model and data, a minute on a laptop
    python dpo.py --model Qwen/Qwen2.5-1.5B-Instruct             # UltraFeedback on one GPU
    torchrun --nproc-per-node 8 dpo.py --model Qwen/Qwen2.5-7B-Instruct
    python dpo.py --loss kto --dataset ROWS                      # rows of prompt, completion and label will do
    python dpo.py --iterations 3                                 # rows of question and answer, pairs from samples

Normal: DPO's `loss/train` starts at log 2 = 0.693 and `eval/preference_accuracy` at 0, since policy and reference are
equal and ties are wrong. `preference/margin` grows; both log-probabilities may fall a bit.
Wrong: `eval/chosen_logprob` falls by tens, as probability goes to answers in neither column (--loss rpo holds it).

Details that decide whether it works, marked in the code under their numbers:
 1. Chosen and rejected share their prompt's forward and backward; a prompt that is too long drops the row.
 2. Log-probabilities are summed over the answer's own tokens, its end-of-turn token included.
 3. The reference is the policy before its first update: its numbers are taken once, and no second model is held.
 4. Losses are divided by the pairs of the whole optimizer step: microbatches and processes change nothing.
 5. A tie counts as wrong: an untrained policy has accuracy 0, and no luck is taken for skill.
 6. KTO's baseline comes from real forwards on answers to other prompts, detached, a mean over all processes.
 7. Sums or means per token follow the loss: IPO takes sums; DPO-norm, SimPO and ORPO take means.
 8. ORPO's log(1 − p) is computed so that p near 0 or 1 neither overflows nor loses its digits.
 9. Fresh pairs are the best and the worst sample of a prompt, as the sampler's own ids; ties are dropped.
10. All randomness is a function of seed and step: a resumed run repeats the uninterrupted one bit for bit.

Papers: DPO arXiv:2305.18290, iterative DPO 2312.16682 and 2404.19733; the others stand beside their functions.
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
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from common.generation import Sampler, evaluate_answers, is_correct, sample_answers
from common.kl import RewardModel, answer_logprobs, clip_gradients, context_length, frozen, load_model, score_answers
from common.tokenizer import (
    TINY,
    encode_comparisons,
    ensure_chat_template,
    example_microbatches,
    load_questions,
    load_split,
    load_tokenizer,
    merged,
    pad_rows,
    shuffled_passes,
    stop_token_ids,
    with_mismatches,
)


@dataclass
class Args:
    # model and data
    model: str = "Qwen/Qwen2.5-1.5B-Instruct"  # folder or Hub name of a causal language model; the reference, too
    dataset: str = "trl-lib/ultrafeedback_binarized"  # file, folder or Hub name[:subset[:split]]; chosen and rejected
    eval_dataset: str | None = "trl-lib/ultrafeedback_binarized::test"  # with --dataset alone, at most a tenth of it
    eval_rows: int = 200  # held-out rows used
    eval_samples: int = 1  # completions of each prompt, at --temperature
    max_prompt_tokens: int = 1024  # rows with a longer prompt are dropped
    max_completion_tokens: int = 1024  # longer answers are cut; also the budget of a sample

    # algorithm
    loss: Literal["dpo", "cdpo", "rdpo", "ipo", "dpo_norm", "rpo", "simpo", "orpo", "kto"] = "dpo"  # see the functions
    beta: float | None = None  # strength of the leash, ORPO's λ; default: 0.1; dpo_norm 5, simpo 10
    label_smoothing: float = 0.1  # cdpo, rdpo: the share ε of labels taken to be wrong, below one half
    simpo_gamma: float = 3.0  # simpo: the margin γ itself, not γ/β, which here is 0.3; with --beta 2 take 0.5 to 1
    nll_weight: float = 1.0  # rpo: weight α of the chosen answer's negative log-likelihood per token
    desirable_weight: float = 1.0  # kto: λ_D; λ_D × desirable rows should be 1 to 4/3 of λ_U × undesirable rows
    undesirable_weight: float = 1.0  # kto: λ_U
    iterations: int = 0  # above 0: the prompts fall into as many parts, whose pairs are sampled when their turn comes
    num_samples: int = 2  # completions per prompt, of which the best and the worst make a pair
    temperature: float = 1.0  # of all samples
    reward_model: str | None = None  # output of reward_model.py to rank samples; default: whether they are right
    missing_eos_penalty: float = 1.0  # taken off the reward of a completion that was cut

    # optimisation
    steps: int = 0  # optimizer steps; 0: as many as --epochs asks for
    epochs: float = 1.0  # passes over the data; a resumed run keeps its number of steps
    batch_size: int = 64  # pairs (KTO: rows) per optimizer step over all processes
    microbatch_tokens: int = 16384  # tokens per forward and backward: a memory knob, not a change of result
    lora_rank: int = 0  # 0: all weights; else adapters of this rank, by default at ten times the learning rate
    learning_rate: float = 5e-7  # peak
    warmup_steps: int = 50  # steps of linear warm-up
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
    output_dir: str | None = None  # default: runs/dpo/<date>_<time>
    resume: str | None = None  # continue the run in this folder with its arguments, but for those given again
    wandb_project: str | None = None  # also log to Weights & Biases


EMBEDDED = Args(  # what runs where no --model is given: a minute on two cores
    model=f"{TINY}", dataset=f"{TINY}/preferences_train.jsonl", eval_dataset=f"{TINY}/preferences_test.jsonl",
    eval_rows=192, eval_samples=4, max_prompt_tokens=128, max_completion_tokens=128, batch_size=32,
    microbatch_tokens=4096, learning_rate=2e-4, warmup_steps=5, eval_every=25,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the mathematics
# `logprobs` are log π of chosen and rejected [B, 2], summed over their tokens, `ratio` log π − log ref, `lengths` their
# numbers of tokens; each loss is [B].


def gap(values: torch.Tensor) -> torch.Tensor:  # [B, 2] → [B]
    return values[:, 0] - values[:, 1]


def dpo_loss(logprobs, ratio, lengths, beta: float, args) -> torch.Tensor:
    """−log σ(βΔ). Rafailov et al. 2023, arXiv:2305.18290."""
    return -F.logsigmoid(beta * gap(ratio))


def cdpo_loss(logprobs, ratio, lengths, beta: float, args) -> torch.Tensor:
    """−(1−ε)·log σ(βΔ) − ε·log σ(−βΔ): a share ε of the labels is wrong. Mitchell 2023, ericmitchell.ai/cdpo.pdf."""
    delta, smoothing = gap(ratio), args.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(beta * delta) - smoothing * F.logsigmoid(-beta * delta)


def rdpo_loss(logprobs, ratio, lengths, beta: float, args) -> torch.Tensor:
    """[−(1−ε)·log σ(βΔ) + ε·log σ(−βΔ)] / (1−2ε): unbiased under flipped labels. arXiv:2403.00409."""
    delta, smoothing = beta * gap(ratio), args.label_smoothing
    return (smoothing * F.logsigmoid(-delta) - (1 - smoothing) * F.logsigmoid(delta)) / (1 - 2 * smoothing)


def ipo_loss(logprobs, ratio, lengths, beta: float, args) -> torch.Tensor:
    """(Δ − 1/(2β))²: regress to a finite margin. Azar et al. 2023, arXiv:2310.12036; sums as in its equation 17."""
    return (gap(ratio) - 1 / (2 * beta)) ** 2


def dpo_norm_loss(logprobs, ratio, lengths, beta: float, args) -> torch.Tensor:
    """−log σ(βΔ̄), Δ̄ of log-ratios per token. Tülu 3, arXiv:2411.15124."""
    return -F.logsigmoid(beta * gap(ratio / lengths))  # detail 7


def rpo_loss(logprobs, ratio, lengths, beta: float, args) -> torch.Tensor:
    """−log σ(βΔ) − α·log π(y_w) per token. Pang et al. 2024, arXiv:2404.19733."""
    return -F.logsigmoid(beta * gap(ratio)) - args.nll_weight * (logprobs / lengths)[:, 0]


def simpo_loss(logprobs, ratio, lengths, beta: float, args) -> torch.Tensor:
    """−log σ(β·(log π(y_w) − log π(y_l)) − γ), each per token. Meng et al. 2024, arXiv:2405.14734."""
    return -F.logsigmoid(beta * gap(logprobs / lengths) - args.simpo_gamma)


def orpo_loss(logprobs, ratio, lengths, beta: float, args) -> torch.Tensor:
    """−log p_w − λ·log σ(log odds_w − log odds_l), odds = p/(1−p), log p per token. Hong et al., arXiv:2403.07691."""
    means = logprobs / lengths
    certain = means.clamp(max=-1e-6)
    return -means[:, 0] - beta * F.logsigmoid(gap(certain - log1mexp(certain)))


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 − e^x) for x < 0, by whichever form keeps its digits (Mächler 2012)."""
    near = x > -math.log(2)  # detail 8
    # Each form sees only arguments of its own, or the other's infinite gradient times zero would be a NaN.
    close, far = torch.expm1(x.masked_fill(~near, -0.5)), torch.exp(x.masked_fill(near, -1.0))
    return torch.where(near, torch.log(-close), torch.log1p(-far))


def kto_loss(ratio, desirable, baseline: float, beta: float, args) -> torch.Tensor:
    """λ_D·[1 − σ(β(h − z₀))] where `desirable`, else λ_U·[1 − σ(β(z₀ − h))], h = `ratio`. arXiv:2402.01306."""
    gain = beta * torch.where(desirable, ratio - baseline, baseline - ratio)
    return torch.where(desirable, args.desirable_weight, args.undesirable_weight) * (1 - torch.sigmoid(gain))


PAIR_LOSSES = (dpo_loss, cdpo_loss, rdpo_loss, ipo_loss, dpo_norm_loss, rpo_loss, simpo_loss, orpo_loss)
PAIR_LOSSES = {loss.__name__.removesuffix("_loss"): loss for loss in PAIR_LOSSES}
NEEDS_NO_REFERENCE = ("simpo", "orpo")
BETAS = {"dpo_norm": 5.0, "simpo": 10.0}


def implicit_rewards(loss: str, beta: float, logprobs, ratio, lengths) -> torch.Tensor:
    """The reward that a loss implies for each answer, without gradient; any shape."""
    value = logprobs if loss in NEEDS_NO_REFERENCE else ratio
    return (beta * (value / lengths if loss in ("dpo_norm", *NEEDS_NO_REFERENCE) else value)).detach()


# ------------------------------------------------------------------------------------------------ main


def main(args: Args) -> dict:
    device, rank, world = start_processes(args.device)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    assert args.batch_size % world == 0, "--batch-size must be a multiple of the processes"
    assert args.iterations or not args.reward_model, "--reward-model ranks fresh samples: add --iterations"
    assert not args.iterations or args.num_samples > 1, "--iterations compares samples: --num-samples of at least 2"
    is_kto, pair_loss = args.loss == "kto", PAIR_LOSSES.get(args.loss, dpo_loss)
    beta = BETAS.get(args.loss, 0.1) if args.beta is None else args.beta
    assert args.label_smoothing < 0.5, "--label-smoothing: below one half, or the labels say the opposite"

    # Pairs, or with --iterations questions to sample pairs from. Held-out rows are questions, too.
    tokenizer, budget = load_tokenizer(args.model, args.today), args.max_completion_tokens
    ensure_chat_template(tokenizer)
    longest = min(args.max_prompt_tokens, context_length(args.model) - budget)
    sources, rounds, held_out = (args.dataset, args.eval_dataset, args.eval_rows), max(1, args.iterations), []
    if args.iterations:
        rows, questions = load_questions(tokenizer, *sources, longest, args.seed, needs_answer=not args.reward_model)
        assert len(rows) >= rounds * world, f"--iterations {rounds}: {len(rows)} prompts are too few"
    else:
        encode = partial(encode_comparisons, tokenizer, max_prompt=longest, max_completion=budget, least=2 - is_kto)
        rows, questions = load_split(encode, *sources, args.seed)
        held_out = [row for row in questions if len(row["completions"]) > 1]
        example = with_mismatches(rows, args.seed) if is_kto else rows.__getitem__  # detail 6
    steps_a_round = math.ceil(args.epochs * len(rows) / rounds / args.batch_size)
    args.steps = args.steps or rounds * steps_a_round
    order = shuffled_passes(len(rows), args.steps * args.batch_size, args.seed)

    policy = load_model(args.model, device, world, args.gradient_checkpointing, args.lora_rank, bfloat16)
    stops = stop_token_ids(tokenizer, policy)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
    shown = {"loss/train": "loss", "preference/accuracy": "pair accuracy"}
    run = Run(args, rank, {**shown, "eval/preference_accuracy": "held-out pairs", "eval/accuracy": "accuracy"})
    score_all = partial(score_answers, max_tokens=args.microbatch_tokens, bfloat16=bfloat16)
    new_sampler = partial(Sampler, policy, stops, torch.bfloat16 if bfloat16 else torch.float32)  # for one use each

    # The policy is not yet trained, and no checkpoint is loaded: it is the reference.  # detail 3
    needs_reference, began = args.loss not in NEEDS_NO_REFERENCE, time.perf_counter()
    reference = torch.zeros(len(rows), 3)  # of chosen, rejected; KTO: of another prompt's answer, and of these
    held_out_reference = score_all(policy, held_out.__getitem__, range(needs_reference * len(held_out)))[:, :2]
    if needs_reference and not args.iterations:
        drawn, data = sorted(set(order)), f"{rows._fingerprint}-{args.steps}-{args.batch_size}-{args.seed}"
        path = run.folder / f"reference-{data}.pt"  # changed settings on --resume need other numbers
        reference[drawn] = kept(path, lambda: score_all(policy, example, drawn).cpu(), rank)
    reference, fresh = reference.to(device), {"time/reference": time.perf_counter() - began}

    def evaluate() -> tuple[dict, list[dict]]:
        sampling = (budget, args.eval_samples, args.temperature, args.seed)
        metrics, samples = evaluate_answers(new_sampler(), tokenizer, questions, *sampling, rank, world)
        if held_out:
            logprobs = score_all(policy, held_out.__getitem__, range(len(held_out)))[:, :2]
            lengths = torch.tensor([list(map(len, row["completions"])) for row in held_out], device=device)
            ratio = logprobs - held_out_reference if needs_reference else logprobs
            margins = gap(implicit_rewards(args.loss, beta, logprobs, ratio, lengths))
            metrics["eval/preference_accuracy"] = float((margins > 0).double().mean())  # detail 5
            metrics["eval/preference_margin"] = float(margins.mean())
            metrics["eval/chosen_logprob"] = float(logprobs[:, 0].mean())
            metrics["eval/loss"] = float(pair_loss(logprobs, ratio, lengths, beta, args).mean())  # KTO: DPO's loss
        return metrics, samples

    finished = run.load(policy, optimizer) if args.resume else 0  # steps
    if not finished:
        run.log(0, *evaluate())

    for step in range(finished + 1, args.steps + 1):
        began, means, place = time.perf_counter(), Means(), step - 1
        if args.iterations:
            iteration, place = divmod(step - 1, steps_a_round)
        if args.iterations and (place == 0 or step == finished + 1):
            asked, seed = rows.select(range(iteration % rounds, len(rows), rounds)), args.seed * 1_000_003 + iteration
            sampling = (tokenizer, asked, args, seed, device, bfloat16, rank, world)  # detail 10
            path = run.folder / f"pairs-{iteration:04d}.pt"
            pairs, fresh = kept(path, lambda s=sampling: sample_pairs(new_sampler(), *s), rank)
            fresh = {} if place else fresh  # else logged before the kill
            assert pairs, f"iteration {iteration}: all samples of a prompt have equal rewards, so no pair can be made"
            example = with_mismatches(pairs, seed) if is_kto else pairs.__getitem__
            order = shuffled_passes(len(pairs), steps_a_round * args.batch_size, args.seed + iteration)
            if needs_reference:
                reference = score_all(frozen(policy, device, world), example, range(len(pairs)))
                gc.collect()  # a sharded model holds cycles, which would keep it in memory

        drawn = order[place * args.batch_size : (place + 1) * args.batch_size]
        mine = drawn[rank::world]
        batch, ref_logprobs = [example(i) for i in mine], reference[mine]  # [B, 3]
        parts, answers = example_microbatches(batch, args.microbatch_tokens), args.batch_size
        if is_kto:  # detail 6
            answers = total(sum(len(one["labels"]) for one in batch), device)
            drift = score_all(policy, example, drawn, which=slice(1))[:, 0] - reference[drawn, 0]
            baseline = max(0.0, float(drift.mean()))
            means.add("preference/baseline", baseline)
        for part, weight in parts:  # weight: 0 where a process only keeps step with the others, else 1
            some = [batch[i] for i in part]
            logprobs, lengths = answer_logprobs(policy, some, slice(is_kto, None), bfloat16)  # [b, K], details 1 and 2
            ratio = logprobs - ref_logprobs[part][:, is_kto : is_kto + logprobs.shape[1]]
            rewards = implicit_rewards(args.loss, beta, logprobs, ratio, lengths)
            labels = pad_rows([torch.tensor(one["labels"], device=device) for one in some])
            real = (lengths > 0) * weight
            if is_kto:
                losses, counted = kto_loss(ratio, labels, baseline, beta, args), real
                right = torch.where(labels, ratio > baseline, ratio < baseline)
            else:
                losses, counted = pair_loss(logprobs, ratio, lengths, beta, args), weight
                right = gap(rewards) > 0
            loss = (losses * counted).sum() / answers  # detail 4
            (loss * world).backward()  # gradients are averaged over processes, the loss is a sum over them
            means.add("loss/train", losses, counted)
            means.add("preference/accuracy", right, counted)
            for side, is_it in (("chosen", labels), ("rejected", ~labels)):
                means.add(f"preference/{side}_reward", rewards, is_it * real)
                means.add(f"preference/{side}_logprob", logprobs, is_it * real)
        rate = learning_rate(step, args)
        optimizer.param_groups[0] |= {"lr": rate, "weight_decay": args.weight_decay}
        means.add("optim/grad_norm", clip_gradients(policy, args.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()

        # Log, evaluate, save.
        metrics, samples, fresh = means.over_processes(device) | fresh, [], {}
        metrics["preference/margin"] = metrics["preference/chosen_reward"] - metrics["preference/rejected_reward"]
        metrics |= {"optim/learning_rate": rate, "time/step": time.perf_counter() - began}
        if due(step, args.eval_every, args.steps):
            scores, samples = evaluate()
            metrics |= scores
        run.log(step, metrics, samples)
        if due(step, args.save_every, args.steps):
            run.save(step, policy, optimizer)

    return run.finish(policy, tokenizer, stops, bfloat16)


def sample_pairs(sampler, tokenizer, prompts, args: Args, seed: int, device, bfloat16: bool, rank: int, world: int):
    """The best and the worst of `args.num_samples` completions of each prompt by the current policy, as rows like those
    of `encode_comparisons`, and metrics. The processes share the prompts, and get all rows."""
    score = RewardModel(args.reward_model, device, bfloat16, args.microbatch_tokens) if args.reward_model else None
    sampling, pairs, means = (args.max_completion_tokens, args.num_samples, args.temperature, seed), {}, Means()
    for place, (prompt, group, texts) in sample_answers(sampler, tokenizer, prompts, sampling, rank, world).items():
        row, penalties = prompt["row"], [args.missing_eos_penalty * (not completion.stopped) for completion in group]
        rewards = score(row, texts) if score else [is_correct(text, row["answer"]) for text in texts]
        rewards = torch.as_tensor(rewards) * 1.0 - torch.tensor(penalties)
        means.add("reward/mean", rewards)
        best, worst = int(rewards.argmax()), int(rewards.argmin())
        if rewards[best] > rewards[worst]:  # detail 9
            pair = {"ids": prompt["ids"], "completions": [group[best].ids, group[worst].ids]}
            pairs[place] = {**pair, "labels": [True, False], "key": prompt["key"]}
    metrics = means.over_processes(device)
    return (pairs := merged(pairs)), metrics | {"preference/pairs": len(pairs)}


def kept(path: Path, make, rank: int):
    """The result of `make()`, read from `path` if a run that was stopped has left it there."""
    if path.exists():
        return torch.load(path)
    value = make()
    if rank == 0:
        torch.save(value, path.with_suffix(".writing"))
        path.with_suffix(".writing").rename(path)
    return value


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
