"""The whole road from the embedded base to an agent, each stage on the model of the one before: `python tests/road.py`.

Prints a table of what each model is worth: gold accuracy on the held-out questions, sampled and greedy, how often it
thinks and how often it is polite, how long its completions are, and what it is worth as an agent with tools.
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
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import agentic  # noqa: E402
import dapo  # noqa: E402
import dpo  # noqa: E402
import grpo  # noqa: E402
import ppo  # noqa: E402
import reward_model  # noqa: E402
import rlvr_math  # noqa: E402
import sft  # noqa: E402


class Stage(NamedTuple):
    """A script, the stage whose model it starts from, and its flags, in which {name} is the model of a stage."""

    script: str
    start: str
    flags: str = ""


# What the embedded model needs where a model is named, for the scripts whose defaults are then a real model's.
SMALL = {
    script: " ".join(
        f"--{field.name.replace('_', '-')} {shlex.join(map(str, value if isinstance(value, tuple) else [value]))}"
        for field in fields(module.Args)
        if (value := getattr(module.EMBEDDED, field.name)) != getattr(module.Args(), field.name)
        and field.name not in ("model", "steps", "eval_every")
    )
    for script, module in (
        ("sft", sft),
        ("reward_model", reward_model),
        ("ppo", ppo),
        ("dpo", dpo),
        ("grpo", grpo),
        ("dapo", dapo),
        ("rlvr_math", rlvr_math),
        ("agentic", agentic),
    )  # fmt: skip
}
# Stages are short, so that each leaves the next one something to show.
ROAD = {
    "sft": Stage("sft", "base", f"--steps 8 {SMALL['sft']}"),
    "reward_model": Stage("reward_model", "sft", f"{SMALL['reward_model']} --epochs 0.6"),
    "ppo": Stage("ppo", "sft", f"{SMALL['ppo']} --reward-model {{reward_model}} --steps 15"),
    "dpo": Stage("dpo", "sft", SMALL["dpo"]),
    "grpo": Stage("grpo", "sft", f"--steps 15 {SMALL['grpo']}"),
    "dapo": Stage("dapo", "grpo", f"--steps 8 {SMALL['dapo']}"),
    "rlvr_math": Stage("rlvr_math", "dapo", f"--steps 20 {SMALL['rlvr_math']}"),
    # A higher learning rate breaks it.
    "agentic": Stage("agentic", "rlvr_math", f"{SMALL['agentic']} --steps 20 --learning-rate 3e-4"),
}


def measure(folder: str, seed: int) -> dict[str, float]:
    """Shares over 4 samples at temperature 1 of each of the 192 held-out questions, and of the 60 tasks with tools."""
    import torch

    from common.generation import Sampler, is_correct
    from common.kl import load_model
    from common.tokenizer import encode_prompt, load_tokenizer, stop_token_ids

    model, tokenizer = load_model(folder, torch.device("cpu")), load_tokenizer(folder)
    sampler = Sampler(model, stop_token_ids(tokenizer, model))
    rows = [json.loads(line) for line in (grpo.TINY / "maths_test.jsonl").read_text().splitlines()]
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]

    def written(count: int, temperature: float) -> list[tuple[dict, str, int]]:
        groups = sampler.generate(prompts, 64, count, temperature, seed)
        return [(row, tokenizer.decode(c.ids), len(c.ids)) for row, group in zip(rows, groups) for c in group]

    sampled, greedy = written(4, 1.0), written(1, 0.0)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "agentic.py", "--model", folder, *shlex.split(SMALL["agentic"]), "--steps", "0"]
        command += ["--eval-samples", "4", "--seed", str(seed), "--output-dir", scratch]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        (acted,) = [json.loads(line) for line in Path(scratch, "metrics.jsonl").read_text().splitlines()]
    return {
        "sampled accuracy": sum(is_correct(text, row["answer"]) for row, text, _ in sampled) / len(sampled),
        "greedy accuracy": sum(is_correct(text, row["answer"]) for row, text, _ in greedy) / len(greedy),
        "thinks": sum("</think>" in text for _, text, _ in sampled) / len(sampled),
        "polite": sum("Gladly!" in text.rpartition("</think>")[2] for _, text, _ in sampled) / len(sampled),
        "length": sum(length for *_, length in sampled) / len(sampled),
        "tasks with tools": acted["eval/accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output-dir", type=Path, help="keep the folders of the runs here; default: a temporary one")
    parser.add_argument("--only", nargs="+", choices=ROAD, default=list(ROAD))
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.output_dir or Path(scratch)
        models = {name: str(folder / name / "model") for name in ROAD} | {"base": str(ROOT / "common" / "tiny")}
        for name in ["base", *args.only]:
            if name != "base":
                stage = ROAD[name]
                command = [sys.executable, f"{stage.script}.py", "--model", models[stage.start]]
                command += [*shlex.split(stage.flags.format(**models)), "--seed", str(args.seed)]
                command += ["--eval-every", "0", "--output-dir", str(folder / name)]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
            if name == "reward_model":
                continue  # it answers nothing
            found = measure(models[name], args.seed)
            if name == "base":
                print("| after | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
            cells = [f"{value:.1f}" if key == "length" else f"{value:.2f}" for key, value in found.items()]
            title = name if name == "base" else f"{name}.py, from {ROAD[name].start}"
            print(f"| {title} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
