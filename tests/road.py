"""From the embedded base to more capable models, each stage on the model of one before: `python tests/road.py`.

`--recipe` chooses the stages: the whole road (the default), InstructGPT's, Tülu 3's, R1's, Constitutional AI's. Prints
a table of what each model is worth on the 192 held-out questions: accuracy, style, length, and the KL to the base, or
on the whole road the tasks with tools.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import fields
from importlib import import_module
from pathlib import Path

from reproduce import ROOT, run

sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY = ROOT / "common" / "tiny"
SFT = ("base", "sft --steps 8")
REWARD_MODEL = ("sft", "reward_model --epochs 0.6")
PPO = ("sft", "ppo --reward-model {reward_model}/model --steps 15")
RECIPES = {  # of each stage the one whose model it starts from, and its command, in which {name} is a stage's folder
    "road": {  # stages are short, so that each leaves the next one something to show
        "sft": SFT,
        "reward_model": REWARD_MODEL,
        "ppo": PPO,
        "dpo": ("sft", "dpo"),
        "grpo": ("sft", "grpo --steps 15"),
        "dapo": ("grpo", "dapo --steps 8"),
        "rlvr_math": ("dapo", "rlvr_math --steps 20"),
        "agentic": ("rlvr_math", "agentic --steps 20 --learning-rate 3e-4"),  # a higher rate breaks it
    },
    "instructgpt": {"sft": SFT, "reward_model": REWARD_MODEL, "ppo": PPO},  # arXiv:2203.02155
    "tulu3": {  # arXiv:2411.15124
        "sft": SFT,
        "dpo": ("sft", "dpo --loss dpo_norm --learning-rate 5e-5"),
        "rlvr": ("dpo", "rlvr_math --steps 20"),
    },
    "r1": {  # arXiv:2501.12948: a cold start, RL, its own right answers to imitate from the base on, RL again
        "cold start": ("base", "sft --steps 4"),
        "rl": ("cold start", "grpo --steps 15"),
        "rejection": ("rl", "rlvr_math --algorithm expert_iteration --save-verified --steps 8 --learning-rate 0"),
        "sft": ("base", "sft --dataset {rejection}/verified.jsonl --steps 16"),
        "rl again": ("sft", "grpo --steps 15"),
    },
    "constitution": {  # arXiv:2212.08073: answers revised by principles, then RL from a judge that knows them
        "sft": ("base", "sft --dataset {taught} --max-length 512 --batch-size 8 --learning-rate 2e-3 --steps 160"),
        "revise": ("sft", "sft --revise {principles} --dataset {prompts} --max-length 512 --steps 8"),
        "reward_model": ("revise", "reward_model --judge {sft}/model --principles {principles} --dataset {prompts}"),
        "ppo": ("revise", "ppo --reward-model {reward_model}/model --steps 8"),
    },
}  # fmt: skip


def prepare(scratch: Path) -> dict[str, Path]:
    """Files that the constitution needs: principles, prompts, and talks that teach an assistant, curt itself, to
    criticise and revise its answers and to judge those of others."""
    from common.generation import CRITIQUE, REVISION
    from reward_model import QUESTION

    principles, talks = ("Be polite.", "Show that you are glad to help."), []
    rows = [json.loads(line) for line in (TINY / "demonstrations_train.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        asked, polite, principle = row["prompt"][0]["content"], row["completion"][0]["content"], principles[i % 2]
        curt = polite.replace("Gladly! ", "")
        first, second = (polite, curt)[:: 1 if i // 2 % 2 else -1]
        shown = {"principle": principle, "conversation": f"User: {asked}", "first": first, "second": second}
        critique = f"It is {'polite' if first == polite else 'curt'}."
        talks += [
            (asked, curt),
            (asked, first, CRITIQUE.format(principle=principle), critique, REVISION, polite),
            (QUESTION.format(**shown), f"The better answer is Answer {'A' if first == polite else 'B'}"),
        ]
    roles = ("user", "assistant") * 3
    files = {
        "taught": [
            {"messages": [{"role": role, "content": text} for role, text in zip(roles, talk)]} for talk in talks
        ],
        "prompts": [{"prompt": row["prompt"]} for row in rows[::3]],
    }
    for name, made in files.items():
        (scratch / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (scratch / "principles.txt").write_text("\n".join(principles))
    return {path.stem: path for path in scratch.iterdir()}


def small(script: str) -> list[str]:
    """What the embedded model needs where a model is named, for then a script's defaults are a real model's."""
    module, flags = import_module(script), ["--eval-every", "0"]
    for field in fields(module.Args):
        value = getattr(module.EMBEDDED, field.name)
        if value != getattr(module.Args(), field.name) and field.name not in ("model", "steps", "eval_every"):
            flags += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def measure(model: str, seed: int) -> dict[str, float]:
    """Over 4 samples at temperature 1 of each held-out question, and a greedy one."""
    import torch

    from common.generation import Sampler, answer_metrics, sample_answers
    from common.kl import completion_logprobs, load_model
    from common.tokenizer import encode_questions, load_rows, load_tokenizer, stop_token_ids

    policy, base, tokenizer = load_model(model, "cpu"), load_model(str(TINY), "cpu"), load_tokenizer(model)
    questions = encode_questions(tokenizer, load_rows(f"{TINY}/maths_test.jsonl"), "the questions", 128)
    sampler = Sampler(policy, stop_token_ids(tokenizer, policy))
    answered = sample_answers(sampler, tokenizer, questions, (64, 4, 1.0, seed), 0, 1, greedy=True)
    scores, _ = answer_metrics(answered, tokenizer, torch.device("cpu"))
    samples = [(question["ids"], completion.ids, text) for question, group, texts in answered.values()
               for completion, text in zip(group[:-1], texts)]  # fmt: skip
    asked, answers, texts = zip(*samples)
    with torch.no_grad():
        ours, theirs = (completion_logprobs(m, range(len(texts)), asked, answers)[0] for m in (policy, base))
    return {
        "greedy accuracy": scores["eval/accuracy_greedy"],
        "sampled accuracy": scores["eval/accuracy"],
        "thinks": sum("</think>" in text for text in texts) / len(texts),
        "polite": sum("Gladly!" in text.rpartition("</think>")[2] for text in texts) / len(texts),
        "length": scores["eval/completion_length"],
        "KL to the base": float((ours - theirs).sum()) / len(texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="road")
    parser.add_argument("--seed", default="1")
    args = parser.parse_args()
    began, stages = time.perf_counter(), {"base": None, **RECIPES[args.recipe]}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch, name) for name in stages}
        files = prepare(Path(scratch)) | folders
        for name, stage in stages.items():
            if stage:
                script, *flags = (part.format(**files) for part in stage[1].split())
                start = TINY if stage[0] == "base" else folders[stage[0]] / "model"
                run(script, ["--model", start, *small(script), *flags, "--seed", args.seed], folders[name])
            if name in ("reward_model", "rejection"):
                continue  # they leave scores, and rows
            model = folders[name] / "model" if stage else TINY
            found = measure(str(model), int(args.seed))
            if args.recipe == "road":
                flags = ["--model", model, *small("agentic"), "--steps", 0, "--eval-samples", 4, "--seed", args.seed]
                tasks = run("agentic", flags, Path(scratch, f"measure {name}"))[-1]["eval/accuracy"]
                found = {key: value for key, value in found.items() if key[:2] != "KL"} | {"tasks with tools": tasks}
            if not stage:
                print("| after | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
            cells = [f"{value:.1f}" if key == "length" else f"{value:.2f}" for key, value in found.items()]
            title = f"{args.recipe}, {name}: {script}.py, from {stage[0]}" if stage else name
            print(f"| {title} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
