"""The tables and curves of README.md and tests/results/README.md, a core for each run: `python tests/reproduce.py`.

It runs every script's defaults over the seeds (half an hour on two cores), writes tests/results/<name>.json (figures,
versions, machine, date, commit) and <name>.png (mean and range over the seeds), makes the README's tables from these
files, and ends with an error if a result lies below its bar. `--only grpo dapo` runs some; `--only` makes the tables.

`--only losses` (ablation, surrogates, algorithms, overoptimisation) prints settings side by side, all else the same:
means over the seeds, as `a → b → c` over the evaluations of a run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"


class Recipe(NamedTuple):
    """What a result is made of. Commands are run in turn, `{folder}` is that of the one before; the last one counts."""

    commands: list[str]
    curves: dict[str, str]  # metrics to draw, with their titles
    columns: dict[str, str]  # metrics of the README's table, with its headings
    bars: dict[str, float]  # what the last evaluation of every seed must reach


ANSWERS = {"eval/accuracy": "sampled accuracy", "eval/accuracy_greedy": "greedy accuracy",
           "eval/completion_length": "completion length"}  # fmt: skip
ROLLOUT = {"reward/mean": "reward", "completions/length_mean": "length", "policy/entropy": "entropy"}
TRAINED = {"loss/train": "loss", "preference/margin": "margin"}
SAMPLED = {"eval/accuracy": "sampled accuracy"}
RECIPES = {
    "sft": Recipe(["sft"], {"loss/train": "loss", "eval/loss": "held-out loss", **SAMPLED}, ANSWERS,
                  {"eval/accuracy": 0.93, "eval/accuracy_greedy": 0.96}),
    "dpo": Recipe(["dpo"], {**TRAINED, **SAMPLED}, ANSWERS, {"eval/accuracy": 0.7, "eval/accuracy_greedy": 0.85}),
    "ppo": Recipe(["reward_model", "ppo --reward-model {folder}/model"],
                  {"reward/mean": "proxy reward", "policy/kl_sequence": "KL", "value/explained_variance": "critic",
                   **SAMPLED}, ANSWERS, {"eval/accuracy": 0.86, "eval/accuracy_greedy": 0.94}),
    "grpo": Recipe(["grpo"], {**ROLLOUT, "policy/kl": "KL", **SAMPLED}, ANSWERS,
                   {"eval/accuracy": 0.92, "eval/accuracy_greedy": 0.96}),
    "dapo": Recipe(["dapo"], {**ROLLOUT, "prompts/rounds": "rounds", **SAMPLED}, ANSWERS,
                   {"eval/accuracy": 0.93, "eval/accuracy_greedy": 0.96}),
    "rlvr_math": Recipe(["rlvr_math"], {**ROLLOUT, **SAMPLED, "eval/maj@8": "maj@8"}, ANSWERS,
                        {"eval/accuracy": 0.92, "eval/accuracy_greedy": 0.96}),
    "agentic": Recipe(["agentic"], {"reward/mean": "reward", "agent/calls": "calls", "agent/error_rate": "errors",
                                    **SAMPLED}, ANSWERS, {"eval/accuracy": 0.93, "eval/accuracy_greedy": 0.9}),
    "reward_model": Recipe(["reward_model"], {**TRAINED, "eval/accuracy": "held-out pairs ranked right"},
                           {"eval/accuracy": "accuracy", "eval/margin": "margin"}, {"eval/accuracy": 0.88}),
    "reward_model_process": Recipe(
        ["reward_model --kind process --dataset common/tiny/steps_train.jsonl "
         "--eval-dataset common/tiny/steps_test.jsonl"],
        {"loss/train": "loss", "eval/accuracy": "steps judged right", "eval/first_error_accuracy": "first error found"},
        {"eval/accuracy": "steps judged right", "eval/first_error_accuracy": "first wrong step, or none, found"},
        {"eval/first_error_accuracy": 0.86},
    ),
}  # fmt: skip


TOLD = {  # which of a metric's values over a run
    "each": lambda values: values,
    "ends": lambda values: [values[0], values[-1]],
    "best": lambda values: [max(values)],
    "last": lambda values: values[-1:],
    "thirds": lambda values: [mean(part) for part in (values[: len(values) // 3], values[-(len(values) // 3) :])],
}
ACCURACY = {"sampled accuracy": "eval/accuracy each .2f", "greedy accuracy": "eval/accuracy_greedy each .2f"}
LENGTH = {"length": "eval/completion_length each .2f"}
STEPS = ("GRPO", "+ overlong filtering", "+ clip-higher", "+ soft overlong punishment", "+ token-level loss",
         "+ dynamic sampling")  # fmt: skip
OFF = ("--no-overlong-filtering", "--clip-high 0.2", "--overlong-cache 0", "--aggregation sequence",
       "--no-dynamic-sampling")  # fmt: skip
SEVERAL = "grpo --minibatches 4"  # updates a rollout: with one, all surrogates have the same gradient
FAR = ("ppo --steps 45 --learning-rate 3e-4 --lr-schedule constant --update-epochs 2 --eval-every 3 --eval-rows 96 "
       "--reward-model {folder}/model")  # fmt: skip
FEW = "reward_model --steps 15 --eval-every 0"  # a reward model that can be exploited
COMPARISONS = {  # rows: their titles and commands; columns: metric, which of its values, their format
    "losses": (
        {f"`{loss}`": [f"dpo --loss {loss} --eval-every 0"]
         for loss in ("dpo", "cdpo", "rdpo", "ipo", "dpo_norm", "rpo", "simpo", "orpo", "kto")},
        {**ACCURACY, "held-out pairs": "eval/preference_accuracy each .2f",
         "log π of the chosen": "eval/chosen_logprob each .2f", **LENGTH},
    ),
    "ablation": (  # 40 tokens are so few that answers which work the steps out are often cut
        {title: [f"dapo --max-completion-tokens 40 --overlong-filtering {' '.join(OFF[done:])}"]
         for done, title in enumerate(STEPS)},
        {**ACCURACY, "entropy": "policy/entropy thirds .3f", "cut": "completions/truncated_fraction thirds .3f",
         "prompts generated": "prompts/generated last ,.0f", "prompts trained": "prompts/trained last ,.0f"},
    ),
    "surrogates": (
        {"PPO's, per token": [SEVERAL],
         "GSPO's, per completion": [f"{SEVERAL} --surrogate gspo --clip-low 3e-4 --clip-high 4e-4"],
         "CISPO's, detached": [f"{SEVERAL} --surrogate cispo --aggregation token"],
         "distillation": ["grpo", "grpo --reference {folder}/model --beta 1 --kl-estimator k2 --reward-scale 0"]},
        {**ACCURACY, "KL": "policy/kl thirds .3f", "clipped": "policy/clip_fraction thirds .3f",
         "length": "completions/length_mean thirds .3f"},
    ),
    "algorithms": (
        {f"`{name}`": [f"rlvr_math --algorithm {name}"]
         for name in ("reinforce", "rloo", "grpo", "dr_grpo", "expert_iteration")},
        {**ACCURACY, "maj@8": "eval/maj@8 each .2f", **LENGTH},
    ),
    "overoptimisation": (
        {"no defence": [FEW, f"{FAR} --beta 0"],
         "KL, β 0.1": [FEW, f"{FAR} --beta 0.1 --kl-target None"],
         "KL, β 0.5": [FEW, f"{FAR} --beta 0.5 --kl-target None"],
         "worst of 4, KL, β 0.1": [f"{FEW} --ensemble-size 4",
                                   f"{FAR} --beta 0.1 --kl-target None --ensemble-score min"],
         "stop at 1.5 nats": [FEW, f"{FAR} --beta 0 --stop-kl 1.5"]},
        {"proxy": "eval/reward ends .2f", "best gold": "eval/accuracy best .2f",
         "gold at the end": "eval/accuracy last .2f", "KL at the end": "eval/kl last .1f"},
    ),
}  # fmt: skip


def run(script: str, flags: list, folder: Path) -> list[dict]:
    """The metrics of `python script.py flags`, which keeps to one core; it must succeed."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags), "--output-dir", str(folder)]
    alone = {"HF_HUB_OFFLINE": "1", **os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_all(commands: list[str], seed: int) -> tuple[list[dict], float]:
    """The metrics of the last of the commands, and the seconds that all took."""
    began, folder = time.perf_counter(), None
    with tempfile.TemporaryDirectory() as scratch:
        for number, command in enumerate(commands):
            script, *flags = command.format(folder=folder).split()
            folder = Path(scratch, str(number))
            rows = run(script, [*flags, "--seed", seed], folder)
    return rows, time.perf_counter() - began


def draw(path: Path, panels: dict[str, dict[str, list]], xlabel: str) -> None:
    """Lines of points (x, values) in panels: the mean of the values, and the range between lowest and highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(panels), 2.7), layout="tight")
    for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for label, points in lines.items():
            steps, values = zip(*points)
            axis.plot(steps, list(map(mean, values)), marker="o" if len(steps) < 17 else None, ms=3, label=label)
            axis.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.25)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=90)


# ---------------------------------------------------------------------------------------------- defaults


def described(name: str, seed: str = "1") -> str:
    """The commands as one types them; ppo.py finds the reward model by itself."""
    typed = " && ".join(f"python {command} --seed {seed}" for command in RECIPES[name].commands)
    return re.sub(r"python (\w+)", r"python \1.py", typed).replace(" --reward-model {folder}/model", "")


def about() -> dict:
    """With what, on what and when the figures were made."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    asked = ("rev-parse --short HEAD", "status --porcelain :(top,glob)*.py :(top)common")  # not the results
    commit, changed = (subprocess.run(["git", *words.split()], **how).stdout.strip() for words in asked)
    packages = {name: version(name) for name in ("torch", "transformers", "datasets")}
    return {
        "date": date.today().isoformat(),
        "commit": commit + (" with changes" if changed else ""),
        "machine": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **packages},
    }


