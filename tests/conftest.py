"""What several test files share: the embedded model, and running a script as a user would."""

import atexit
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import weakref
from collections import Counter
from contextlib import nullcontext
from multiprocessing.connection import wait
from pathlib import Path
from unittest.mock import MagicMock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side, so each keeps to one core

import pytest  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "common" / "tiny"
PATIENCE = 1500  # seconds for one run, of which a real model on a busy machine takes many
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests need no network, and must not wait for one

# Importing torch and transformers takes longer than most of the runs: a server imports them once, computes nothing,
# and forks a process for every run.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preload"])
os.environ["PYTHONPATH"] = os.pathsep.join([f"{ROOT}/tests", os.environ.get("PYTHONPATH", "")])  # where preload.py is

# Drawing is a third of a short run: only the test of the picture does it.
SAVEFIG = Figure.savefig
Figure.savefig = lambda figure, path, **how: Path(path).write_bytes(b"a picture")


def pytest_collection_modifyitems(config, items):
    """Tests marked `real` are left out, not skipped, where no real model is named; those marked `cuda` unless asked."""
    wanted = {"real": os.environ.get("REAL_MODEL"), "cuda": "cuda" in config.option.markexpr}
    left_out = [item for item in items if any(mark in item.keywords for mark in wanted if not wanted[mark])]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def tokenizer():
    from common.tokenizer import load_tokenizer

    return load_tokenizer(str(TINY))


@pytest.fixture()
def model():
    from transformers import AutoModelForCausalLM

    from common.kl import use_layout

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    use_layout(model)
    return model


@pytest.fixture(params=["prompts shared", "prompts copied"])
def sharing(request, monkeypatch):
    """Run a test with prompts read once for all samples, and with prompts copied behind each of them."""
    from common import generation

    monkeypatch.setattr(generation, "SHARE_FROM", 0 if request.param == "prompts shared" else 2**60)


@pytest.fixture()
def graphs_on_a_cpu(monkeypatch):
    """The sampler as a GPU runs it, with CUDA's graphs played on a CPU. A capture computes nothing; a replay is a plain
    call at what was captured. Returns how many captures, replays and pools there were."""
    from common import generation

    counts, capturing = Counter(), []

    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            counts["replays"] += 1
            slots, visible, rows = self.captured
            slots.visible = visible
            advance(slots, rows)

    class Capture:
        capture_stream = MagicMock()

        def __init__(self, graph, pool):
            self.graph = graph
            counts["pools"] += pool is None

        def __enter__(self):
            counts["captures"] += 1
            capturing.append(self.graph)

        def __exit__(self, *error):
            capturing.pop()
            if counts["when the capture ends"]:
                raise RuntimeError("invalidated")

    def advance_or_capture(slots, rows):
        if capturing and counts["while it is captured"]:
            raise RuntimeError("operation not permitted")
        if capturing:
            capturing[0].captured = weakref.proxy(slots), slots.visible, rows
        else:
            advance(slots, rows)

    def init(sampler, *args, **kwargs):
        real_init(sampler, *args, **kwargs)
        sampler.uses_graphs = sampler.can_capture = True

    advance, real_init, mock = generation._Slots._advance, generation.Sampler.__init__, MagicMock()
    monkeypatch.setattr(generation._Slots, "_advance", advance_or_capture)
    monkeypatch.setattr(generation.Sampler, "__init__", init)
    played = {"CUDAGraph": Graph, "graph": Capture, "stream": nullcontext}
    for name, value in {**played, "current_stream": mock, "set_stream": mock, "set_sync_debug_mode": mock}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return counts


PARTS = {"log": "log", "save": "checkpoint", "finish": "model"}  # by the methods of Run


def die_at(moment: str) -> None:
    """Have SIGKILL end this process at its n-th moment of a kind in a part of the script: `part kind#n`.

    Kinds are files opened for writing, moved or removed in the output folder, forwards, and decoding steps.
    """
    from common import generation, kl

    (label, number), counts = moment.split("#"), Counter()

    def note(kind: str) -> None:
        frame, part = sys._getframe(), "training"
        while frame := frame.f_back:
            name = frame.f_code.co_name
            part = "evaluation" if name.startswith("evaluate") else PARTS.get(name, part)
        counts[f"{part} {kind}"] += 1
        if counts[label] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple) -> None:
        is_written = event == "open" and isinstance(args[1], str) and args[1][0] in "wax"
        if (is_written or event in ("os.rename", "os.mkdir", "os.remove")) and "run_to_kill" in str(args[0]):
            note("file")

    def noting(kind: str, function):
        return lambda *args, **kwargs: note(kind) or function(*args, **kwargs)

    sys.addaudithook(audit)
    kl.hidden_states = noting("forward", kl.hidden_states)
    generation._Slots.decode = noting("token", generation._Slots.decode)


def as_main(script: str, arguments: list[str], cwd: str, output: str, environment: dict) -> None:
    """What `python script.py arguments` does, in a process that exists already; prints into the file `output`."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))
    os.chdir(cwd)
    sys.argv, sys.path[:0] = [f"{script}.py", *arguments], [cwd]
    if "DIE_AT" in environment:
        die_at(environment["DIE_AT"])
    try:
        runpy.run_path(f"{script}.py", run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # temporary folders are removed by these


def finished(script: str, args, processes: int = 1, cwd=ROOT, environment: dict | None = None) -> tuple[int, str]:
    """Exit status and output of a script, in one process or in several as torchrun starts them: the first status that
    is not 0, and the output of the first process and of those that broke."""
    ranks = [environment or {}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    outputs = [tempfile.NamedTemporaryFile("r") for _ in ranks]
    group = []
    for output, rank in zip(outputs, ranks):
        arguments = (script, list(map(str, args)), str(cwd), output.name, rank)
        group.append(SERVER.Process(target=as_main, args=arguments))
        group[-1].start()
    while (running := [process for process in group if process.exitcode is None]) and not any(
        process.exitcode for process in group
    ):
        assert wait([process.sentinel for process in running], PATIENCE), f"still running: {outputs[0].read()[-3000:]}"
    for process in group:  # where one has failed the others may wait for it for ever
        process.kill()
        process.join()
    told = [output.read() for output in outputs]
    broken = next((output for output in told[1:] if "Traceback" in output), "")
    return next((process.exitcode for process in group if process.exitcode), 0), told[0] + broken


def run(script: str, *args, **kwargs) -> str:
    """Run a script to its end and return what it printed; it must succeed."""
    status, output = finished(script, args, **kwargs)
    assert status == 0, output[-3000:]
    return output


def fails(script: str, *args, **kwargs) -> str:
    """Run a script that must end with a sentence and no traceback; returns what it printed."""
    status, output = finished(script, args, **kwargs)
    assert status != 0 and "Traceback" not in output, output[-3000:]
    return output


SCRATCH = tempfile.TemporaryDirectory()


def first_rows(name: str, count: int) -> Path:
    """The first rows of an embedded data set as a file of their own, for runs that would spend seconds on all of it."""
    path = Path(SCRATCH.name) / f"{count}_{name}"
    path.write_text("".join(line + "\n" for line in (TINY / name).read_text().splitlines()[:count]))
    return path


def jsonl(path: Path, *rows) -> str:
    """A file of rows; texts are lines as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def timeless(folder) -> list[dict]:
    """Metrics that depend on nothing but the run's settings."""
    times = ("time/", "memory/", "throughput/")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in metrics(folder)]


def same(a: dict, b: dict, tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model" / "model.safetensors")
