"""What several test files share: the embedded model, and running a script as a user would."""

import atexit
import importlib
import io
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections import Counter
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import MagicMock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side, so each keeps to one core

import pytest  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "common" / "tiny"
PATIENCE = 1500  # seconds for one run, of which a real model on a busy machine takes many
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests need no network, and must not wait for one


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


# Importing torch and transformers takes longer than most of the runs: a server imports them once, computes nothing,
# and forks a process for every run.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preload"])


def ensure_server() -> None:
    """Start the server, unless it runs, where it finds preload.py (it does not take over this process's path)."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests"), before]))
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


class Moments:
    """Counts what a run does, told apart by the part of the script that does it, and can kill it at any such moment.

    Moments are files opened for writing, moved or removed in the output folder, forwards, and decoding steps. With
    MOMENTS in the environment their counts are written to that file; with DIE_AT, `label#n` is the last one lived.
    """

    PARTS = {"save_checkpoint": "checkpoint", "save_model": "model", "save_reward_models": "model", "log": "log"}
    PARTS |= {"save": "checkpoint", "finish": "model"}

    def __init__(self, environment: dict):
        from common import generation, kl

        self.counts, self.report = Counter(), environment.get("MOMENTS")
        self.last = environment.get("DIE_AT")
        sys.addaudithook(self.audit)
        kl.hidden_states = self.noting("forward", kl.hidden_states)
        generation._Slots.decode = self.noting("token", generation._Slots.decode)

    def noting(self, kind: str, function):
        def wrapped(*args, **kwargs):
            self.note(kind)
            return function(*args, **kwargs)

        return wrapped

    def audit(self, event: str, args: tuple) -> None:
        is_written = event == "open" and isinstance(args[1], str) and args[1][0] in "wax"
        if (is_written or event in ("os.rename", "os.mkdir", "os.remove")) and "run_to_kill" in str(args[0]):
            self.note("file")

    def note(self, kind: str) -> None:
        frame, part = sys._getframe(), "training"
        while frame := frame.f_back:
            name = frame.f_code.co_name
            part = "evaluation" if name.startswith("evaluate") else self.PARTS.get(name, part)
        label = f"{part} {kind}"
        self.counts[label] += 1
        if f"{label}#{self.counts[label]}" == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self) -> None:
        if self.report:
            Path(self.report).write_text(json.dumps(self.counts))


def as_main(script: str, arguments: list[str], cwd: str, output: str, limit: int | None, environment: dict) -> None:
    """What `python script.py arguments` does, in a process that exists already; prints into the file `output`."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.chdir(cwd)
    sys.argv, sys.path[:0] = [f"{script}.py", *arguments], [cwd]
    moments = Moments(environment) if {"MOMENTS", "DIE_AT"} & environment.keys() else None
    code = 0
    try:
        runpy.run_path(f"{script}.py", run_name="__main__")
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if code and not isinstance(exit.code, int):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    if moments:
        moments.finish()
    atexit._run_exitfuncs()  # temporary folders are removed by these
    os._exit(code)


class Started:
    """A script that runs: its process, and what it has printed."""

    def __init__(self, script: str, arguments: list[str], cwd: Path, limit: int | None, environment: dict):
        self.output = tempfile.NamedTemporaryFile("r")
        ensure_server()
        target = (script, arguments, str(cwd), self.output.name, limit, environment)
        self.process = SERVER.Process(target=as_main, args=target)
        self.process.start()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def poll(self) -> int | None:
        return self.process.exitcode

    def finish(self, timeout: float) -> tuple[int, str]:
        """Its exit status and all that it printed."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.output.read()[-3000:]}"
        return self.process.exitcode, self.output.read()


def start(script: str, *args, cwd=ROOT, limit: int | None = None, environment: dict | None = None) -> Started:
    """Start a script; `limit` bounds the size in bytes of any file it writes, as a full disk does."""
    return Started(script, list(map(str, args)), cwd, limit, environment or {})


def start_several(script: str, count: int, *args, **kwargs) -> list[Started]:
    """The processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common["LOCAL_WORLD_SIZE"] = str(count)
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [start(script, *args, environment=rank, **kwargs) for rank in ranks]


def finished(
    script: str, args, processes: int = 1, interpreter: bool = False, torchrun: int = 0, cwd=ROOT, **kwargs
) -> tuple[int, str]:
    """Exit status and output of a script, run from a server in one process or several (the worst status, the first
    process's output), by torchrun, or by an interpreter of its own."""
    if processes > 1:
        group = start_several(script, processes, *args, cwd=cwd, **kwargs)
        deadline = time.time() + PATIENCE
        while any(process.poll() is None for process in group) and not any(process.poll() for process in group):
            assert time.time() < deadline, f"still running after {PATIENCE} s: {group[0].output.read()[-3000:]}"
            time.sleep(0.05)
        for process in group:  # where one has failed the others may wait for it for ever
            process.process.kill()
        done = [process.finish(PATIENCE) for process in group]
        broken = next((output for _, output in done[1:] if "Traceback" in output), "")
        return max((abs(status) for status, _ in done)), done[0][1] + broken
    if not (torchrun or interpreter):
        return start(script, *args, cwd=cwd, **kwargs).finish(PATIENCE)
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)]
    done = subprocess.run(
        [*launcher, f"{script}.py", *map(str, args)], cwd=cwd, text=True, timeout=PATIENCE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


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


def refuses(script: str, *args) -> str:
    """What a script says when it ends with a sentence, as `fails`, but in this process: for what it soon refuses."""
    module, said = importlib.import_module(script), io.StringIO()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended, redirect_stdout(said), redirect_stderr(said):
            module.main(tyro.cli(module.Args, args=list(map(str, args))))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code not in (0, None)
    return f"{said.getvalue()}{ended.value.code}\n"


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
