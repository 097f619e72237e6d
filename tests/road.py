"""From the embedded base to more capable models, each stage on the model of one before: `python tests/road.py`.

`--recipe` chooses the stages: the whole road (the default), InstructGPT's, Tülu 3's, R1's. Prints a table of what each
model is worth on the 192 held-out questions: accuracy, style, length, and the KL to the base.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY = ROOT / "common" / "tiny"


class Stage(NamedTuple):
    """A script, the stage whose model it starts from, and its flags, in which {name} is the folder of a stage."""

    script: str
    start: str
    flags: str = ""


RECIPES = {  # stages are short, so that each leaves the next one something to show
    "road": {
        "sft": Stage("sft", "base", "--steps 8"),
        "reward_model": Stage("reward_model", "sft", "--epochs 0.6"),
        "ppo": Stage("ppo", "sft", "--reward-model {reward_model}/model --steps 15"),
        "dpo": Stage("dpo", "sft"),
        "grpo": Stage("grpo", "sft", "--steps 15"),
        "dapo": Stage("dapo", "grpo", "--steps 8"),
        "rlvr_math": Stage("rlvr_math", "dapo", "--steps 20"),
        "agentic": Stage("agentic", "rlvr_math", "--steps 20 --learning-rate 3e-4"),  # a higher rate breaks it
    },
    "instructgpt": {  # arXiv:2203.02155
        "sft": Stage("sft", "base", "--steps 8"),
        "reward_model": Stage("reward_model", "sft", "--epochs 0.6"),
        "ppo": Stage("ppo", "sft", "--reward-model {reward_model}/model --steps 15"),
    },
    "tulu3": {  # arXiv:2411.15124
        "sft": Stage("sft", "base", "--steps 8"),
        "dpo": Stage("dpo", "sft", "--loss dpo_norm --learning-rate 5e-5"),
        "rlvr": Stage("rlvr_math", "dpo", "--steps 20"),
    },
    "r1": {  # arXiv:2501.12948: a cold start, RL, its own right answers to imitate from the base on, RL again
        "cold start": Stage("sft", "base", "--steps 4"),
        "rl": Stage("grpo", "cold start", "--steps 15"),
        "rejection": Stage(
            "rlvr_math", "rl", "--algorithm expert_iteration --save-verified --steps 8 --learning-rate 0"
        ),
        "sft": Stage("sft", "base", "--dataset {rejection}/verified.jsonl --steps 16"),
        "rl again": Stage("grpo", "sft", "--steps 15"),
    },
}


def small(script: str) -> list[str]:
    """What the embedded model needs where a model is named, for then a script's defaults are a real model's."""
    module, flags = import_module(script), []
    for field in fields(module.Args):
        value = getattr(module.EMBEDDED, field.name)
        if value != getattr(module.Args(), field.name) and field.name not in ("model", "steps"):
            flags += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def run(script: str, model: str, flags: list[str], folder: Path) -> dict:
    """The last metrics of a script that starts from `model`."""
    command = [sys.executable, f"{script}.py", "--model", model, *small(script), "--eval-every", "0", *flags]
    done = subprocess.run([*command, "--output-dir", str(folder)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def measure(folder: str, seed: int, scratch: Path, with_tools: bool) -> dict[str, float]:
    """Over 4 samples at temperature 1 of each held-out question, and, on the whole road, of the tasks with tools."""
    import torch

    from common.generation import Sampler, is_correct
    from common.kl import completion_logprobs, load_model
    from common.tokenizer import encode_prompt, load_tokenizer, stop_token_ids

    model, base, tokenizer = load_model(folder, "cpu"), load_model(str(TINY), "cpu"), load_tokenizer(folder)
    sampler = Sampler(model, stop_token_ids(tokenizer, model))
    rows = [json.loads(line) for line in (TINY / "maths_test.jsonl").read_text().splitlines()]
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    greedy = sampler.generate(prompts, 64, temperature=0.0)
    right = [is_correct(tokenizer.decode(c.ids), row["answer"]) for row, (c,) in zip(rows, greedy)]
    groups = sampler.generate(prompts, 64, 4, seed=seed)
    samples = [(row, prompt, c.ids) for row, prompt, group in zip(rows, prompts, groups) for c in group]
    texts = [tokenizer.decode(ids) for *_, ids in samples]
    asked, answers = [prompt for _, prompt, _ in samples], [ids for *_, ids in samples]
    with torch.no_grad():
        ours, theirs = (completion_logprobs(m, range(len(samples)), asked, answers)[0] for m in (model, base))
    found = {
        "sampled accuracy": sum(is_correct(text, row["answer"]) for text, (row, *_) in zip(texts, samples)),
        "thinks": sum("</think>" in text for text in texts),
        "polite": sum("Gladly!" in text.rpartition("</think>")[2] for text in texts),
        "length": sum(map(len, answers)),
        "KL to the base": float((ours - theirs).sum()),
    }
    found = {"greedy accuracy": sum(right) / len(rows)} | {name: value / len(texts) for name, value in found.items()}
    if with_tools:
        flags = ["--steps", "0", "--eval-samples", "4", "--seed", str(seed)]
        found["tasks with tools"] = run("agentic", folder, flags, scratch)["eval/accuracy"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="road")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    began, stages = time.perf_counter(), RECIPES[args.recipe]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch, name) for name in stages}
        for name, stage in {"base": None, **stages}.items():
            model = str(TINY) if name == "base" else f"{folders[name]}/model"
            if stage:
                start = str(TINY) if stage.start == "base" else f"{folders[stage.start]}/model"
                flags = [part.format(**folders) for part in shlex.split(stage.flags)]
                run(stage.script, start, [*flags, "--seed", str(args.seed)], folders[name])
            if name in ("reward_model", "rejection"):
                continue  # they leave scores, and rows
            found = measure(model, args.seed, Path(scratch, f"measure {name}"), args.recipe == "road")
            if not stage:
                print("| after | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
            cells = [f"{value:.1f}" if key == "length" else f"{value:.2f}" for key, value in found.items()]
            title = f"{name}: {stage.script}.py, from {stage.start}" if stage else name
            print(f"| {title} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
