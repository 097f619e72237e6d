"""Nothing a run has produced is lost: killed at ten moments it ends the same, and a full disk takes nothing away."""

import json
import random
import shutil
import signal
import subprocess

import pytest
from conftest import fails, metrics, run, start, weights
from test_scripts import SHORT, same, timeless

STEPS = 5
PARTS = ["checkpoint", "training", "evaluation", "log"]  # all that a step goes through


def moments(script: str, counts: dict) -> list[tuple[str, int]]:
    """Ten moments to die at, drawn from a seed: `label` and the how many-th of them in that process. Each part of the
    script has its turn, every other time more than a step after the start, and twice the saving of the model."""
    draw, chosen = random.Random(script), []
    for k in range(8):
        labels = [m for m in counts if m.startswith(PARTS[k % 4]) and m != "training file"]  # those of the start
        label = draw.choice(labels)
        share = 1.2 + 0.4 * draw.random() if k in (0, 4, 7) else 0.8 * draw.random()
        chosen.append((label, max(1, round(share * counts[label] / STEPS))))
    return chosen + [("model file", draw.randint(1, counts["model file"])) for _ in range(2)]


def check_ten_kills(script, tmp_path):
    """Killed ten times and resumed, a run must end bit for bit as one that was left alone."""
    flags = [*SHORT[script], "--steps", STEPS, "--eval-every", 1, "--save-every", 1, "--eval-rows", 4]
    whole, killed, report = tmp_path / "run_to_kill_not", tmp_path / "run_to_kill", tmp_path / "moments.json"
    run(script, *flags, "--output-dir", whole, environment={"MOMENTS": str(report)})
    resumed = 0
    for label, number in moments(script, json.loads(report.read_text())):
        has_checkpoint = any((killed / "checkpoints").glob("step-*"))
        command = ["--resume", killed] if has_checkpoint else [*flags, "--output-dir", killed, "--overwrite"]
        status, told = start(script, *command, environment={"DIE_AT": f"{label}#{number}"}).finish(120)
        assert status == -signal.SIGKILL, f"{label} {number}: {told[-2000:]}"
        resumed += has_checkpoint
    assert resumed >= 5
    run(script, "--resume", killed)
    same(weights(whole), weights(killed))
    assert timeless(whole) == timeless(killed)
    assert (whole / "samples.jsonl").read_text() == (killed / "samples.jsonl").read_text()
    for path in (whole / "model").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (killed / path.relative_to(whole)).read_bytes(), path.name
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in killed.iterdir() if p.name[0] != ".")


@pytest.mark.parametrize("script", ["sft", "reward_model", "dpo", "ppo"])
def test_sft_detail_7_reward_model_detail_12_dpo_detail_10_ppo_detail_10_ten_kills(script, tmp_path):
    check_ten_kills(script, tmp_path)


@pytest.mark.parametrize("script", ["grpo", "dapo", "rlvr_math", "agentic"])
def test_grpo_detail_10_dapo_detail_10_rlvr_math_detail_10_agentic_detail_10_ten_kills(script, tmp_path):
    check_ten_kills(script, tmp_path)


class SmallDisk:
    """A file system of its own for `folder`, whose room can be set; where it may not be mounted, a limit on files."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.is_mounted = not subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode

    def leave(self, room: int | None) -> dict:
        """Leave so many bytes free, None for plenty. Returns keyword arguments for running a script on it."""
        if not self.is_mounted:
            return {"limit": room}
        size = shutil.disk_usage(self.folder).used + room if room else 10**9
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)
        return {}


@pytest.fixture()
def disk(tmp_path):
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    if disk.is_mounted:
        subprocess.run(["umount", disk.folder], check=True)


@pytest.mark.parametrize("script", SHORT)
def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(script, disk):
    folder = disk.folder / "run"
    run(script, *SHORT[script], "--steps", 1, "--output-dir", folder)
    longer = ["--resume", folder, "--steps", 2]
    before = {path: path.read_bytes() for path in (folder / "model").iterdir()}
    told = fails(script, *longer, **disk.leave(2_000_000))
    assert "checkpoint of step 2 could not be written" in told and "step-000001" in told.splitlines()[-1]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000001"]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "torn')  # as a kill in the middle of a write leaves it
    if disk.is_mounted:
        checkpoint = sum(path.stat().st_size for path in (folder / "checkpoints" / "step-000001").iterdir())
        assert "Writing failed" in fails(script, *longer, **disk.leave(4096))  # not a single row more
        assert "Writing failed" in fails(script, *longer, **disk.leave(checkpoint + 2_000_000))  # no model more
        assert {path: path.read_bytes() for path in (folder / "model").iterdir()} == before
    run(script, *longer, **disk.leave(None))
    assert [r["step"] for r in metrics(folder)] == [0, 1, 2]
    assert {path: path.read_bytes() for path in (folder / "model").iterdir()} != before
