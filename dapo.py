"""DAPO (arXiv:2503.14476): grpo.py, which to read first, without a KL and with five changes for long reasoning.

    keep a prompt only if 0 < #right < G, and sample until the batch is full                      (dynamic sampling)
    r_i = ±1 + overlong_i,  overlong = clip((L_max − L_cache − |y_i|) / L_cache, −1, 0)    (soft overlong punishment)
    A_i = (r_i − mean(r)) / std(r)
    loss = −Σ_i Σ_t m_it · min(ρ_it·A_i, clip(ρ_it, 1−ε_low, 1+ε_high)·A_i) / Σ_i Σ_t m_it      (token-level loss)
    ε_low = 0.2 < ε_high = 0.28  (clip-higher);   m_it = 0 where an answer was cut              (overlong filtering)

Signal: whether the final answer is right, +1 or −1, even of a cut completion. Optimizer: a clipped policy gradient,
several updates a rollout. Leash: only the clip. Defence: the reward is the truth itself, and overlong answers cost.

    python dapo.py                                           # embedded model and data, one minute on a laptop
    python dapo.py --model Qwen/Qwen2.5-0.5B-Instruct        # GSM8K on one GPU
    torchrun --nproc-per-node 8 dapo.py --model Qwen/Qwen2.5-7B --dataset BytedTsinghua-SIA/DAPO-Math-17k
    python dapo.py --clip-high 0.2 --no-dynamic-sampling --aggregation sequence --overlong-cache 0      # none of them

Normal: `eval/accuracy` and `reward/mean` rise. `prompts/rounds` says what dynamic sampling costs; it grows as more
groups are all right, until a batch can no longer be filled: then the run ends with a sentence and its model.
`policy/clip_fraction` is above 0, since a rollout brings several updates. `reward/overlong` near 0: answers fit.

Details 1 to 8 are those of grpo.py, and these are marked in the code under their numbers, too:
 9. Change 1, clip-higher: the upper bound of the ratio is wider than the lower, so a rare token can become frequent.
10. Change 2, dynamic sampling: groups are kept by accuracy, since lengths make rewards differ where all are right.
11. Change 3, token-level loss: every token of the optimizer step counts the same (the paper's formula: of a group).
12. Change 4, overlong filtering (off: 5 overlaps with it): a cut completion counts in the baseline, not in the loss.
13. Change 5, soft overlong punishment: over the last L_cache tokens of the budget the reward falls by up to 1.
14. Rewards, groups and lengths are logged of everything generated: no kept group is all right or all wrong.
15. The position in the data is read back from the log, so a resumed run continues there.
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

from common.generation import Sampler, evaluate_answers, is_correct
from common.kl import clip_gradients, completion_logprobs, context_length, load_model
from common.tokenizer import TINY, load_questions, load_tokenizer, microbatches, pad_rows, shuffled_pass, stop_token_ids


@dataclass
class Args:
    # model and data
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"  # folder or Hub name of a causal language model
    dataset: str = "openai/gsm8k:main"  # file, folder or Hub name[:subset[:split]]; rows hold question and answer
    eval_dataset: str | None = "openai/gsm8k:main:test"  # held-out rows; with --dataset alone, at most a tenth of it
    eval_rows: int = 200  # held-out questions used
    eval_samples: int = 4  # completions of each, at --temperature
    max_prompt_tokens: int = 512  # rows with a longer prompt are dropped
    max_completion_tokens: int = 1024  # budget of a completion (L_max)

    # the five changes to grpo.py
    clip_high: float = 0.28  # 1, clip-higher: ratios are clipped above 1 + clip_high, detail 9
    dynamic_sampling: bool = True  # 2: sample until the batch is full of groups with right and wrong answers
    aggregation: Literal["sequence", "token", "constant"] = "token"  # 3, token-level loss; GRPO, DAPO, Dr. GRPO
    overlong_filtering: bool = False  # 4: completions that were cut do not enter the loss
    overlong_cache: int | None = None  # 5, soft overlong punishment: L_cache (default: a fifth of the budget; 0: none)
    generation_batch_size: int = 192  # prompts sampled per round; three times the batch in the authors' script
    max_rounds: int = 10  # rounds after which a batch that is not full ends the run

    # algorithm
    num_samples: int = 16  # completions per prompt (G)
    temperature: float = 1.0  # of sampling, and of every log-probability in training
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"  # (r − mean) / std; r − mean; r − mean of the others
    surrogate: Literal["ppo", "gspo", "cispo"] = "ppo"  # ratios of tokens; of completions (clip 3e-4, 4e-4); detached
    clip_low: float = 0.2  # ratios are clipped below 1 − clip_low
    importance_cap: float = 2.0  # of the weight π_old/μ, which corrects for the sampler's rounding (μ); 0: no weight
    update_epochs: int = 1  # passes over each rollout
    minibatches: int = 4  # optimizer steps per pass, 16 in the paper; clipping acts only if one of the two is above 1

    # optimisation
    steps: int = 200  # rollouts
    batch_size: int = 64  # prompts per rollout that are trained on, over all processes
    microbatch_tokens: int = 16384  # tokens per forward and backward: a memory knob, not a change of result
    sampler_memory_gb: float | None = None  # bound on its keys and values; None: 4 on a CPU, a fifth of a GPU's
    lora_rank: int = 0  # 0: all weights; else adapters of this rank, by default at ten times the learning rate
    learning_rate: float = 1e-6  # peak
    warmup_steps: int = 10  # rollouts of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up; the last two reach 0
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products and saved weights; auto: bfloat16 on CUDA
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    seed: int = 1
    today: str = f"{date.today()}"  # what chat templates print as the date

    # output
    eval_every: int = 20  # steps between evaluations
    save_every: int = 20  # steps between checkpoints
    output_dir: str | None = None  # default: runs/dapo/<date>_<time>
    resume: str | None = None  # continue the run in this folder with its arguments, but for those given again
    wandb_project: str | None = None  # also log to Weights & Biases


EMBEDDED = Args(  # what runs where no --model is given: a minute on two cores
    model=f"{TINY}", dataset=f"{TINY}/maths_train.jsonl", eval_dataset=f"{TINY}/maths_test.jsonl", eval_rows=192,
    max_completion_tokens=64, num_samples=8, steps=20, batch_size=16, generation_batch_size=32, microbatch_tokens=4096,
    learning_rate=2e-4, warmup_steps=2, eval_every=5,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the reward: edit here


def reward(text: str, row: dict) -> float:
    """1 if the final answer of `text`, cut or not, is one of `row["answer"]`, else −1."""
    return 1.0 if is_correct(text, row["answer"]) else -1.0


# ------------------------------------------------------------------------------------------------ the mathematics


def group_advantages(rewards: torch.Tensor, kind: str) -> torch.Tensor:
    """How much better each completion is than its siblings. rewards [P, G] of P prompts; returns [P, G]."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if kind == "grpo":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    elif kind == "rloo":
        advantages = advantages * rewards.shape[1] / (rewards.shape[1] - 1)
    all_equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return advantages.masked_fill(all_equal, 0.0)  # detail 1


