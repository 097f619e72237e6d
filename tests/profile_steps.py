"""What a training step is spent on: `python tests/profile_steps.py --model SmolLM2-135M-Instruct`.

Of every script the third step is run under PyTorch's profiler; the table has the shares of matrix products, attention
and the optimizer in the time of the process. What is none of them is other operations, Python and waiting. `--verbose`
lists the largest of the others.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark import ROOT, pairs, problems, rows_for

KINDS = {  # parts of the names that PyTorch gives its operations on a CPU
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn_linear"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "optimizer": ("_fused_adamw",),
}
SAMPLED = ["--batch-size", 4, "--num-samples", 8]
LONG = ["--max-prompt-tokens", 1024, "--max-completion-tokens", 1024]
FLAGS = {
    "sft": ["--batch-size", 8, "--max-length", 512],
    "reward_model": ["--batch-size", 8, *LONG],
    "dpo": ["--batch-size", 8, *LONG],
    "ppo": [*SAMPLED, "--reward-model", "None"],
    "grpo": SAMPLED,
    "dapo": [*SAMPLED, "--minibatches", 2, "--no-dynamic-sampling", "--overlong-cache", 60],
    "rlvr_math": [*SAMPLED, "--beta", 0.05],
    "agentic": [*SAMPLED, "--tools", "calculator", "--max-trajectory-tokens", 384],
}


def profiled(script: str, flags: list[str]) -> dict:
    """Run a script in this process, four steps of it; seconds that the third spends on each operation."""
    import tyro
    from torch.profiler import ProfilerActivity, profile

    module = importlib.import_module(script)
    profiler, log, clock = profile(activities=[ProfilerActivity.CPU]), module.Run.log, {}

    def logged(run, step, *args, **kwargs):
        if step == 3:
            profiler.stop()
            clock["seconds"] = time.perf_counter() - clock["began"]
        log(run, step, *args, **kwargs)
        if step == 2:
            profiler.start()
            clock["began"] = time.perf_counter()

    module.Run.log = logged
    module.main(tyro.cli(module.Args, args=flags))
    times = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    return {"seconds": clock["seconds"], "operations": times}


def kind_of(operation: str) -> str:
    """To which of `KINDS` an operation belongs, or "others"."""
    return next((kind for kind, names in KINDS.items() if any(name in operation for name in names)), "others")


def tell(script: str, found: dict, verbose: bool) -> None:
    """A row of the table, and on request the largest operations beside."""
    spent = dict.fromkeys(KINDS, 0.0) | {"others": 0.0}
    for operation, seconds in found["operations"].items():
        spent[kind_of(operation)] += seconds
    known = [spent[kind] for kind in KINDS]
    cells = [f"{100 * share / found['seconds']:.0f} %" for share in [*known, sum(known), spent["others"]]]
    print(f"| `{script}.py` | {found['seconds']:.2f} | " + " | ".join(cells) + " |", flush=True)
    largest = sorted(found["operations"].items(), key=lambda item: -item[1])
    for operation, seconds in [item for item in largest if kind_of(item[0]) == "others"][: 12 * verbose]:
        print(f"      {100 * seconds / found['seconds']:5.1f} %  {operation}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "common" / "tiny"))
    parser.add_argument("--data", help="JSONL with question and answer, such as GSM8K's; default: made-up problems")
    parser.add_argument("--pairs", help="JSONL with prompt (messages), chosen and rejected (text); default: made up")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per completion at most")
    parser.add_argument("--only", nargs="+", choices=FLAGS, default=list(FLAGS))
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    columns = ["script", "seconds per step", *KINDS, "all three", "other operations"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for script in args.only:
        with tempfile.TemporaryDirectory() as folder:
            is_paired, data = script in ("reward_model", "dpo"), Path(folder) / "rows.jsonl"
            rows = rows_for(args.pairs, 64, pairs) if is_paired else rows_for(args.data, 64, problems)
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            flags = ["--model", args.model, "--dataset", data, "--eval-dataset", data, "--dtype", args.dtype]
            flags += ["--steps", 4, "--eval-every", 0, "--eval-rows", 1, "--learning-rate", "1e-5"]
            flags += ["--output-dir", folder + "/run", "--microbatch-tokens", 2048, *FLAGS[script]]
            flags += [] if script == "reward_model" else ["--eval-samples", 1]
            has_budget = "--max-completion-tokens" in flags or script == "sft"
            flags += [] if has_budget else ["--max-completion-tokens", args.tokens]
            command = [sys.executable, __file__, "--child", script, *map(str, flags)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{script} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        tell(script, json.loads(done.stdout.strip().splitlines()[-1]), args.verbose)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(profiled(sys.argv[2], sys.argv[3:])))
    else:
        main()
