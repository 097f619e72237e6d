"""What the README says holds: its changes apply and run, its tables are made from the results, its pictures exist."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import reproduce
from conftest import ROOT, TINY, first_rows, metrics, run

README = (ROOT / "README.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)


def changed_copy(number: int, folder):
    """The scripts with one of the README's changes applied, as `git apply` does it."""
    for path in [*ROOT.glob("*.py"), ROOT / "common"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    command = ["git", "apply", "-"]  # line numbers may have moved, but not what stands there
    done = subprocess.run(command, cwd=folder, input=DIFFS[number], text=True, capture_output=True)
    assert not done.returncode, done.stderr


SMALL = ["--batch-size", 8, "--num-samples", 8, "--eval-every", 0, "--eval-rows", 16, "--eval-samples", 1]


def test_another_reward_applies_and_runs(tmp_path):
    changed_copy(0, tmp_path)
    flags = [*SMALL, "--steps", 12, "--warmup-steps", 1, "--learning-rate", "6e-4", "--lr-schedule", "constant"]
    flags += ["--dataset", first_rows("maths_train.jsonl", 240), "--eval-dataset", TINY / "maths_test.jsonl"]
    run("grpo", *flags, "--output-dir", tmp_path / "run", cwd=tmp_path)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    polite = [[s["completion"].rpartition("</think>")[2].startswith("Gladly!") for s in samples if s["step"] == step]
              for step in (0, 12)]  # fmt: skip
    assert sum(polite[1]) > sum(polite[0]) + 3 and len(polite[0]) == 16


def test_another_advantage_applies_and_runs(tmp_path):
    changed_copy(1, tmp_path)
    probe = "import grpo, torch; print(grpo.group_advantages(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]), 'maxrl'))"
    printed = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, text=True, capture_output=True).stdout
    found = [float(number) for number in re.findall(r"-?\d+\.\d*", printed)]
    assert found == pytest.approx([3, -1, -1, -1, 0, 0, 0, 0], abs=1e-3)  # (r − mean) / mean
    run("grpo", *SMALL, "--steps", 2, "--output-dir", tmp_path / "run", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["advantage"] == "maxrl"


def test_another_environment_applies_and_runs(tmp_path):
    changed_copy(2, tmp_path)
    flags = [*SMALL, "--steps", 2, "--warmup-steps", 1]
    run("vault", *flags, "--output-dir", tmp_path / "run", cwd=tmp_path)
    rows = metrics(tmp_path / "run")
    assert max(row["reward/mean"] for row in rows[1:]) > 0.1 and rows[-1]["agent/error_rate"] < 0.2


def test_results_tables_are_made_from_the_files_and_meet_their_bars():
    assert f"<!-- made by tests/reproduce.py -->\n{reproduce.tables()}\n<!-- end -->" in README
    for name, recipe in reproduce.RECIPES.items():
        result = json.loads((reproduce.RESULTS / f"{name}.json").read_text())
        assert len(result["seeds"]) >= 3 and not reproduce.below(recipe.bars, result["seeds"])
        assert result["bars"] == recipe.bars and (reproduce.RESULTS / f"{name}.png").is_file()
        assert {"date", "commit", "machine", "versions"} <= result["about"].keys()


def test_a_result_below_its_bar_is_told():
    seeds = {"1": {"after": {"eval/accuracy": 0.9}}, "2": {"after": {"eval/accuracy": float("nan")}}}
    assert reproduce.below({"eval/accuracy": 0.9}, seeds) == ["seed 2: eval/accuracy is nan, below 0.9"]
    assert reproduce.below({"eval/accuracy": 0.91}, seeds)[0] == "seed 1: eval/accuracy is 0.9, below 0.91"


@pytest.mark.parametrize("folder,least", [("", 12), ("tests/results", 8)])
def test_every_picture_and_file_that_a_readme_names_is_there(folder, least):
    assert README.count("\n") <= 260 and len(DIFFS) == 3
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", (ROOT / folder / "README.md").read_text())
    assert len(links) > least and all((ROOT / folder / link).exists() for link in links)
