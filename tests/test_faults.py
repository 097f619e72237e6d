"""Nothing a run has produced is lost: killed at ten moments it ends the same, and a full disk takes nothing away."""

import json
import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run, start, weights
from test_scripts import SHORT, same, timeless

import rlvr_math

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


@pytest.mark.parametrize("script", ["rlvr_math"])
def test_rlvr_math_detail_10_ten_kills(script, tmp_path):
    check_ten_kills(script, tmp_path)


def test_overwriting_removes_the_sign_of_a_run_last(tmp_path, monkeypatch):
    """Else, killed half-way, the next start takes the rest for an empty folder, and --resume its old checkpoints."""
    for name in ("args.json", "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    for name in ("checkpoints", "tensorboard"):
        (tmp_path / name).mkdir()
    removed = []
    monkeypatch.setattr(rlvr_math.shutil, "rmtree", lambda path: removed.append(path.name))
    monkeypatch.setattr(Path, "unlink", lambda path: removed.append(path.name))
    monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: sys.exit("all is removed"))
    with pytest.raises(SystemExit, match="all is removed"):
        rlvr_math.Run(rlvr_math.Args(output_dir=str(tmp_path), overwrite=True), "rlvr_math", 0, {})
    assert len(removed) == 4 and removed[-1] == "args.json"


def test_a_model_with_a_part_that_no_text_passes_through_resumes(tmp_path, model):
    """As the vision tower of a model for texts and pictures: its moments are in no checkpoint."""

    def trained(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(torch.arange(8)[None]).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    model.vision_tower = torch.nn.Linear(4, 4)
    run = SimpleNamespace(folder=tmp_path, is_main=True, baseline={}, last={}, carried={}, args=rlvr_math.Args())
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("")
    rlvr_math.save_checkpoint(run, 3, model, trained(model))
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = torch.optim.AdamW(model.parameters())
    assert rlvr_math.load_checkpoint(run, model, optimizer, 5) == 3
    same(saved, model.state_dict())
    moments = optimizer.state[model.model.norm.weight]
    assert moments["step"] == 1 and moments["exp_avg"].abs().sum() > 0


def test_a_checkpoint_before_the_first_step_leaves_the_optimizer_unused(tmp_path, model):
    """As where all first rollouts have taught nothing: PyTorch makes a step to have moments that it can save."""
    run = SimpleNamespace(folder=tmp_path, is_main=True, baseline={}, last={}, carried={}, args=rlvr_math.Args())
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trained = []
    for kind in ("undisturbed", "saved", "resumed"):
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        if kind == "saved":
            rlvr_math.save_checkpoint(run, 3, model, optimizer)
        elif kind == "resumed":
            assert rlvr_math.load_checkpoint(run, model, optimizer, 5) == 3
        model(torch.arange(8)[None]).logits.logsumexp(-1).sum().backward()
        rlvr_math.optimizer_step(model, optimizer, 1.0, 1e-3)
        trained.append({name: value.clone() for name, value in model.state_dict().items()})
    assert any((trained[0][name] != start[name]).any() for name in start)
    same(trained[0], trained[1])
    same(trained[0], trained[2])


def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    (model(torch.arange(8)[None]).logits.sum() * float("inf")).backward()
    with pytest.raises(SystemExit, match="norm is (inf|nan)"):
        rlvr_math.optimizer_step(model, optimizer, 1.0, 1e-3)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_model_that_was_not_saved_after_its_last_checkpoint_is_missing(tmp_path):
    run, checkpoint = SimpleNamespace(folder=tmp_path), tmp_path / "step-000002"
    (tmp_path / "model").mkdir()
    checkpoint.mkdir()
    for model_time, is_there in ((10, False), (30, True)):
        os.utime(tmp_path / "model", (model_time, model_time))
        os.utime(checkpoint, (20, 20))
        assert rlvr_math.has_saved_model(run, checkpoint) == is_there
