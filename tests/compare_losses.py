"""Every loss of dpo.py from the same start, data and optimizer: `python tests/compare_losses.py` prints a table.

The table is markdown; each figure is the mean over the seeds, before and after a run with defaults on the tiny model.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dpo  # noqa: E402

COLUMNS = {
    "eval/accuracy": "sampled accuracy",
    "eval/accuracy_greedy": "greedy accuracy",
    "eval/style": "polite",
    "eval/preference_accuracy": "held-out pairs",
    "eval/kl": "KL",
    "eval/completion_length": "length",
}


def before_and_after(loss: str, seed: int) -> tuple[dict, dict]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "dpo.py"), "--loss", loss, "--seed", str(seed), "--eval-every", "0"]
        subprocess.run([*command, "--output-dir", folder], check=True, capture_output=True)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        return rows[0], rows[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    seeds = parser.parse_args().seeds
    print("| loss | " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for loss in get_args(get_type_hints(dpo.Args)["loss"]):
        runs = [before_and_after(loss, seed) for seed in seeds]
        cells = []
        for name in COLUMNS:
            means = [statistics.mean(rows[i][name] for rows in runs) if name in runs[0][0] else None for i in (0, 1)]
            cells.append("–" if None in means else f"{means[0]:.2f} → {means[1]:.2f}")
        print(f"| `{loss}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