def below(bars: dict[str, float], seeds: dict[str, dict]) -> list[str]:
    """A sentence for every result that lies below its bar."""
    return [
        f"seed {seed}: {metric} is {found['after'][metric]}, below {bar}"
        for seed, found in seeds.items() for metric, bar in bars.items() if not found["after"][metric] >= bar
    ]  # fmt: skip


def keep(name: str, seeds: dict[str, tuple[list[dict], float]]) -> list[str]:
    """Write the figures of a script's seeds, tell and draw them. Returns what lies below its bar."""
    kept, recipe = {}, RECIPES[name]
    for seed, (rows, seconds) in seeds.items():
        ends = (rows[0], rows[-1])
        before, after = ({name: round(row[name], 4) for name in row if name.startswith("eval/")} for row in ends)
        curves = {metric: [[row["step"], float(f"{row[metric]:.5g}")] for row in rows if metric in row]
                  for metric in recipe.curves}  # fmt: skip
        kept[seed] = {"seconds": round(seconds, 1), "before": before, "after": after, "curves": curves}
        told = ", ".join(f"{metric[5:]} {before[metric]} → {after[metric]}" for metric in recipe.columns)
        print(f"{described(name, seed)}: {told} ({seconds:.1f} s)", flush=True)
    result = {"about": about(), "command": described(name), "bars": recipe.bars, "seeds": kept}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    panels = {}
    for metric, title in recipe.curves.items():
        runs = [dict(found["curves"][metric]) for found in kept.values()]
        steps = sorted(set.intersection(*map(set, runs)))
        panels[title] = {"": [(step, [run[step] for run in runs]) for step in steps]}
    draw(RESULTS / f"{name}.png", panels, "step")
    return [f"{name}, {sentence}" for sentence in below(recipe.bars, kept)]


