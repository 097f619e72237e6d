"""Every script's defaults over several seeds, a core for each run: `python tests/reproduce.py` (half an hour on two).

For each it writes tests/results/<name>.json (the figures of every seed with versions, machine, date and commit) and
tests/results/<name>.png (mean and range over the seeds), makes the README's results tables from these files, and ends
with an error if a result lies below its bar. `--only grpo dapo` runs some, `--tables` makes the README's tables anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"


class Recipe(NamedTuple):
    """What a result is made of; `{seed}` stands for the seed, `{folder}` for that of the script before."""

    commands: list[tuple[str, str]]  # script and flags, run one after the other; the last one's metrics count
    curves: dict[str, str]  # metrics to draw, with their titles
    columns: dict[str, str]  # metrics of the README's table, with its headings
    bars: dict[str, float]  # what the last evaluation of every seed must reach


ACCURACY = {"eval/accuracy": "sampled accuracy", "eval/accuracy_greedy": "greedy accuracy"}
LENGTH = {"eval/completion_length": "completion length"}
PAIRS = {"eval/accuracy": "accuracy", "eval/margin": "margin"}
STEPS = {"eval/accuracy": "steps judged right", "eval/first_error_accuracy": "first wrong step, or none, found"}
ANSWERS = {**ACCURACY, **LENGTH}
ROLLOUT = {"reward/mean": "reward", "completions/length_mean": "length", "policy/entropy": "entropy"}

RECIPES = {
    "sft": Recipe(
        [("sft", "")],
        {"loss/train": "loss", "eval/loss": "held-out loss", "eval/accuracy": "sampled accuracy"},
        ANSWERS,
        {"eval/accuracy": 0.93, "eval/accuracy_greedy": 0.96},
    ),
    "reward_model": Recipe(
        [("reward_model", "")],
        {"loss/train": "loss", "preference/margin": "margin", "eval/accuracy": "held-out pairs ranked right"},
        PAIRS,
        {"eval/accuracy": 0.88},
    ),
    "reward_model_process": Recipe(
        [("reward_model", "--kind process --dataset common/tiny/steps_train.jsonl "
          "--eval-dataset common/tiny/steps_test.jsonl")],
        {"loss/train": "loss", "eval/accuracy": "steps judged right", "eval/first_error_accuracy": "first error found"},
        STEPS,
        {"eval/first_error_accuracy": 0.86},
    ),
    "ppo": Recipe(
        [("reward_model", ""), ("ppo", "--reward-model {folder}/model")],
        {"reward/mean": "proxy reward", "policy/kl_sequence": "KL", "value/explained_variance": "critic",
         "eval/accuracy": "sampled accuracy"},
        ANSWERS,
        {"eval/accuracy": 0.86, "eval/accuracy_greedy": 0.94},
    ),
    "dpo": Recipe(
        [("dpo", "")],
        {"loss/train": "loss", "preference/margin": "margin", "eval/accuracy": "sampled accuracy"},
        ANSWERS,
        {"eval/accuracy": 0.7, "eval/accuracy_greedy": 0.85},
    ),
    "grpo": Recipe([("grpo", "")], {**ROLLOUT, "policy/kl": "KL", "eval/accuracy": "sampled accuracy"}, ANSWERS,
                   {"eval/accuracy": 0.92, "eval/accuracy_greedy": 0.96}),
    "dapo": Recipe([("dapo", "")], {**ROLLOUT, "prompts/rounds": "rounds", "eval/accuracy": "sampled accuracy"},
                   ANSWERS, {"eval/accuracy": 0.93, "eval/accuracy_greedy": 0.96}),
    "rlvr_math": Recipe([("rlvr_math", "")], {**ROLLOUT, "eval/accuracy": "sampled accuracy", "eval/maj@8": "maj@8"},
                        ANSWERS, {"eval/accuracy": 0.92, "eval/accuracy_greedy": 0.96}),
    "agentic": Recipe(
        [("agentic", "")],
        {"reward/mean": "reward", "agent/calls": "calls", "agent/error_rate": "errors",
         "eval/accuracy": "sampled accuracy"},
        ANSWERS,
        {"eval/accuracy": 0.93, "eval/accuracy_greedy": 0.9},
    ),
}  # fmt: skip
TABLES = [  # rows that share a table have the same columns
    ["sft", "dpo", "ppo", "grpo", "dapo", "rlvr_math", "agentic"],
    ["reward_model"],
    ["reward_model_process"],
]


def described(name: str, seed: str = "1") -> str:
    """The command as one types it."""
    parts = []
    for script, flags in RECIPES[name].commands:
        flags = flags.replace("--reward-model {folder}/model", "").strip()  # where ppo.py looks by itself
        parts.append(f"python {script}.py {flags} --seed {seed}".replace("  ", " "))
    return " && ".join(parts)


def run_once(name: str, seed: int) -> dict:
    """Run the commands of a recipe. Returns seconds, first and last evaluation, and curves as [step, value] points."""
    recipe, folder, began = RECIPES[name], None, time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        for number, (script, flags) in enumerate(recipe.commands):
            flags = flags.format(folder=folder).split()
            folder = Path(scratch, str(number))
            command = [sys.executable, str(ROOT / f"{script}.py"), *flags, "--seed", str(seed)]
            alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # runs side by side keep to a core each
            done = subprocess.run(
                [*command, "--output-dir", str(folder)], capture_output=True, text=True, env=alone, cwd=ROOT
            )
            if done.returncode:
                sys.exit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-1000:]}")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    evaluated = [metric for metric in evaluations[0] if metric.startswith("eval/")]
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "before": {metric: round(evaluations[0][metric], 4) for metric in evaluated},
        "after": {metric: round(evaluations[-1][metric], 4) for metric in evaluated},
        "curves": {
            metric: [[row["step"], float(f"{row[metric]:.5g}")] for row in rows if metric in row]
            for metric in recipe.curves
        },
    }


def about() -> dict:
    """With what, on what and when the figures were made."""
    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else [platform.processor()]  # fmt: skip
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    code = [":(top,glob)*.py", ":(top)common"]  # the results themselves change, by this very command
    changed = subprocess.run([*git, "status", "--porcelain", *code], capture_output=True, text=True).stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers", "datasets")}
    return {
        "date": date.today().isoformat(),
        "commit": commit + (" with changes" if changed else ""),
        "machine": f"{cpu[0] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **packages},
    }


def below(bars: dict[str, float], seeds: dict[str, dict]) -> list[str]:
    """A sentence for every result that lies below its bar."""
    return [
        f"seed {seed}: {metric} is {found['after'][metric]}, below {bar}"
        for seed, found in seeds.items() for metric, bar in bars.items() if not found["after"][metric] >= bar
    ]  # fmt: skip


def draw(name: str, seeds: dict[str, dict]) -> None:
    """A panel for every curve: the mean over the seeds, and the range between the lowest and the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = RECIPES[name].curves
    figure, axes = pyplot.subplots(1, len(titles), figsize=(3.1 * len(titles), 2.7), squeeze=False)
    for axis, (metric, title) in zip(axes[0], titles.items()):
        runs = [dict(map(tuple, found["curves"][metric])) for found in seeds.values()]
        steps = sorted(set.intersection(*map(set, runs)))
        values = [[run[step] for run in runs] for step in steps]
        marker = "o" if len(steps) < 15 else None
        axis.plot(steps, list(map(statistics.mean, values)), marker=marker, ms=3)
        axis.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.25)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=90)
    pyplot.close(figure)


