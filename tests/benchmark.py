"""Speed and memory against the peers on the same model, rows, batch and precision: `python tests/benchmark.py`.

Prints a table and asserts nothing about time. The sampler is timed against `model.generate` in one process, in turn;
the scripts against TRL's trainers with their defaults, each in a process of its own so that peak memory is its own.
Figures are medians of repetitions or steps, the first step of every trainer left out as warm-up; but pairs differ much
in length, so reward_model.py and dpo.py are timed over one pass through the same rows, dpo.py's reference included.
TRL dropped its PPOTrainer after 1.12, so for `--only ppo` put that release before the installed one:

    pip install --no-deps --target trl-1.12 trl==1.12.0
    PYTHONPATH=trl-1.12 python tests/benchmark.py --only ppo
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SAMPLED = "--batch-size 4 --num-samples 8 --max-completion-tokens {tokens} --microbatch-tokens 1024"
PAIRED = "--batch-size 8 --max-prompt-tokens {half} --max-completion-tokens {half} --microbatch-tokens 512 "
PAIRED += "--gradient-checkpointing"  # as TRL's trainers do unless told otherwise
PEERS = {"sft": "SFTTrainer", "reward_model": "RewardTrainer", "dpo": "DPOTrainer", "ppo": "PPOTrainer",
         "grpo": "GRPOTrainer", "dapo": "GRPOTrainer", "rlvr_math": "RLOOTrainer"}  # fmt: skip
PARTS = {  # scripts and their flags
    "sampler": {},
    "trainers": {  # 8 demonstrations a step; 4 prompts with 8 samples each, whose rewards differ, for the rest
        "sft": "--batch-size 8 --max-length 512 --warmup-steps 1 --microbatch-tokens 512",
        "grpo": f"{SAMPLED} --beta 0",
        # One update a rollout and no dynamic sampling, which TRL lacks; the punishment makes rewards differ.
        "dapo": f"{SAMPLED} --no-dynamic-sampling --minibatches 1 --overlong-cache {{cache}}",
        "rlvr_math": f"{SAMPLED} --algorithm rloo --beta 0.05 --instruction ''",
    },
    "preferences": {"reward_model": PAIRED, "dpo": PAIRED},
    "lora": {"grpo": f"{SAMPLED} --beta 0.001", "dpo": PAIRED},  # with adapters of --lora-rank; 0 trains all weights
    "ppo": {  # 16 prompts, one completion each, four epochs of one minibatch: PPOTrainer's defaults
        "ppo": "--batch-size 16 --num-samples 1 --minibatches 1 --max-completion-tokens {tokens} "
               "--microbatch-tokens 1024 --critic-learning-rate 3e-6 --reward-model {reward_model}",
    },
}  # fmt: skip


def rows_for(script: str, args, count: int) -> list[dict]:
    """As many rows of the file that is named, else made up: word problems of different lengths with GSM8K's columns, or
    with two answers."""
    is_paired, rows = script in PARTS["preferences"], []
    if path := args.pairs if is_paired else args.data:
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()[:count]]
    for i in range(count):
        a, b, c = 3 + i % 17, 2 + i % 7, 1 + i % 5
        story = " Then a friend comes by and counts them all once more." * (i % (3 if is_paired else 6))
        asked = f"Ada has {a} bags with {b} coins each and gives {c} coins away.{story} How many are left? Explain."
        answer = f"{a} times {b} is {a * b}.{story}\n#### {a * b - c}"
        pair = {"prompt": [{"role": "user", "content": asked}], "chosen": answer, "rejected": answer[::-1]}
        rows.append(pair if is_paired else {"question": asked, "answer": answer})
    return rows


def tell(what: str, ours: float, peer: str, theirs: float, higher: bool = False) -> None:
    ratio = ours / theirs if higher else theirs / ours
    print(f"| {what} | {ours:.4g} | {peer} {theirs:.4g} | {ratio:.2f} × |", flush=True)


# ---------------------------------------------------------------------------------------------- ours and theirs


def rates(sampler, model, prompts: list[list[int]], tokens: int, theirs: int | None = None, seed: int = 0):
    """Tokens a second of our sampler and of `model.generate`, which may draw fewer; 8 samples a prompt."""
    from common.tokenizer import pad

    began, stops = time.perf_counter(), sampler.stop_ids.tolist()
    drawn = sum(len(c.ids) for group in sampler.generate(prompts, tokens, 8, seed=seed) for c in group)
    ours, began = drawn / (time.perf_counter() - began), time.perf_counter()
    ids, attention_mask = (rows.to(model.device) for rows in pad(prompts, 0, "left")[:2])
    out = model.generate(
        ids, attention_mask=attention_mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0,
        num_return_sequences=8, max_new_tokens=theirs or tokens, eos_token_id=stops,
    )[:, ids.shape[1] :].tolist()  # fmt: skip
    drawn = sum(next((j + 1 for j, token in enumerate(row) if token in stops), len(row)) for row in out)
    return ours, drawn / (time.perf_counter() - began)


def compare_samplers(args) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from common.generation import Sampler
    from common.kl import use_layout
    from common.tokenizer import load_tokenizer, render_chat, stop_token_ids

    tokenizer, dtype = load_tokenizer(args.model), getattr(torch, args.dtype)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval() for _ in range(2))
    use_layout(ours)
    questions = [row["question"] for row in rows_for("sft", args, 16)]
    if "tiny" in args.model:
        questions = [f"{a}+{a + 7}=?" for a in range(20, 36)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [render_chat(tokenizer, chat, generation_prompt=True).ids for chat in chats]
    sampler = Sampler(ours, stop_token_ids(tokenizer, ours), dtype)
    found = [rates(sampler, theirs, prompts, args.tokens, seed=seed) for seed in range(args.repeat + 1)]
    ours, theirs = map(median, zip(*found[1:]))
    tell("sampler, tokens/s", ours, "`model.generate`", theirs, higher=True)


def run_ours(script: str, flags: list[str]) -> dict:
    """Medians of what a script logs at its steps but the first, and the mean of the seconds of all."""
    import tyro

    module = import_module(script)
    with tempfile.TemporaryDirectory() as folder:
        module.main(tyro.cli(module.Args, args=[*flags, "--output-dir", f"{folder}/run"]))
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    parts = [f"time/{part}" for part in ("sample", "grade", "train")]
    for row in rows:
        row["seconds"] = row.get("time/step", sum(row.get(part, 0) for part in parts))
    found = {name: median(row[name] for row in rows[2:]) for name in rows[1].keys() & rows[-1].keys()}
    return found | {"pass": sum(row["seconds"] + row.get("time/reference", 0) for row in rows) / rows[-1]["step"]}


def run_theirs(script: str, flags: list[str], args, rows: list[dict]) -> dict:
    """The same of TRL's trainer with its defaults."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback

    stamps, tokenizer, given = [], AutoTokenizer.from_pretrained(args.model), dict(zip(flags, flags[1:]))

    class Clock(TrainerCallback):
        def on_train_begin(self, *a, **k):
            stamps.append(time.perf_counter())

        on_step_end = on_train_begin

    def said(role: str, column: str) -> list[list[dict]]:
        return [[{"role": role, "content": row[column]}] for row in rows]

    common = {
        "output_dir": tempfile.mkdtemp(), "report_to": "none", "bf16": args.dtype == "bfloat16", "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True, "learning_rate": 1e-5,
    }  # fmt: skip
    options = {**common, "max_steps": args.steps, "model_init_kwargs": {"dtype": "float32"}}
    options["per_device_train_batch_size"] = 32 if "--num-samples" in flags else 8
    more = {"callbacks": [Clock()], "peft_config": None}
    if args.lora_rank:
        more["peft_config"] = LoraConfig(r=args.lora_rank, lora_alpha=32, target_modules="all-linear")
    tokens, data = 0, {} if script in PARTS["preferences"] else {"prompt": said("user", "question")}
    if not data:
        sides = {side: said("assistant", side) for side in ("chosen", "rejected")}
        data = {"prompt": [row["prompt"] for row in rows], **sides}
    elif script == "sft":
        options["max_length"], data["completion"] = 512, said("assistant", "answer")
        chats = map(list.__add__, *data.values())
        tokens = 8 * mean(len(tokenizer.apply_chat_template(chat, return_dict=False)) for chat in chats)
    elif script != "ppo":
        options |= {"num_generations": 8, "max_completion_length": args.tokens, "beta": float(given.get("--beta", 0))}
        options |= {"loss_type": "dapo", "epsilon_high": 0.28} if script == "dapo" else {}
        more["reward_funcs"] = lambda completions, **k: [float(len(c[0]["content"]) % 7) for c in completions]
    if script == "ppo":
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        scorer, length = AutoModelForSequenceClassification.from_pretrained, {"response_length": args.tokens}
        scored = [scorer(given["--reward-model"], num_labels=1, dtype="float32") for _ in range(2)]
        models = [AutoModelForCausalLM.from_pretrained(args.model, dtype="float32") for _ in range(2)]
        ids = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in data["prompt"]]
        data, tokenizer.padding_side = Dataset.from_dict({"input_ids": ids}), "left"
        config = PPOConfig(
            **common, **length, per_device_train_batch_size=16, total_episodes=16 * args.steps, temperature=1.0,
            stop_token="eos", num_sample_generations=0,
        )  # fmt: skip
        trainer = PPOTrainer(
            config, tokenizer, *models, scored[0], data, scored[1], eval_dataset=data, callbacks=more["callbacks"]
        )
    else:
        config = getattr(trl, PEERS[script].replace("Trainer", "Config"))(**options)
        trainer = getattr(trl, PEERS[script])
        trainer = trainer(args.model, args=config, train_dataset=Dataset.from_dict(data), **more)
    trainer.train()
    times = [after - before for before, after in zip(stamps, stamps[1:])]
    step = median(times[1:])
    return {"seconds": step, "pass": mean(times), "throughput/tokens_per_second": tokens / step}