def policy_loss(logprobs, old_logprobs, advantages, mask, surrogate: str, clip_low: float, clip_high: float):
    """Token losses and ratios [B, T]. logprobs, old_logprobs, mask [B, T]; advantages [B, 1]."""
    log_ratio = (logprobs - old_logprobs) * mask
    if surrogate == "gspo":  # the geometric mean over the completion, clipped once per sequence
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logprobs)
    ratio = log_ratio.exp()
    if surrogate == "cispo":  # the ratio is a constant weight of the gradient of log π: no token loses its gradient
        return -ratio.clamp(max=1 + clip_high).detach() * advantages * logprobs, ratio.detach()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio.detach()  # detail 6


def aggregate(losses, mask, how: str, sequences: int, tokens: float, max_tokens: int) -> torch.Tensor:
    """One number from token losses [B, T]; `sequences` and `tokens` count the whole optimizer step."""  # detail 7
    if how == "sequence":
        return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences
    return (losses * mask).sum() / (tokens if how == "token" else sequences * max_tokens)


def overlong_punishment(lengths: torch.Tensor, max_tokens: int, cache: int) -> torch.Tensor:
    """0 up to max_tokens − cache tokens, then falling to −1 at max_tokens, −1 beyond (eq. 13); 0 without a cache."""
    if not cache:
        return torch.zeros(lengths.shape)
    return ((max_tokens - cache - lengths) / cache).clamp(-1.0, 0.0)  # detail 13


# ------------------------------------------------------------------------------------------------ main


