"""The settings of one script side by side, all else the same: `python tests/compare.py dpo` prints a table.

The table is markdown; each figure is a mean over the seeds of runs with defaults on the tiny model. `a → b → c` are the
evaluations of a run from its start to its end.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EVALUATED = {"eval/accuracy": "sampled accuracy", "eval/accuracy_greedy": "greedy accuracy"}


class Comparison(NamedTuple):
    """What is compared: the flags of every row, and the metrics that make the columns."""

    rows: dict[str, list[str]]
    columns: dict[str, str]


def one_more_each(first: str, common: list[str], changes: dict[str, tuple[list[str], list[str]]]):
    """Rows of which each switches one more change on. changes: flags that switch it off, and that switch it on."""
    titles = [first, *(f"+ {name}" for name in changes)]
    return {
        title: common + [flag for i, (off, on) in enumerate(changes.values()) for flag in (on if i < count else off)]
        for count, title in enumerate(titles)
    }


SEVERAL = ["--minibatches", "4"]  # updates a rollout: with one, all surrogates have the same gradient
COMPARISONS = {
    "dpo": Comparison(
        {f"`{loss}`": ["--loss", loss, "--eval-every", "0"]
         for loss in ("dpo", "cdpo", "rdpo", "ipo", "dpo_norm", "rpo", "simpo", "orpo", "kto")},
        {**EVALUATED, "eval/preference_accuracy": "held-out pairs", "eval/chosen_logprob": "log π of the chosen",
         "eval/completion_length": "length"},
    ),
    "grpo": Comparison(
        {
            "PPO's, per token": SEVERAL,
            "GSPO's, per completion": [*SEVERAL, "--surrogate", "gspo", "--clip-low", "3e-4", "--clip-high", "4e-4"],
            "CISPO's, detached": [*SEVERAL, "--surrogate", "cispo", "--aggregation", "token"],
            "distillation": ["--reference", "{teacher}", "--beta", "1", "--kl-estimator", "k2", "--reward-scale", "0"],
        },
        {**EVALUATED, "policy/kl": "KL", "policy/clip_fraction": "clipped", "completions/length_mean": "length"},
    ),
    "rlvr_math": Comparison(
        {f"`{name}`": ["--algorithm", name] for name in ("reinforce", "rloo", "grpo", "dr_grpo", "expert_iteration")},
        {**EVALUATED, "eval/maj@8": "maj@8", "eval/completion_length": "length"},
    ),
    "dapo": Comparison(
        # 40 tokens are so few that answers which work the steps out are often cut.
        one_more_each("GRPO", ["--max-completion-tokens", "40"], {
            "overlong filtering": (["--no-overlong-filtering"], ["--overlong-filtering"]),
            "clip-higher": (["--clip-high", "0.2"], ["--clip-high", "0.28"]),
            "soft overlong punishment": (["--overlong-cache", "0"], ["--overlong-cache", "8"]),
            "token-level loss": (["--aggregation", "sequence"], ["--aggregation", "token"]),
            "dynamic sampling": (["--no-dynamic-sampling"], ["--dynamic-sampling"]),
        }),
        {**EVALUATED, "policy/entropy": "entropy", "completions/truncated_fraction": "cut",
         "prompts/generated": "prompts generated", "prompts/trained": "prompts trained"},
    ),
}  # fmt: skip


def run(script: str, flags: list[str], seed: int) -> list[dict]:
    """The metrics of one run; `{teacher}` in the flags is the model that `python grpo.py` makes with the same seed."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [[]] * ("{teacher}" in flags) + [[flag.format(teacher=f"{folder}/0/model") for flag in flags]]
        for number, given in enumerate(runs):
            command = [sys.executable, str(ROOT / f"{script}.py"), *given, "--seed", str(seed)]
            command += ["--output-dir", f"{folder}/{number}"]
            alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # seeds side by side keep to a core each
            done = subprocess.run(command, capture_output=True, text=True, env=alone)
            if done.returncode:
                sys.exit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-1000:]}")
        return [json.loads(line) for line in (Path(folder) / str(number) / "metrics.jsonl").read_text().splitlines()]


def cell(runs: list[list[dict]], name: str) -> str:
    """Of an evaluated metric all evaluations, of a count its last value, of others the first and last third."""
    series = [[row[name] for row in rows if name in row] for rows in runs]
    if not all(series):
        return "–"
    if name.startswith("eval/"):
        return " → ".join(f"{statistics.mean(values):.2f}" for values in zip(*series))
    if name.startswith("prompts/"):
        return f"{statistics.mean(values[-1] for values in series):,.0f}"
    third = max(1, min(map(len, series)) // 3)
    first = statistics.mean(value for values in series for value in values[:third])
    last = statistics.mean(value for values in series for value in values[-third:])
    return f"{first:.3f} → {last:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("script", choices=COMPARISONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    rows, columns = COMPARISONS[args.script]
    print("| | " + " | ".join(columns.values()) + " |\n|" + "---|" * (len(columns) + 1))
    for title, flags in rows.items():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            runs = list(pool.map(lambda seed, flags=flags: run(args.script, flags, seed), args.seeds))
        print(f"| {title} | " + " | ".join(cell(runs, name) for name in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