def quiet(work, *arguments) -> dict:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        found = work(*arguments)
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())  # of this process, not of its parent
    return found | {"memory": int(peak[1]) * 1024 / 1e9}


def compare(script: str, flags: str, args, folder: str) -> None:
    """One of our scripts against one of TRL's trainers, each in a process of its own: time and memory."""
    from common.kl import context_length

    rows = rows_for(script, args, (16 if script == "ppo" else 8) * args.steps)
    data = Path(folder, "rows.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"tokens": args.tokens, "cache": args.tokens - 1, "half": min(1024, context_length(args.model) // 2)}
    flags = flags.format(**sizes, reward_model=f"{folder}/reward_model")
    flags += f" --model {args.model} --dataset {data} --eval-dataset {data} --eval-every 0 --eval-rows 1"
    flags += f" --dtype {args.dtype} --steps {args.steps} --lora-rank {args.lora_rank}"
    flags += f" --learning-rate {'3e-6' if script == 'ppo' else '1e-5'}"
    flags = shlex.split(flags + " --eval-samples 1" * (script != "reward_model"))
    if script == "ppo":  # a head that is new costs as much as a trained one
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype="float32")
        for part in (model, AutoTokenizer.from_pretrained(args.model)):
            part.save_pretrained(f"{folder}/reward_model")
    found = []
    for work in ((run_ours, script, flags), (run_theirs, script, flags, args, rows)):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found.append(pool.submit(quiet, *work).result())
    seconds = ("pass" if script in PARTS["preferences"] else "seconds", "seconds per step")
    timed = ("throughput/tokens_per_second", "tokens/s") if script == "sft" else seconds
    for name, unit in (timed, ("memory", "peak memory in GB")):
        ours, theirs = (one[name] for one in found)
        tell(f"`{script}.py`, {unit}", ours, f"`{PEERS[script]}`", theirs, higher=unit == "tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "common" / "tiny"))
    parser.add_argument("--data", help="JSONL with question and answer, such as GSM8K's; default: made-up problems")
    parser.add_argument("--pairs", help="JSONL with prompt (messages), chosen and rejected (text); default: made up")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per completion at most")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3, help="of the sampler")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=["sampler", "trainers", "preferences"])
    args = parser.parse_args()
    print(f"{args.model}, {args.dtype}\n| what | ours | peer | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            compare_samplers(args) if part == "sampler" else None
            for script, flags in PARTS[part].items():
                compare(script, flags, args, folder)


if __name__ == "__main__":
    main()
