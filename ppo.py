"""PPO: reinforcement learning from a learned reward, with a critic that says how much each token was worth.

Against grpo.py: a reward model scores completions; every token pays for leaving the reference; and a critic, which
learns to predict what is still to come, takes the place of the group, so that each token gets its own advantage.

    r_t = −β·(log π_old(y_t) − log ref(y_t)) + [t is the last token]·score(y)
    δ_t = r_t + γ·V_{t+1} − V_t,   A_t = δ_t + γλ·A_{t+1},   R_t = A_t + V_t          γ = 1; V after the last token is 0
    policy loss = mean of w·max(−A·ρ, −A·clip(ρ, 1−ε, 1+ε)),   ρ = π/π_old,   w = min(π_old/μ, cap),   A whitened
    value loss  = mean of ½·max((V−R)², (V_old + clip(V−V_old, −ε, ε) − R)²)

Signal: a reward model's score. Optimizer: a clipped policy gradient over several epochs. Leash: KL in the reward, kept
near a target by its weight. Defence: that leash, an ensemble, a stop at some KL; the gold score watched beside it.

    python reward_model.py && python ppo.py                            # embedded model and data, a few minutes
    python ppo.py --model Qwen/Qwen2.5-1.5B-Instruct                   # UltraFeedback's prompts on one GPU
    torchrun --nproc-per-node 8 ppo.py --model Qwen/Qwen2.5-7B-Instruct --reward-model RM
    python ppo.py --reward-model None                                  # the function `reward`, for what can be checked

Normal: `eval/reward`, the proxy, rises; `policy/kl_sequence` with it, and then stays near --kl-target; `eval/accuracy`,
the gold score, rises too. `value/explained_variance` nears 1; `policy/clip_fraction` of up to 0.2.
Wrong: the proxy rises while the gold score falls: the reward model is being exploited, and overoptimisation.png shows
from which KL on. `value/explained_variance` at 0: the critic is noise, and so are the advantages.

Details that decide whether it works, marked in the code under their numbers:
 1. A completion that was cut has not earned its score: a penalty is taken off.
 2. Token ids are the sampler's own; π_old, in the ratios and in the reward's KL, is computed by the trainer.
 3. Logits of completions are divided by the sampling temperature in every forward, policy's and reference's.
 4. The stop token is an action; masks come from lengths, and nothing behind the last action is ever read.
 5. KL enters the reward as k1, detached: the gradient of k3 there has a wrong size and even a wrong sign.
 6. The score is added at the last action, the stop token where there is one, and what follows it is worth 0.
 7. V_t is read where token t is predicted, from the tokens before it.
 8. Returns are A + V before advantages are whitened, over all actions of the rollout and all processes.
 9. Rewards may be whitened too, without moving their mean, which would turn a good score into a bad one.
10. Values are clipped around the old ones as ratios are around 1, and the larger of both losses counts.
11. Losses are divided by the tokens of the whole optimizer step: microbatches and processes change nothing.
12. The controller moves β by the KL per completion, summed over its tokens, at most a fifth of n/horizon for n of them.
13. The critic starts as the reward model, its normalisation folded in, so that it begins at the scores' scale.
14. All randomness is a function of seed and step: a resumed run repeats the uninterrupted one bit for bit.

Papers: PPO arXiv:1707.06347, GAE 1506.02438, InstructGPT 2203.02155, details 2403.17031, over-optimisation 2210.10760.
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

from common.generation import Sampler, answer_metrics, is_correct, sample_answers
from common.kl import (
    AdaptiveKLController,
    RewardModel,
    clip_gradients,
    completion_logprobs,
    completion_values,
    context_length,
    frozen,
    kl_estimate,
    load_model,
    load_scalar_model,
    masked_moments,
    shard,
    token_logprobs,
    whiten,
)
from common.tokenizer import (
    TINY,
    Segment,
    encode_conversations,
    load_questions,
    load_rows,
    load_tokenizer,
    microbatches,
    pack,
    pad_rows,
    shuffled_pass,
    stop_token_ids,
)


@dataclass
class Args:
    # model and data
    model: str = "Qwen/Qwen2.5-1.5B-Instruct"  # folder or Hub name of a causal language model; the reference, too
    reward_model: str | None = "runs/reward_model/latest/model"  # output of reward_model.py; None: `reward` below
    ensemble_score: Literal["mean", "min", "uwo"] = "mean"  # of an ensemble's scores; uwo: mean − variance / 2
    dataset: str = "trl-lib/ultrafeedback-prompt"  # file, folder or Hub name[:subset[:split]]; rows hold a prompt
    eval_dataset: str | None = "trl-lib/ultrafeedback-prompt::test"  # with --dataset alone, at most a tenth of it
    eval_rows: int = 200  # held-out questions used
    eval_samples: int = 1  # completions of each, at --temperature
    max_prompt_tokens: int = 512  # rows with a longer prompt are dropped
    max_completion_tokens: int = 512  # budget of a completion

    # algorithm
    num_samples: int = 1  # completions per prompt
    temperature: float = 1.0  # of sampling, and of every log-probability in training
    missing_eos_penalty: float = 1.0  # taken off the score of a completion that was cut
    whiten_rewards: bool = False  # scale the rewards of tokens to unit variance (arXiv:2403.17031)
    beta: float = 0.05  # weight of the KL in the reward; with a --kl-target only the first one
    kl_target: float | None = 6.0  # nats per completion to which the controller holds the KL; None keeps beta
    kl_horizon: int = 10_000  # completions in which the controller moves β by a fifth
    stop_kl: float | None = None  # end the run after the first evaluation that finds more nats per completion
    gae_lambda: float = 0.95  # λ of GAE: 1 trusts returns alone, 0 the critic alone
    clip_range: float = 0.2  # ratios are clipped to 1 ± clip_range
    value_clip: float = 0.2  # values are clipped to the old ones ± value_clip
    importance_cap: float = 2.0  # of the weight π_old/μ, which corrects for the sampler's rounding (μ); 0: no weight
    update_epochs: int = 4  # passes over each rollout
    minibatches: int = 1  # optimizer steps per pass
    critic: Literal["reward_model", "policy"] = "reward_model"  # its first weights; policy: with a head of zeros
    ptx_dataset: str | None = None  # demonstrations mixed into the loss (PPO-ptx)
    ptx_weight: float = 0.1  # of their mean negative log-likelihood per token

    # optimisation
    steps: int = 200  # rollouts
    batch_size: int = 128  # prompts per rollout over all processes
    microbatch_tokens: int = 16384  # tokens per forward and backward: a memory knob, not a change of result
    sampler_memory_gb: float | None = None  # bound on its keys and values; None: 4 on a CPU, a fifth of a GPU's
    lora_rank: int = 0  # 0: all weights; else adapters of this rank, by default at ten times the learning rate
    learning_rate: float = 1e-6  # peak, of the policy
    critic_learning_rate: float = 5e-6  # peak, of the critic
    warmup_steps: int = 5  # rollouts of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up; the last two reach 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products and saved weights; auto: bfloat16 on CUDA
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    seed: int = 1
    today: str = f"{date.today()}"  # what chat templates print as the date

    # output
    eval_every: int = 20  # steps between evaluations
    save_every: int = 20  # steps between checkpoints
    output_dir: str | None = None  # default: runs/ppo/<date>_<time>
    resume: str | None = None  # continue the run in this folder with its arguments, but for those given again
    wandb_project: str | None = None  # also log to Weights & Biases


EMBEDDED = Args(  # what runs where no --model is given: a few minutes on two cores
    model=f"{TINY}", dataset=f"{TINY}/maths_train.jsonl", eval_dataset=f"{TINY}/maths_test.jsonl", eval_rows=192,
    eval_samples=4, max_completion_tokens=64, num_samples=4, beta=0.5, kl_target=2.5, kl_horizon=500, minibatches=2,
    steps=30, batch_size=32, microbatch_tokens=4096, learning_rate=1e-4, critic_learning_rate=2e-3, eval_every=5,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ the reward: edit here


def reward(text: str, row: dict, stopped: bool) -> float:
    """With --reward-model None: 1 if `text` ended by itself and its final answer is one of `row["answer"]`, else 0."""
    return float(stopped and is_correct(text, row["answer"]))


# ------------------------------------------------------------------------------------------------ the mathematics
# B completions of at most T tokens; `mask` [B, T] is 1 where the policy acted.


def token_rewards(logprobs, ref_logprobs, scores: torch.Tensor, mask: torch.Tensor, beta: float) -> torch.Tensor:
    """[B, T]: −β·k1 at every action, plus the score at the last one. logprobs, ref_logprobs [B, T], scores [B]."""
    rewards = -beta * kl_estimate(logprobs, ref_logprobs, "k1") * mask  # detail 5
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    rewards[torch.arange(len(mask), device=mask.device), last] += scores  # detail 6
    return rewards


def gae(rewards, values, mask, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and returns [B, T] (arXiv:1506.02438). Tokens outside the mask are passed over:
    value and advantage go through them unchanged, and what they hold is never read."""
    advantages, is_action = torch.zeros_like(rewards), mask > 0  # detail 4
    next_value, next_advantage = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(is_action[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(is_action[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = advantages.where(is_action, 0.0)
    return advantages, (advantages + values).where(is_action, 0.0)  # detail 8


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """max(−A·ρ, −A·clip(ρ, 1±ε)) and ρ [B, T]. All [B, T]."""
    ratio = ((logprobs - old_logprobs) * mask).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), ratio.detach()


def clipped_value_loss(values, old_values, returns, clip: float) -> torch.Tensor:
    """½·max((V−R)², (V_old + clip(V−V_old, ±ε) − R)²) [B, T]."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())  # detail 10


# ------------------------------------------------------------------------------------------------ main


def main(args: Args) -> dict:
    device, rank, world = start_processes(args.device)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    assert args.batch_size % (args.minibatches * world) == 0, "--batch-size: a multiple of minibatches × processes"
    if args.reward_model == Args.reward_model:
        assert Path(args.reward_model).exists(), "--reward-model: `python reward_model.py` trains one; or give None"
        args.reward_model = str(Path(args.reward_model).resolve())  # `latest` may be another one on --resume

    tokenizer, budget = load_tokenizer(args.model, args.today), args.max_completion_tokens
    longest, demonstrations = min(args.max_prompt_tokens, context_length(args.model) - budget), None
    data = (args.dataset, args.eval_dataset, args.eval_rows, longest, args.seed)
    questions, held_out = load_questions(tokenizer, *data, needs_answer=not args.reward_model)
    if args.ptx_dataset:
        rows, most = load_rows(args.ptx_dataset), longest + budget
        demonstrations = encode_conversations(tokenizer, rows, args.ptx_dataset, max_length=most)
    policy = load_model(args.model, device, world, args.gradient_checkpointing, args.lora_rank, bfloat16)
    reference = frozen(policy, device, world)
    score = None
    if args.reward_model:
        score = RewardModel(args.reward_model, device, bfloat16, args.microbatch_tokens, args.ensemble_score)
    critic = shard(load_critic(args, tokenizer, device, bfloat16), world)
    stops = stop_token_ids(tokenizer, policy)
    sampler = Sampler(policy, stops, torch.bfloat16 if bfloat16 else torch.float32, args.sampler_memory_gb)
    models, settings = torch.nn.ModuleList([policy, critic]), {"weight_decay": args.weight_decay, "betas": (0.9, 0.95)}
    optimizer = torch.optim.AdamW([{"params": m.parameters()} for m in models], **settings, eps=1e-5, fused=True)
    controller = AdaptiveKLController(args.beta, args.kl_target or math.inf, args.kl_horizon)
    shown = {"eval/reward": "proxy reward", "eval/kl": "KL", "value/explained_variance": "critic"}
    run = Run(args, rank, {**shown, "eval/accuracy": "accuracy"})
    forward = {"temperature": args.temperature, "bfloat16": bfloat16}  # detail 3

    def scores_of(row: dict, texts: list[str], group: list) -> torch.Tensor:  # [G]
        stopped = [completion.stopped for completion in group]
        found = score(row, texts) if score else torch.tensor([reward(t, row, end) for t, end in zip(texts, stopped)])
        return found - args.missing_eos_penalty * ~torch.tensor(stopped)  # detail 1

    @torch.no_grad()
    def evaluate() -> tuple[dict, list[dict]]:
        """Gold and proxy reward of held-out questions, and the KL to the reference, from the same samples."""
        sampler.sync()
        sampling, means = (budget, args.eval_samples, args.temperature, args.seed), Means()
        answered = sample_answers(sampler, tokenizer, held_out, sampling, rank, world, greedy=True)
        metrics, samples = answer_metrics(answered, tokenizer, device)
        for sample, (question, group, texts) in zip(samples, answered.values()):  # the last of a group is greedy
            scores = scores_of(question["row"], texts[:-1], group[:-1])
            means.add("eval/reward", scores)
            sample["reward"] = float(scores[0])
        pairs = [(question["ids"], c.ids) for question, group, _ in answered.values() for c in group[:-1]]
        prompts, ids = zip(*pairs or [([0], [0])])
        for part, weight in microbatches(ids, prompts, args.microbatch_tokens, range(len(pairs))):
            found = [completion_logprobs(model, part, prompts, ids, **forward)[0] for model in (policy, reference)]
            means.add("eval/kl", (found[0] - found[1]).sum(1), weight)
        return metrics | means.over_processes(device), samples

    finished = run.load(models, optimizer) if args.resume else 0  # steps
    if not finished:
        run.log(0, *evaluate())
    controller.coefficient = run.history[-1].get("policy/next_beta", args.beta)

    for step in range(finished + 1, args.steps + 1):
        began, means, seed = time.perf_counter(), Means(), args.seed * 1_000_003 + step  # detail 14
        if args.stop_kl and [row for row in run.history if "eval/kl" in row][-1]["eval/kl"] > args.stop_kl:
            break

        # Sample completions of each of this process's prompts.
        sampler.sync()
        batch = shuffled_pass(questions, step, args.batch_size, args.seed)
        places = list(range(rank, args.batch_size, world))  # of this process's prompts in the batch
        prompts = [batch[p]["ids"] for p in places]
        groups = sampler.generate(prompts, budget, args.num_samples, args.temperature, seed, places)
        sampled = time.perf_counter()

        # The rollout as rows: B = prompts × samples of at most T tokens, each row with its prompt; and its scores.
        completions = [c for group in groups for c in group]
        prompts, ids = [p for p in prompts for _ in range(args.num_samples)], [c.ids for c in completions]  # detail 2
        sampler_logprobs = pad_rows([torch.tensor(c.logprobs) for c in completions]).to(device)  # [B, T]
        mask = pad_rows([torch.ones(len(c.ids)) for c in completions]).to(device)  # [B, T], detail 4
        split = partial(microbatches, ids, prompts, args.microbatch_tokens)
        scores = []
        for place, group in zip(places, groups):
            row, begun = batch[place]["row"], batch[place]["prefill"]  # the start of the answer, already in the prompt
            texts = [begun + tokenizer.decode(c.ids, skip_special_tokens=True) for c in group]
            scores.append(scores_of(row, texts, group))
        scores = torch.cat(scores).to(device)  # [B]

        # Every epoch deals the prompts of the whole batch into minibatches; these are this process's rows of each.
        minibatches = []
        for epoch in range(args.update_epochs):
            order = torch.randperm(args.batch_size, generator=torch.Generator().manual_seed(seed * 97 + epoch))
            for chosen in order.view(args.minibatches, -1).tolist():
                minibatches.append([i for i in range(len(ids)) if places[i // args.num_samples] in chosen])

        rollout = {"prompts": prompts, "completions": ids}
        logprobs_of = partial(completion_logprobs, **rollout, **forward)  # log-probabilities and entropies [b, T]
        values_of = partial(completion_values, critic, **rollout, bfloat16=bfloat16)  # [b, T]
        ref_logprobs, old_logprobs, old_values = (torch.zeros_like(mask) for _ in range(3))
        with torch.no_grad():
            for rows in minibatches[: args.minibatches]:  # the first epoch's: every row once
                for part, _ in split(rows):
                    ref_logprobs[part] = logprobs_of(reference, part)[0]
                    old_logprobs[part] = logprobs_of(policy, part)[0]
                    old_values[part] = values_of(part)  # detail 7

        # Credit each token.
        beta, add_up = controller.coefficient, lambda sums: [total(value, device) for value in sums]
        rewards = token_rewards(old_logprobs, ref_logprobs, scores, mask, beta)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, add_up=add_up)  # detail 9
        advantages, returns = gae(rewards, old_values, mask, 1.0, args.gae_lambda)
        advantages = whiten(advantages, mask, add_up=add_up)  # detail 8

        # Update.
        rate = learning_rate(step, args)
        critic_rate = learning_rate(step, replace(args, learning_rate=args.critic_learning_rate))
        for update, rows in enumerate(minibatches):
            tokens = total(mask[rows].sum(), device)
            for part, weight in split(rows):  # weight: 0 for a copy that only keeps step with other processes, else 1
                logprobs, entropy = logprobs_of(policy, part)  # [b, T]
                old, advantage, acted = old_logprobs[part], advantages[part], mask[part] * weight
                losses, ratio = clipped_policy_loss(logprobs, old, advantage, acted, args.clip_range)
                gap = old - sampler_logprobs[part]
                means.add("loss/policy", losses, acted)
                if args.importance_cap:
                    losses = losses * gap.exp().clamp(max=args.importance_cap)
                ((losses * acted).sum() / tokens * world).backward()  # gradients are averaged over processes, detail 11
                losses = clipped_value_loss(values_of(part), old_values[part], returns[part], args.value_clip)
                ((losses * acted).sum() / tokens * world).backward()
                means.add("loss/value", losses, acted)
                means.add("policy/entropy", entropy, acted)
                means.add("policy/sampler_gap", gap.abs(), acted)
                means.add("policy/clip_fraction", (ratio - 1).abs() > args.clip_range, acted)
            if demonstrations is not None:
                chance, count = torch.Generator().manual_seed(seed * 9973 + update), args.batch_size // args.minibatches
                drawn = torch.randint(len(demonstrations), (count,), generator=chance)
                demonstrated = demonstrations[drawn[rank::world].tolist()]
                targets = total(sum(sum(row[1:]) for row in demonstrated["mask"]), device)
                for part, weight in microbatches(demonstrated["ids"], None, args.microbatch_tokens):
                    packed = pack([Segment(demonstrated["ids"][i], demonstrated["mask"][i]) for i in part]).to(device)
                    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
                        logprobs, _ = token_logprobs(policy, packed)
                    (-logprobs.sum() / targets * args.ptx_weight * weight * world).backward()
                    means.add("loss/ptx", -logprobs, weight)
            optimizer.param_groups[0] |= {"lr": rate, "weight_decay": args.weight_decay}
            optimizer.param_groups[1] |= {"lr": critic_rate, "weight_decay": args.weight_decay}
            means.add("optim/grad_norm", clip_gradients(policy, args.max_grad_norm))
            means.add("optim/critic_grad_norm", clip_gradients(critic, args.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()

        # Log, evaluate, save.
        done = time.perf_counter()
        means.add("reward/mean", scores)
        means.add("policy/kl_sequence", ((old_logprobs - ref_logprobs) * mask).sum(1))
        means.add("completions/length_mean", mask.sum(1))
        means.add("completions/truncated_fraction", [not c.stopped for c in completions])
        metrics, samples = means.over_processes(device), []
        if args.kl_target:
            controller.update(metrics["policy/kl_sequence"], args.batch_size * args.num_samples)  # detail 12
        metrics |= {"policy/beta": beta, "policy/next_beta": controller.coefficient}
        variances = [masked_moments(values, mask, add_up)[1] for values in (returns - old_values, returns)]
        metrics["value/explained_variance"] = 1 - variances[0] / max(variances[1], 1e-12)
        metrics |= {"optim/learning_rate": rate, "time/sample": sampled - began, "time/train": done - sampled}
        if due(step, args.eval_every, args.steps):
            scores, samples = evaluate()
            metrics |= scores
        run.log(step, metrics, samples)
        if samples and rank == 0:
            draw_overoptimisation(run)
        if due(step, args.save_every, args.steps):
            run.save(step, models, optimizer)

    return run.finish(policy, tokenizer, stops, bfloat16)


def load_critic(args: Args, tokenizer, device, bfloat16: bool):
    """The reward model, its normalisation folded into its scalar head, or the policy with a head of zeros."""
    is_reward_model = args.critic == "reward_model" and args.reward_model is not None
    path, flag = (args.reward_model, "--reward-model") if is_reward_model else (args.model, "--model")
    if is_reward_model and load_tokenizer(path, flag=flag).get_vocab() != tokenizer.get_vocab():
        sys.exit(f"{flag} {path}: a critic needs the tokenizer of {args.model}; add --critic policy.")
    how = (args.gradient_checkpointing, args.lora_rank, bfloat16, flag)
    critic = load_scalar_model(path, device, *how, head_seed=None if is_reward_model else 0)
    mean, std = getattr(critic.config, "reward_mean", 0.0), getattr(critic.config, "reward_std", 1.0)
    trained, critic.score = critic.score, torch.nn.Linear(critic.score.in_features, 1, device=device)
    with torch.no_grad():
        bias = 0.0 if trained.bias is None else trained.bias
        critic.score.weight.copy_(trained.weight / std * is_reward_model)
        critic.score.bias.fill_((float(bias) - mean) / std * is_reward_model)  # detail 13
    return critic


def draw_overoptimisation(run) -> None:
    """overoptimisation.png: proxy and gold reward of the evaluations over the root of the KL, as Gao et al. draw it."""
    from matplotlib.figure import Figure

    rows = [row for row in run.history if "eval/kl" in row]
    distance = [max(row["eval/kl"], 0.0) ** 0.5 for row in rows]
    axis = Figure(figsize=(5, 3.2), layout="tight").subplots()
    axis.plot(distance, [row["eval/reward"] for row in rows], marker=".", color="C0")
    axis.set(xlabel="√KL to the reference (KL in nats per completion)", ylabel="proxy reward (blue)")
    if "eval/accuracy" in rows[0]:
        gold = axis.twinx()
        gold.plot(distance, [row["eval/accuracy"] for row in rows], marker=".", color="C1")
        gold.set(ylabel="gold: share right (orange)", ylim=(0, 1.02))
    axis.figure.savefig(run.folder / "overoptimisation.png", dpi=110)


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
