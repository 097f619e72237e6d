"""Speed and memory against the peers on the same model, rows, batch and precision: `python tests/benchmark.py`.

Prints a table and asserts nothing about time. The sampler is timed against `model.generate` in one process, in turn;
the scripts against TRL's trainers with their defaults, each in a process of its own so that peak memory is its own.
Figures are medians of repetitions or steps, the first step of every trainer left out as warm-up; but pairs differ much
in length, so reward_model.py and dpo.py are timed over one pass through the same rows, dpo.py's reference included.
TRL dropped its PPOTrainer after 1.12, so for `--only ppo` put that release before the installed one:

    pip install --no-deps --target trl-1.12 trl==1.12.0
    PYTHONPATH=trl-1.12 python tests/benchmark.py --only ppo

`--only growth` measures how our own cost grows, one dimension at a time; profile_steps.py what a step is spent on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

QUESTION = "{who} has {a} bags with {b} coins each and gives {c} coins away. How many coins are left? Explain."


def problems(count: int) -> list[dict]:
    """Word problems of different lengths, in GSM8K's columns."""
    rows = []
    for i in range(count):
        a, b, c = 3 + i % 17, 2 + i % 7, 1 + i % 5
        story = " Then a friend comes by and counts them all once more." * (i % 6)
        text = QUESTION.format(who=("Ada", "Ben", "Cleo")[i % 3], a=a, b=b, c=c).replace(" How", story + " How")
        rows.append({"question": text, "answer": f"{a} times {b} is {a * b}.{story}\n#### {a * b - c}"})
    return rows


def pairs(count: int) -> list[dict]:
    """The same problems with two answers."""
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": row["answer"],
            "rejected": row["answer"][::-1],
        }
        for row in problems(count)
    ]


def rows_for(path: str | None, count: int, made_up=problems) -> list[dict]:
    rows = [json.loads(line) for line in open(path, encoding="utf-8")] if path else made_up(count)
    return rows[:count]


# ---------------------------------------------------------------------------------------------- the sampler


def benchmark_sampler(args) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from common.generation import Sampler
    from common.kl import use_layout
    from common.tokenizer import load_tokenizer, pad, render_chat, stop_token_ids

    tokenizer = load_tokenizer(args.model)
    dtype = getattr(torch, args.dtype)
    ours = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    use_layout(ours)
    stops = stop_token_ids(tokenizer, ours)
    questions = [r["question"] for r in rows_for(args.data, 16)]
    if "tiny" in args.model:
        questions = [f"{a}+{a + 7}=?" for a in range(20, 36)]
    chats = [[{"role": "user", "content": q}] for q in questions]
    prompts = [render_chat(tokenizer, chat, generation_prompt=True).ids for chat in chats]
    ids, attention_mask, _ = pad(prompts, tokenizer.pad_token_id, "left")
    sampler = Sampler(ours, stops, dtype)
    rates = {"sampler": [], "model.generate": []}
    for repetition in range(args.repeat + 1):
        began = time.perf_counter()
        groups = sampler.generate(prompts, args.tokens, 8, seed=repetition)
        ours_rate = sum(len(c.ids) for g in groups for c in g) / (time.perf_counter() - began)
        began = time.perf_counter()
        out = theirs.generate(
            ids, attention_mask=attention_mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            num_return_sequences=8, max_new_tokens=args.tokens, eos_token_id=stops, pad_token_id=stops[0],
        )[:, ids.shape[1] :].tolist()  # fmt: skip
        elapsed = time.perf_counter() - began
        drawn = sum(next((j + 1 for j, token in enumerate(row) if token in stops), len(row)) for row in out)
        if repetition:
            rates["sampler"].append(ours_rate)
            rates["model.generate"].append(drawn / elapsed)
    report("sampler, tokens/s", {k: statistics.median(v) for k, v in rates.items()}, higher=True)


def report(what: str, medians: dict[str, float], higher: bool) -> None:
    (ours, a), (theirs, b) = medians.items()
    ratio = a / b if higher else b / a
    print(f"| {what} | {ours} {a:.4g} | {theirs} {b:.4g} | {ratio:.2f} × |", flush=True)


