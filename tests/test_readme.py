"""What the README says holds: its changes apply and run, its tables are made from the results, its pictures exist."""

import json
import re
import runpy
import shutil
import subprocess

import pytest
import reproduce
import torch
from conftest import ROOT, TINY, first_rows, metrics, run

README = (ROOT / "README.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
SMALL = ["--batch-size", 8, "--num-samples", 8, "--warmup-steps", 1, "--eval-every", 0, "--eval-samples", 1]


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """The scripts with the README's changes applied, as `git apply` does it."""
    folder = tmp_path_factory.mktemp("changed")
    for path in [*ROOT.glob("*.py"), ROOT / "common"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    for diff in DIFFS:  # line numbers may have moved, but not what stands there
        subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, text=True, check=True)
    return folder


def test_another_reward_and_another_advantage_run(changed, tmp_path):
    flags = [*SMALL, "--steps", 8, "--learning-rate", "1e-3", "--lr-schedule", "constant", "--eval-rows", 16]
    flags += ["--dataset", first_rows("maths_train.jsonl", 240), "--eval-dataset", TINY / "maths_test.jsonl"]
    run("grpo", *flags, "--output-dir", tmp_path, cwd=changed)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    polite = [[s["completion"].rpartition("</think>")[2].startswith("Gladly!") for s in samples if s["step"] == step]
              for step in (0, 8)]  # fmt: skip
    assert sum(polite[1]) > sum(polite[0]) + 3 and len(polite[0]) == 16
    assert json.loads((tmp_path / "args.json").read_text())["advantage"] == "maxrl"
    rewards = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    advantages = runpy.run_path(str(changed / "grpo.py"))["group_advantages"](rewards, "maxrl")  # (r − mean) / mean
    assert advantages.flatten().tolist() == pytest.approx([3, -1, -1, -1, 0, 0, 0, 0], abs=1e-3)


def test_another_environment_runs(changed, tmp_path):
    run("vault", *SMALL, "--steps", 2, "--eval-rows", 4, "--output-dir", tmp_path, cwd=changed)
    rows = metrics(tmp_path)
    assert max(row["reward/mean"] for row in rows[1:]) > 0.1 and rows[-1]["agent/error_rate"] < 0.2


def test_results_tables_are_made_from_the_files_and_meet_their_bars():
    assert f"<!-- made by tests/reproduce.py -->\n{reproduce.tables()}\n<!-- end -->" in README
    for name, recipe in reproduce.RECIPES.items():
        result = json.loads((reproduce.RESULTS / f"{name}.json").read_text())
        assert len(result["seeds"]) >= 3 and not reproduce.below(recipe.bars, result["seeds"])
        assert result["bars"] == recipe.bars and {"date", "commit", "machine", "versions"} <= result["about"].keys()
    seeds = {"1": {"after": {"eval/accuracy": 0.9}}, "2": {"after": {"eval/accuracy": float("nan")}}}
    assert reproduce.below({"eval/accuracy": 0.9}, seeds) == ["seed 2: eval/accuracy is nan, below 0.9"]
    assert reproduce.below({"eval/accuracy": 0.91}, seeds)[0] == "seed 1: eval/accuracy is 0.9, below 0.91"


@pytest.mark.parametrize("folder,least", [("", 12), ("tests/results", 8)])
def test_every_picture_and_file_that_a_readme_names_is_there(folder, least):
    assert README.count("\n") <= 260 and len(DIFFS) == 3
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", (ROOT / folder / "README.md").read_text())
    assert len(links) > least and all((ROOT / folder / link).exists() for link in links)