def spread(values: list[float], digits: int) -> str:
    """`0.41–0.44`, or one number where they agree."""
    low, high = (f"{value:.{digits}f}".replace("-", "−") for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def tables() -> str:
    """Markdown tables of the results on disk, before → after, each as its range over the seeds; and their origin."""
    found, made = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in RECIPES}, {}
    for name, result in found.items():
        columns, ((first, *others), seeds) = RECIPES[name].columns, (result["seeds"], result["seeds"].values())
        headings = ["command", *columns.values(), "at most, on one core"]
        lines = made.setdefault(str(headings), ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"])
        cells = [f"`{described(name, first)}`" + (f" ({', '.join(others)})" if others else "")]
        for metric in columns:
            digits = 1 if metric == "eval/completion_length" else 2
            both = ([seed[when][metric] for seed in seeds] for when in ("before", "after"))
            cells.append(" → ".join(spread(values, digits) for values in both))
        lines.append("| " + " | ".join([*cells, f"{max(seed['seconds'] for seed in seeds):.0f} s"]) + " |")
    origins = [result["about"] | result["about"]["versions"] for result in found.values()]
    forms = ("{date}", "{machine}", "torch {torch}, transformers {transformers}")
    dates, *others = (sorted({form.format(**origin) for origin in origins}) for form in forms)
    origin = f"Measured {' and '.join(dates)}: {'; '.join(chain(*others))}."
    return "\n\n".join([*map("\n".join, made.values()), origin])


# ---------------------------------------------------------------------------------------------- side by side


def compare(name: str, pending: dict[str, list]) -> None:
    """Print the row of every setting as soon as its runs have ended: means over the seeds."""
    columns, panels = COMPARISONS[name][1], {"proxy": {}, "gold": {}}
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for title, futures in pending.items():
        runs = [future.result()[0] for future in futures]
        means = {metric: list(map(mean, zip(*([row[metric] for row in rows if metric in row] for rows in runs))))
                 for metric in runs[0][-1]}  # fmt: skip
        told = [title]
        for metric, which, how in map(str.split, columns.values()):
            values = TOLD[which](means[metric]) if metric in means else []
            told.append(" → ".join(f"{value:{how}}" for value in values).replace("-", "−") or "–")
        print("| " + " | ".join(told) + " |", flush=True)
        if name == "overoptimisation":
            for panel, metric in zip(panels.values(), ("eval/reward", "eval/accuracy")):
                panel[title] = [(max(kl, 0.0) ** 0.5, [y]) for kl, y in zip(means["eval/kl"], means[metric])]
            draw(RESULTS / f"{name}.png", panels, "√KL to the start, in nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*RECIPES, *COMPARISONS], default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    pool, pending, failures, readme = ThreadPoolExecutor(os.cpu_count()), {}, [], ROOT / "README.md"
    for name in args.only:
        rows = {"": RECIPES[name].commands} if name in RECIPES else COMPARISONS[name][0]
        pending[name] = {title: [pool.submit(run_all, commands, seed) for seed in args.seeds]
                         for title, commands in rows.items()}  # fmt: skip
    try:
        for name, rows in pending.items():
            if name in COMPARISONS:
                compare(name, rows)
            else:
                failures += keep(name, {f"{seed}": future.result() for seed, future in zip(args.seeds, rows[""])})
    finally:
        pool.shutdown(cancel_futures=True)
    before, mark, rest = readme.read_text().partition("<!-- made by tests/reproduce.py -->\n")
    readme.write_text(before + mark + tables() + "\n<!-- end -->" + rest.partition("<!-- end -->")[2])
    if failures:
        sys.exit("Results below their bars:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