# ---------------------------------------------------------------------------------------------- trainers


def run_ours(
    script: str, flags: list, folder: str, processes: int = 1, threads: int | None = None, root: Path = ROOT
) -> dict:
    """Medians over the steps of one run but its first, in as many processes, and the most memory of the first."""
    flags = [*map(str, flags), "--output-dir", folder, "--eval-every", "0", "--eval-rows", "1"]
    flags += [] if script == "reward_model" else ["--eval-samples", "1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [sys.executable, *launcher, str(root / f"{script}.py"), *flags]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, text=True, env=environment, cwd=root)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        if status:
            sys.exit(f"{' '.join(command)} ended with status {status}:\n{output.read()[-2000:]}")
    everything = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    for row in everything:
        row["seconds"] = row.get("time/step", sum(row.get(f"time/{part}", 0) for part in ("sample", "grade", "train")))
    rows = everything[2:]
    return {
        "step": statistics.median(r["seconds"] for r in rows),
        "memory": usage.ru_maxrss * 1024 / 1e9,
        "tokens": statistics.median(r.get("throughput/tokens_per_second", 0) for r in rows),
        "pass": sum(r["seconds"] + r.get("time/reference", 0) for r in everything),
    }


def run_theirs(kind: str, args, data: str) -> dict:
    command = [sys.executable, __file__, "--only", f"trl-{kind}", "--model", args.model, "--data", data]
    command += ["--dtype", args.dtype, "--steps", str(args.steps), "--tokens", str(args.tokens)]
    command += ["--reward-model", args.reward_model] if kind == "ppo" else []
    command += ["--lora-rank", str(args.lora_rank), "--beta", str(args.beta)]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(out.stdout.strip().splitlines()[-1])


def trl(kind: str, args) -> None:
    """One of TRL's trainers with its defaults, in this process; prints its figures as JSON."""
    import resource

    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    rows, times = rows_for(args.data, 10**6), []
    bfloat16 = args.dtype == "bfloat16"
    tokens_seen = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *a, **k):
            self.began = time.perf_counter()

        on_step_begin = on_train_begin  # PPOTrainer does not call it

        def on_step_end(self, *a, **k):
            times.append(time.perf_counter() - self.began)
            self.began = time.perf_counter()

    common = {
        "output_dir": tempfile.mkdtemp(), "max_steps": args.steps, "report_to": "none", "bf16": bfloat16,
        "use_cpu": not torch.cuda.is_available(), "per_device_train_batch_size": 8, "save_strategy": "no",
        "disable_tqdm": True, "learning_rate": 1e-5, "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    adapters = None
    if args.lora_rank:
        from peft import LoraConfig

        adapters = LoraConfig(r=args.lora_rank, lora_alpha=32, target_modules="all-linear")
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer

        roles = {"question": "user", "answer": "assistant"}
        chats = [[{"role": role, "content": r[column]} for column, role in roles.items()] for r in rows]
        data = Dataset.from_list([{"prompt": c[:1], "completion": c[1:]} for c in chats])
        lengths = [len(tokenizer.apply_chat_template(c, return_dict=False)) for c in chats]
        tokens_seen = statistics.mean(lengths) * 8
        config = SFTConfig(**common, max_length=512)
        trainer = SFTTrainer(args.model, args=config, train_dataset=data, callbacks=[Clock()], peft_config=adapters)
    elif kind in ("reward", "dpo"):
        from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

        sides = {side: [[{"role": "assistant", "content": r[side]}] for r in rows] for side in ("chosen", "rejected")}
        data = Dataset.from_dict({"prompt": [r["prompt"] for r in rows], **sides})
        config, trainer = {"reward": (RewardConfig, RewardTrainer), "dpo": (DPOConfig, DPOTrainer)}[kind]
        trainer = trainer(
            args.model, args=config(**common), train_dataset=data, callbacks=[Clock()], peft_config=adapters
        )
    elif kind == "ppo":
        trainer = trl_ppo(args, rows, tokenizer, common, Clock())
    else:
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

        data = Dataset.from_list([{"prompt": [{"role": "user", "content": r["question"]}]} for r in rows])
        common["per_device_train_batch_size"] = 32
        sampling = {"num_generations": 8, "max_completion_length": args.tokens}
        config, trainer = {
            "grpo": (GRPOConfig(**common, **sampling, beta=args.beta), GRPOTrainer),
            "dapo": (GRPOConfig(**common, **sampling, loss_type="dapo", epsilon_high=0.28), GRPOTrainer),
            "rloo": (RLOOConfig(**common, **sampling, beta=0.05), RLOOTrainer),
        }[kind]
        trainer = trainer(
            args.model, args=config, train_dataset=data, callbacks=[Clock()], peft_config=adapters,
            reward_funcs=lambda completions, **k: [float(len(c[0]["content"]) % 7) for c in completions],
        )  # fmt: skip
    trainer.train()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    step = statistics.median(times[1:])
    print(json.dumps({"step": step, "memory": memory, "tokens": (tokens_seen or 0) / step, "pass": sum(times)}))


def trl_ppo(args, rows: list[dict], tokenizer, common: dict, clock):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    chats = [[{"role": "user", "content": r["question"]}] for r in rows]
    ids = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    data, tokenizer.padding_side = Dataset.from_dict({"input_ids": ids}), "left"
    load = AutoModelForSequenceClassification.from_pretrained
    reward_model, critic = (load(args.reward_model, num_labels=1, dtype="float32") for _ in range(2))
    policy, reference = (AutoModelForCausalLM.from_pretrained(args.model, dtype="float32") for _ in range(2))
    for name in ("max_steps", "model_init_kwargs"):
        common.pop(name)
    common["per_device_train_batch_size"] = 16
    config = PPOConfig(
        **common, total_episodes=16 * args.steps, response_length=args.tokens, temperature=1.0, stop_token="eos",
        num_sample_generations=0,
    )  # fmt: skip
    return PPOTrainer(config, tokenizer, policy, reference, reward_model, data, critic, eval_dataset=data,
                      callbacks=[clock])  # fmt: skip


def compare(script: str, flags: list, kind: str, peer: str, args, data, what: str = "seconds per step") -> None:
    """One of our scripts against one of TRL's trainers: time or throughput, and memory."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = run_ours(script, flags, folder + "/run"), run_theirs(kind, args, str(data))
    key, higher = ("tokens", True) if what == "tokens/s" else ("step", False)
    report(f"{script}, {what}", {f"{script}.py": ours[key], peer: theirs[key]}, higher=higher)
    report(f"{script}, peak memory in GB", {f"{script}.py": ours["memory"], peer: theirs["memory"]}, higher=False)


def shared_flags(args, data: Path) -> list:
    flags = ["--model", args.model, "--dataset", data, "--eval-dataset", data, "--dtype", args.dtype]
    return [*flags, "--steps", args.steps, "--learning-rate", "1e-5", "--lora-rank", args.lora_rank]


def benchmark_lora(args) -> None:
    """GRPO with a reference, and DPO, with adapters of `--lora-rank` on both sides; 0 trains all weights."""
    args.beta = 0.001
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(r) + "\n" for r in rows_for(args.data, 8 * args.steps)))
        shared = shared_flags(args, data)
        shared += ["--batch-size", 4, "--num-samples", 8, "--max-completion-tokens", args.tokens]
        shared += ["--microbatch-tokens", 1024]
        compare("grpo", [*shared, "--beta", args.beta], "grpo", "GRPOTrainer", args, data)
        data, count = Path(folder) / "pairs.jsonl", 8 * args.steps
        data.write_text("".join(json.dumps(r) + "\n" for r in rows_for(args.pairs, count, pairs)))
        flags = [*shared_flags(args, data), "--batch-size", 8, "--microbatch-tokens", 512]
        flags += ["--max-prompt-tokens", 1024, "--max-completion-tokens", 1024]
        flags += ["--gradient-checkpointing"]  # as TRL's trainers do unless told otherwise
        ours, theirs = run_ours("dpo", flags, f"{folder}/dpo"), run_theirs("dpo", args, str(data))
        step = {"dpo.py": ours["pass"] / args.steps, "DPOTrainer": theirs["pass"] / args.steps}
        report("dpo, seconds per step", step, higher=False)
        memory = {"dpo.py": ours["memory"], "DPOTrainer": theirs["memory"]}
        report("dpo, peak memory in GB", memory, higher=False)


def benchmark_trainers(args) -> None:
    """8 demonstrations a step; 4 prompts with 8 samples each, whose rewards differ, for the rest."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(r) + "\n" for r in rows_for(args.data, 8 * args.steps)))
        shared = shared_flags(args, data)
        flags = [*shared, "--batch-size", 8, "--max-length", 512, "--warmup-steps", 1]
        compare("sft", [*flags, "--microbatch-tokens", 512], "sft", "SFTTrainer", args, data, "tokens/s")
        shared += ["--batch-size", 4, "--num-samples", 8, "--max-completion-tokens", args.tokens]
        shared += ["--microbatch-tokens", 1024]
        compare("grpo", [*shared, "--beta", 0], "grpo", "GRPOTrainer", args, data)
        # One update a rollout and no dynamic sampling, which TRL lacks; the punishment makes rewards differ.
        dapo = ["--no-dynamic-sampling", "--minibatches", 1, "--overlong-cache", args.tokens - 1]
        compare("dapo", [*shared, *dapo], "dapo", "GRPOTrainer", args, data)
        rloo = ["--algorithm", "rloo", "--beta", 0.05, "--instruction", ""]
        compare("rlvr_math", [*shared, *rloo], "rloo", "RLOOTrainer", args, data)


def benchmark_preferences(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, count = Path(folder) / "pairs.jsonl", 8 * args.steps
        data.write_text("".join(json.dumps(r) + "\n" for r in rows_for(args.pairs, count, pairs)))
        flags = ["--model", args.model, "--dataset", data, "--eval-dataset", data, "--dtype", args.dtype]
        flags += ["--steps", args.steps, "--batch-size", 8, "--learning-rate", "1e-5", "--microbatch-tokens", 512]
        flags += ["--max-prompt-tokens", 1024, "--max-completion-tokens", 1024]
        flags += ["--gradient-checkpointing"]  # as TRL's trainers do unless told otherwise
        for script, kind, peer in (("reward_model", "reward", "RewardTrainer"), ("dpo", "dpo", "DPOTrainer")):
            ours, theirs = run_ours(script, flags, f"{folder}/{script}"), run_theirs(kind, args, str(data))
            step = {f"{script}.py": ours["pass"] / args.steps, peer: theirs["pass"] / args.steps}
            report(f"{script}, seconds per step", step, higher=False)
            memory = {f"{script}.py": ours["memory"], peer: theirs["memory"]}
            report(f"{script}, peak memory in GB", memory, higher=False)


def benchmark_ppo(args) -> None:
    """16 prompts, one completion each, four epochs of one minibatch: PPOTrainer's defaults."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(r) + "\n" for r in rows_for(args.data, 16 * args.steps)))
        if args.reward_model is None:  # an untrained head costs as much as a trained one
            args.reward_model = f"{folder}/reward_model"
            model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype="float32")
            model.save_pretrained(args.reward_model)
            AutoTokenizer.from_pretrained(args.model).save_pretrained(args.reward_model)
        flags = ["--model", args.model, "--dataset", data, "--eval-dataset", data, "--dtype", args.dtype]
        flags += ["--steps", args.steps, "--learning-rate", "3e-6", "--critic-learning-rate", "3e-6"]
        flags += ["--reward-model", args.reward_model, "--batch-size", 16, "--num-samples", 1, "--minibatches", 1]
        flags += ["--max-completion-tokens", args.tokens, "--microbatch-tokens", 1024]
        ours, theirs = run_ours("ppo", flags, f"{folder}/ppo"), run_theirs("ppo", args, str(data))
        report("ppo, seconds per step", {"ppo.py": ours["step"], "PPOTrainer": theirs["step"]}, higher=False)
        report("ppo, peak memory in GB", {"ppo.py": ours["memory"], "PPOTrainer": theirs["memory"]}, higher=False)


# ---------------------------------------------------------------------------------------------- growth


def text_rows(count: int, words: int) -> list[dict]:
    """Rows of the same length, for what must not depend on how lengths vary."""
    text = {"completion": "ten " * words, "answer": "1"}
    return [{"prompt": f"{i} {'go on ' * 8}", **text} for i in range(count)]


def resized(model: str, vocabulary: int, folder: str) -> str:
    """A model of the same shape with another vocabulary and random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model, vocab_size=vocabulary)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def benchmark_growth(args) -> None:
    """Seconds per step and peak memory of sft.py and grpo.py as one thing at a time doubles, all else the same."""
    print("| what grows | value | seconds per step | peak memory in GB |\n|---|---|---|---|")

    def tell(what: str, value, found: dict) -> None:
        print(f"| {what} | {value} | {found['step']:.2f} | {found['memory']:.2f} |", flush=True)

    def measure(script: str, flags: list, words: int = 60, model: str = args.model, **kwargs) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in text_rows(64, words)))
            common = ["--model", model, "--dataset", data, "--eval-dataset", data, "--dtype", args.dtype]
            common += ["--steps", args.steps, "--learning-rate", "1e-5"]
            return run_ours(script, [*common, *flags], folder + "/run", **kwargs)

    budget = ["--max-length", 2048, "--microbatch-tokens", 1024]
    for batch in (4, 8, 16):
        tell("`sft.py`: rows per step", batch, measure("sft", [*budget, "--batch-size", batch]))
    for words in (24, 48, 96):
        tell("`sft.py`: words per completion", words, measure("sft", [*budget, "--batch-size", 4], words))
    grpo = ["--beta", 0, "--microbatch-tokens", 1024, "--batch-size", 2]
    for samples in (4, 8, 16):
        flags = [*grpo, "--num-samples", samples, "--max-completion-tokens", 64]
        tell("`grpo.py`: samples per prompt", samples, measure("grpo", flags))
    for tokens in (32, 64, 128):
        flags = [*grpo, "--num-samples", 8, "--max-completion-tokens", tokens]
        tell("`grpo.py`: tokens per completion", tokens, measure("grpo", flags))
    for vocabulary in (16384, 32768, 65536, 131072):
        for microbatch in (512, 2048):
            with tempfile.TemporaryDirectory() as folder:
                model = resized(str(ROOT / "common" / "tiny"), vocabulary, folder)
                flags = ["--batch-size", 16, "--max-length", 512, "--microbatch-tokens", microbatch]
                found = measure("sft", flags, 30, model, threads=None)
            tell(f"tiny model in microbatches of {microbatch}: vocabulary", vocabulary, found)
    for processes in (1, 2):
        found = measure("sft", [*budget, "--batch-size", 8], processes=processes, threads=1)
        tell("`sft.py`, a core each: processes", processes, found)