def draw_scaling(seeds: dict[str, dict]) -> None:
    """What more samples of rlvr_math.py's model are worth, before and after training: means over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 2.7), layout="tight")
    for axis, when in zip(figure.subplots(1, 2, sharey=True), ("before", "after")):
        found = [{f"eval/{kind}@1": seed[when]["eval/accuracy"] for kind in ("pass", "maj")} | seed[when]
                 for seed in seeds.values()]  # fmt: skip
        for kind in ("pass", "maj"):
            names = sorted((int(name.partition("@")[2]), name) for name in found[0] if name.startswith(f"eval/{kind}@"))
            axis.plot(*zip(*((k, statistics.mean(row[name] for row in found)) for k, name in names)), label=f"{kind}@k")
        axis.set(title=f"{when} training", xlabel="samples k")
        axis.legend()
    figure.savefig(RESULTS / "rlvr_math_scaling.png", dpi=90)


def spread(values: list[float], digits: int) -> str:
    """`0.41–0.44`, or one number where they agree."""
    low, high = (f"{value:.{digits}f}".replace("-", "−") for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def table(names: list[str]) -> str:
    """A markdown table of results on disk: before → after, each as its range over the seeds."""
    columns = RECIPES[names[0]].columns
    headings = ["command", *columns.values(), "at most, on one core"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for name in names:
        if not (RESULTS / f"{name}.json").exists():
            continue
        result = json.loads((RESULTS / f"{name}.json").read_text())
        first, *others = result["seeds"]
        cells = [f"`{described(name, first)}` ({', '.join(others)})" if others else f"`{described(name, first)}`"]
        for metric in columns:
            digits = 1 if metric == "eval/completion_length" else 2
            ends = ([found[end][metric] for found in result["seeds"].values()] for end in ("before", "after"))
            cells.append(" → ".join(spread(values, digits) for values in ends))
        cells.append(f"{max(found['seconds'] for found in result['seeds'].values()):.0f} s")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables() -> str:
    """All tables, with where their figures come from."""
    paths = [RESULTS / f"{name}.json" for name in RECIPES]
    abouts = [json.loads(path.read_text())["about"] for path in paths if path.exists()]
    dates = {a["date"] for a in abouts}
    machines = sorted({a["machine"] for a in abouts})
    versions = sorted({f"torch {a['versions']['torch']}, transformers {a['versions']['transformers']}" for a in abouts})
    origin = f"Measured {' and '.join(sorted(dates))}: {'; '.join(machines)}; {'; '.join(versions)}."
    return "\n\n".join([*map(table, TABLES), origin])


def write_tables() -> None:
    """Put the tables between their marks in the README."""
    readme = ROOT / "README.md"
    before, mark, rest = readme.read_text().partition("<!-- made by tests/reproduce.py -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not (mark and end):
        sys.exit(f"{readme}: the marks between which the tables stand are missing.")
    readme.write_text(before + mark + tables() + "\n" + end + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tables", action="store_true", help="run nothing")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    failures, names, origin = [], [] if args.tables else args.only, about()
    pool = ThreadPoolExecutor(os.cpu_count())
    pending = {(name, seed): pool.submit(run_once, name, seed) for name in names for seed in args.seeds}
    for name in names:
        try:
            seeds = {str(seed): pending[name, seed].result() for seed in args.seeds}
        except SystemExit:
            pool.shutdown(cancel_futures=True)
            raise
        for seed, found in seeds.items():
            before, after = found["before"], found["after"]
            told = ", ".join(f"{metric[5:]} {before[metric]} → {after[metric]}" for metric in RECIPES[name].columns)
            print(f"{described(name, seed)}: {told} ({found['seconds']} s)", flush=True)
        result = {"about": origin, "command": described(name), "bars": RECIPES[name].bars, "seeds": seeds}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(name, seeds)
        if name == "rlvr_math":
            draw_scaling(seeds)
        failures += [f"{name}, {sentence}" for sentence in below(RECIPES[name].bars, seeds)]
    write_tables()
    if failures:
        sys.exit("Results below their bars:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