def main(args: Args) -> dict:
    device, rank, world = start_processes(args.device)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    assert args.batch_size % (args.minibatches * world) == 0, "--batch-size: a multiple of minibatches × processes"
    assert args.num_samples > 1, "--num-samples: a completion is compared with its siblings, so at least 2"
    assert args.generation_batch_size % world == 0, "--generation-batch-size must be a multiple of the processes"
    # GSPO has one term for a sequence, which any other aggregation would weigh by its length.
    assert args.surrogate != "gspo" or args.aggregation == "sequence", "--surrogate gspo: --aggregation sequence only"

    tokenizer, budget = load_tokenizer(args.model, args.today), args.max_completion_tokens
    longest = min(args.max_prompt_tokens, context_length(args.model) - budget)
    data = (args.dataset, args.eval_dataset, args.eval_rows, longest, args.seed)
    questions, held_out = load_questions(tokenizer, *data)
    policy = load_model(args.model, device, world, args.gradient_checkpointing, args.lora_rank, bfloat16)
    stops = stop_token_ids(tokenizer, policy)
    sampler = Sampler(policy, stops, torch.bfloat16 if bfloat16 else torch.float32, args.sampler_memory_gb)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)

    shown = {"reward/mean": "reward", "completions/length_mean": "length", "prompts/rounds": "rounds"}
    run = Run(args, rank, {**shown, "eval/accuracy": "accuracy"})
    sampling = (budget, args.eval_samples, args.temperature, args.seed)
    evaluate = partial(evaluate_answers, sampler, tokenizer, held_out, *sampling, rank, world)
    cache = budget // 5 if args.overlong_cache is None else args.overlong_cache
    assert 0 <= cache < budget, "--overlong-cache must be below --max-completion-tokens: the punishment begins there"
    size = args.generation_batch_size if args.dynamic_sampling else args.batch_size  # prompts a round
    finished = run.load(policy, optimizer) if args.resume else 0  # steps
    if not finished:
        run.log(0, *evaluate())

    for step in range(finished + 1, args.steps + 1):
        began, means, seed = time.perf_counter(), Means(), args.seed * 1_000_003 + step  # detail 8

        # Sample and score, until the batch is full of groups that can teach something.
        sampler.sync()
        drawn, kept, rounds = int(run.history[-1].get("prompts/generated", 0)), [], 0  # detail 15
        while len(kept) < args.batch_size and rounds < args.max_rounds:
            batch = shuffled_pass(questions, drawn // size + 1, size, args.seed)
            places = list(range(rank, size, world))
            prompts = [batch[p]["ids"] for p in places]
            numbers = [drawn + p for p in places]  # unique in the run: they seed the samples
            groups = sampler.generate(prompts, budget, args.num_samples, args.temperature, args.seed, numbers)
            answers = torch.zeros(len(groups), args.num_samples)  # [P, G]
            for i, (place, group) in enumerate(zip(places, groups)):
                row, begun = batch[place]["row"], batch[place]["prefill"]  # the answer's start, in the prompt
                texts = [begun + tokenizer.decode(c.ids, skip_special_tokens=True) for c in group]
                answers[i] = torch.tensor([reward(text, row) for text in texts])
            lengths = torch.tensor([[len(c.ids) for c in group] for group in groups])
            overlong = overlong_punishment(lengths, budget, cache)
            all_right, all_wrong = (answers > 0).all(1), (answers <= 0).all(1)
            teaches = ~(all_right | all_wrong) if args.dynamic_sampling else torch.ones(len(groups))  # detail 10
            scored = zip(numbers, prompts, groups, (answers + overlong).tolist())
            shares = [[item for item, keep in zip(scored, teaches.tolist()) if keep]] * world  # one of each process
            if world > 1:
                dist.all_gather_object(shares, shares[0])
            kept += sorted((item for share in shares for item in share), key=lambda item: item[0])  # by number
            drawn, rounds = drawn + size, rounds + 1
            means.add("reward/mean", answers)  # detail 14
            means.add("reward/overlong", overlong)
            means.add("groups/all_correct", all_right)
            means.add("groups/all_wrong", all_wrong)
            means.add("completions/length_mean", lengths)
            means.add("completions/truncated_fraction", [not c.stopped for group in groups for c in group])
        sampled = time.perf_counter()
        if len(kept) < args.batch_size:
            scores, samples = evaluate()
            run.log(step, means.over_processes(device) | scores, samples)
            why = "too few for --batch-size (see groups/all_correct and all_wrong). Give other prompts, or more samples"
            if rank == 0:
                print(f"{rounds} rounds of {size} prompts gave {len(kept)} groups with right and wrong answers, {why}.")
            break

        # Each process trains on its share of the first batch_size groups; completions are compared with their siblings.
        places = list(range(rank, args.batch_size, world))
        _, prompts, groups, rewards = zip(*[kept[p] for p in places])
        advantages = group_advantages(torch.tensor(rewards), args.advantage).view(-1, 1).to(device)  # [B, 1]

        # The rollout as rows: B = prompts × G completions of at most T tokens, each row with its prompt.
        completions = [c for group in groups for c in group]
        prompts, ids = [p for p in prompts for _ in range(args.num_samples)], [c.ids for c in completions]  # detail 2
        sampler_logprobs = pad_rows([torch.tensor(c.logprobs) for c in completions]).to(device)  # [B, T]
        mask = pad_rows([torch.ones(len(c.ids)) for c in completions]).to(device)  # [B, T], detail 4
        if args.overlong_filtering:
            mask *= torch.tensor([c.stopped for c in completions], device=device)[:, None]  # detail 12
        split = partial(microbatches, ids, prompts, args.microbatch_tokens)

        # Every epoch deals the prompts of the whole batch into minibatches; these are this process's rows of each.
        minibatches = []
        for epoch in range(args.update_epochs):
            order = torch.randperm(args.batch_size, generator=torch.Generator().manual_seed(seed + epoch))
            for chosen in order.view(args.minibatches, -1).tolist():
                minibatches.append([i for i in range(len(ids)) if places[i // args.num_samples] in chosen])

        rollout = {"prompts": prompts, "completions": ids, "temperature": args.temperature, "bfloat16": bfloat16}
        logprobs_of = partial(completion_logprobs, **rollout)  # log-probabilities and entropies [b, T], detail 3
        old_logprobs = torch.zeros_like(mask)
        with torch.no_grad():
            for rows in minibatches[1 : args.minibatches]:  # the first update runs at π_old, stores its own
                for part, _ in split(rows):
                    old_logprobs[part] = logprobs_of(policy, part)[0]

        # Update.
        rate = learning_rate(step, args)
        for update, rows in enumerate(minibatches):
            tokens = max(1, total(mask[rows].sum(), device))  # detail 11
            sequences = max(1, total(mask[rows].any(1).sum(), device))
            for part, weight in split(rows):  # weight: 0 for a copy that only keeps step with other processes, else 1
                logprobs, entropy = logprobs_of(policy, part)  # [b, T]
                if not update:
                    old_logprobs[part] = logprobs.detach()
                old, acted = old_logprobs[part], mask[part] * weight  # detail 5
                gap = old - sampler_logprobs[part]
                losses, ratio = policy_loss(
                    logprobs, old, advantages[part], acted, args.surrogate, args.clip_low, args.clip_high
                )
                if args.importance_cap:
                    losses = losses * gap.exp().clamp(max=args.importance_cap)
                means.add("loss/policy", losses, acted)
                loss = aggregate(losses, acted, args.aggregation, sequences, tokens, budget)
                (loss * world).backward()  # gradients are averaged over processes, the loss is a sum over them
                means.add("policy/entropy", entropy, acted)
                means.add("policy/sampler_gap", gap.abs(), acted)
                means.add("policy/clip_fraction", (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high), acted)
            optimizer.param_groups[0] |= {"lr": rate, "weight_decay": args.weight_decay}
            means.add("optim/grad_norm", clip_gradients(policy, args.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()

        # Log, evaluate, save.
        done = time.perf_counter()
        metrics, samples = means.over_processes(device), []
        metrics |= {"optim/learning_rate": rate, "time/sample": sampled - began, "time/train": done - sampled}
        metrics |= {"prompts/rounds": rounds, "prompts/generated": drawn, "prompts/trained": step * args.batch_size}
        metrics |= {"throughput/tokens_per_second": total(mask.sum(), device) / (done - began)}
        if due(step, args.eval_every, args.steps):
            scores, samples = evaluate()
            metrics |= scores
        run.log(step, metrics, samples)
        if due(step, args.save_every, args.steps):
            run.save(step, policy, optimizer)

    return run.finish(policy, tokenizer, stops, bfloat16)


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