KINDS = ("sft", "grpo", "dapo", "rloo", "reward", "dpo", "ppo")
PARTS = {
    "sampler": benchmark_sampler,
    "trainers": benchmark_trainers,
    "lora": benchmark_lora,
    "preferences": benchmark_preferences,
    "ppo": benchmark_ppo,
    "growth": benchmark_growth,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "common" / "tiny"))
    parser.add_argument("--data", help="JSONL with question and answer, such as GSM8K's; default: made-up problems")
    parser.add_argument("--pairs", help="JSONL with prompt (messages), chosen and rejected (text); default: made up")
    parser.add_argument("--reward-model", help="for --only ppo; default: --model with an untrained head")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per completion at most")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--lora-rank", type=int, default=0, help="for --only lora")
    parser.add_argument("--beta", type=float, default=0.0, help="of GRPOTrainer")
    parser.add_argument("--only", choices=[*PARTS, *(f"trl-{kind}" for kind in KINDS)])
    arguments = parser.parse_args()
    if (arguments.only or "").startswith("trl-"):
        trl(arguments.only[4:], arguments)
    else:
        print(f"{arguments.model}, {arguments.dtype}")
        if arguments.only != "growth":
            print("| what | ours | peer | ratio |\n|---|---|---|---|")
        for part in [arguments.only] if arguments.only else ("sampler", "trainers", "preferences"):
            PARTS[part](arguments)
