"""What several test files share: the embedded model, and running a script as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "common" / "tiny"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests need no network, and must not wait for one


def pytest_collection_modifyitems(config, items):
    """Tests marked `real` are left out, not skipped, where no real model is named."""
    if not os.environ.get("REAL_MODEL"):
        real = [item for item in items if "real" in item.keywords]
        config.hook.pytest_deselected(items=real)
        items[:] = [item for item in items if item not in real]


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(str(TINY))


@pytest.fixture()
def model():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    model.set_attn_implementation("layout")
    return model


def start(script: str, *args, cwd=ROOT, torchrun: int = 0, **kwargs) -> subprocess.Popen:
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if torchrun else "2"}
    return subprocess.Popen(
        [*launcher, f"{script}.py", *map(str, args)], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs,
    )  # fmt: skip


def run(script: str, *args, **kwargs) -> str:
    """Run a script to its end and return what it printed; it must succeed."""
    process = start(script, *args, **kwargs)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return output


def fails(script: str, *args, **kwargs) -> str:
    """Run a script that must end with a sentence and no traceback; returns what it printed."""
    process = start(script, *args, **kwargs)
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0 and "Traceback" not in output, output[-3000:]
    return output


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model" / "model.safetensors")
