"""Every loss of dpo.py from the same start: `python tests/compare_losses.py [--seed 1]` prints a table in markdown."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dpo  # noqa: E402

FLAGS = {"simpo": ["--learning-rate", "1e-4", "--epochs", "1"]}  # nothing holds it to the start, so it stops early
COLUMNS = {
    "eval/accuracy": "sampled accuracy",
    "eval/accuracy_greedy": "greedy accuracy",
    "eval/style": "polite",
    "eval/preference_accuracy": "held-out pairs",
    "eval/kl": "KL",
    "eval/completion_length": "length",
}


def main() -> None:
    print("| loss | " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for loss in get_args(get_type_hints(dpo.Args)["loss"]):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "dpo.py"), "--loss", loss, "--eval-every", "0"]
            subprocess.run(
                [*command, *FLAGS.get(loss, []), *sys.argv[1:], "--output-dir", folder],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        cells = [f"{rows[0][n]:.2f} → {rows[-1][n]:.2f}" if n in rows[0] else "–" for n in COLUMNS]
        print(f"| {loss} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
