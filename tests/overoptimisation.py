"""Over-optimisation on purpose, and three defences: `python tests/overoptimisation.py` prints a table, draws a figure.

A reward model that has seen 15 batches likes worked answers, which at first are the right ones. Optimised without a
leash, ppo.py takes that liking where the reward model knows nothing: the proxy goes on rising while the answers become
nonsense (Gao et al., arXiv:2210.10760). Each defence is the same run with one thing changed; the ensemble is tried with
the small KL that it is published with (Coste et al., arXiv:2310.02743), beside that KL alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
UNDER_TRAINED = ["--steps", "15", "--eval-every", "0"]
FAR = ["--steps", "45", "--learning-rate", "3e-4", "--lr-schedule", "constant", "--update-epochs", "2"]
FAR += ["--eval-every", "3", "--eval-rows", "96"]
RUNS = {
    "no defence": ("single", ["--beta", "0"]),
    "KL, β 0.1": ("single", ["--beta", "0.1", "--kl-target", "None"]),
    "KL, β 0.5": ("single", ["--beta", "0.5", "--kl-target", "None"]),
    "worst of 4, KL, β 0.1": ("ensemble", ["--beta", "0.1", "--kl-target", "None", "--ensemble-score", "min"]),
    "stop at 1.5 nats": ("single", ["--beta", "0", "--stop-kl", "1.5"]),
}


def run(script: str, folder: Path, flags: list[str]) -> list[dict]:
    """Run a script and return what its evaluations found."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags, "--output-dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/accuracy" in row]


def draw(found: dict[str, list[dict]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for name, rows in found.items():
        distance = [max(row["eval/kl"], 0.0) ** 0.5 for row in rows]
        for axis, metric in zip(axes, ("eval/reward", "eval/accuracy")):
            axis.plot(distance, [row[metric] for row in rows], marker="o", ms=3, label=name)
    axes[0].set(ylabel="proxy: score of the reward model")
    axes[1].set(ylabel="gold: share right")
    for axis in axes:
        axis.set(xlabel="√KL to the start, of nats per completion")
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--figure", type=Path, default=ROOT / "tests" / "results" / "overoptimisation.png")
    args = parser.parse_args()
    seed, found = ["--seed", args.seed], {}
    print("| defence | proxy | best gold | gold at the end | KL at the end |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for kind, members in (("single", "1"), ("ensemble", "4")):
            run("reward_model", folder / kind, [*UNDER_TRAINED, "--ensemble-size", members, *seed])
        for name, (kind, flags) in RUNS.items():
            flags = [*FAR, *flags, "--reward-model", str(folder / kind / "model"), *seed]
            found[name] = rows = run("ppo", folder / name.replace(" ", "_"), flags)
            proxy, gold, kl = ([row[f"eval/{metric}"] for row in rows] for metric in ("reward", "accuracy", "kl"))
            cells = f"{proxy[0]:.2f} → {proxy[-1]:.2f} | {max(gold):.2f} | {gold[-1]:.2f} | {kl[-1]:.1f}"
            print(f"| {name} | {cells} |", flush=True)
            draw(found, args.figure)


if __name__ == "__main__":
    main()
