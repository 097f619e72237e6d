"""What this project does on a GPU, in one command: `python tests/gpu.py`, under five minutes on an H100.

Runs `pytest -m cuda`, then prints a table: the sampler against `model.generate` and against what reading all weights,
keys and values once a token takes; steps of sft.py and grpo.py with the share of the card's peak they use (MFU). Models
are random and shaped as SmolLM2-135M and Qwen2.5-0.5B: nothing is downloaded.
`python tests/gpu.py --device cpu --quick` rehearses it in under two minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from datetime import date
from importlib import import_module
from io import StringIO
from itertools import product
from pathlib import Path

import torch
import transformers
from benchmark import ROOT, rates, run_ours  # which also lets the next ones be found

from common import kl
from common.generation import Sampler
from common.tokenizer import TINY, load_tokenizer

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
SHAPES = {
    "0.5B": transformers.Qwen2Config(**dict(zip(SIZES, (151936, 896, 4864, 24, 14, 2, 8192, True)))),
    "135M": transformers.LlamaConfig(**dict(zip(SIZES, (49152, 576, 1536, 30, 9, 3, 8192, True)))),
    "tiny": transformers.AutoConfig.from_pretrained(TINY),
}
PEAKS = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12), "A100": (2.04e12, 312e12)}  # bytes, bfloat16 products a s
LIMIT = 240  # seconds behind the tests after which no measurement begins
BEGAN = time.perf_counter()


def build(shape: str, device, dtype=torch.float32):
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype).eval()


def measure_sampler(args, shape: str, rows: int) -> list[str]:
    prompt, new = (16, 16) if args.quick else (128, 256)
    config, prompts = SHAPES[shape], torch.randint(SHAPES[shape].vocab_size, (rows // 8, prompt)).tolist()
    model, plain = (build(shape, args.device, torch.bfloat16) for _ in range(2))
    kl.use_layout(model)
    sampler = Sampler(model, [-1], torch.bfloat16)  # nothing stops
    rates(sampler, plain, prompts, new, 2)  # captures the graphs
    ours, theirs = rates(sampler, plain, prompts, new, new // 4, seed=1)
    heads, dim = kl.heads_and_dim(config)
    read = 2 * model.num_parameters() + rows * (prompt + new / 2) * config.num_hidden_layers * 2 * heads * dim * 2
    bound = rows * args.bandwidth / read
    beside = f"1/{bound / ours:.1f} of the bandwidth's {bound:,.0f}; {len(sampler.slots.graphs)} graphs"
    return [f"sampler, {shape}, {rows} rows", f"{ours:,.0f}", f"{ours / theirs:.1f} × `model.generate`", beside]


def measure_training(args, script: str, shape: str) -> list[str]:
    """Medians over steps of the script itself on a random model, which neither evaluates nor saves."""
    length, batch, samples, budget = (128, 8, 4, 16) if args.quick else (1024, 64, 8, 256)
    module, config, words = import_module(script), SHAPES[shape], "ten and " * 400
    module.Run.save = module.Run.finish = lambda *others: None
    module.evaluate_answers = lambda *others: ({}, [])
    with tempfile.TemporaryDirectory() as folder:
        build(shape, args.device).save_pretrained(folder)
        load_tokenizer(str(TINY)).save_pretrained(folder)
        row, sizes = {"prompt": "or", "completion": words[: length - 20]}, f"--batch-size {batch} --max-length {length}"
        if script == "grpo":
            row, sizes = {"question": words[:100], "answer": "1"}, f"--batch-size {batch // 2} --num-samples {samples}"
            sizes += f" --max-completion-tokens {budget}"
        Path(folder, "rows.jsonl").write_text((json.dumps(row) + "\n") * 64)
        flags = f"--model {folder} --dataset {folder}/rows.jsonl --eval-dataset {folder}/rows.jsonl --eval-rows 1 "
        flags += f"--eval-every 0 --dtype bfloat16 --steps 4 --microbatch-tokens 16384 {sizes}"
        with redirect_stdout(StringIO()):
            found = run_ours(script, [*flags.split(), "--device", str(args.device)])
    if script == "sft":
        rate, passes, told = found["throughput/tokens_per_second"], 6, f"{found['time/step']:.2f} s a step"
    else:  # 8: the policy's forward and backward, and the reference's forward; a prompt's is shared by its samples
        drawn, trained, answer = (found[name] for name in ("time/sample", "time/train", "completions/length_mean"))
        rate, passes, length = batch // 2 * (100 + samples * answer) / trained, 8, 100 + answer
        told = f"{drawn:.2f} s of sampling + {trained:.2f} s a step"
    weights = build(shape, "meta").num_parameters() + config.num_hidden_layers * config.hidden_size * length
    share = f"{100 * rate * passes * weights / args.peak:.1f} % MFU"
    return [f"{script}.py, {shape}", f"{rate:,.0f}", told, share]


def tell(args, measure, *which) -> None:
    """One row of the table; what fails or comes too late says so and leaves the others their turn."""
    if is_cuda := args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        if time.perf_counter() - args.began > LIMIT:
            raise TimeoutError(f"{LIMIT} s are over")
        cells = measure(args, *which)
    except (Exception, SystemExit) as error:
        cells = [f"{measure.__name__} {which}", f"{type(error).__name__}: {kl.first_line(error)}", "", ""]
    peak = torch.cuda.max_memory_allocated() if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("| " + " | ".join([*cells, f"{peak / 1e9:.1f} GB"]) + " |", flush=True)
    gc.unfreeze()  # a run has frozen what it had loaded
    gc.collect()
    torch.cuda.empty_cache() if is_cuda else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--quick", action="store_true", help="the embedded model's shape, few rows and tokens")
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here; `--device cpu --quick` rehearses this on the CPU.")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    args.name = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    print(f"{date.today()}, {args.name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"commit {commit.stdout.strip() or 'unknown'}", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "tests/test_cuda.py"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "REHEARSE": "1"})  # which a GPU does not ask for
    args.began = time.perf_counter()
    card = next((part for part in PEAKS if part in args.name), "H100")
    args.bandwidth, args.peak = PEAKS[card]
    print(f"bounds are an {card}'s: {args.bandwidth / 1e12:.3g} TB/s and {args.peak / 1e12:.0f} TFLOP/s\n")
    print("| what | tokens/s | time | share of the bound | peak memory |\n" + "|---" * 5 + "|")
    shapes = ["tiny"] if args.quick else ["0.5B", "135M"]
    for shape, rows in product(shapes, (8, 16) if args.quick else (256, 64, 1024)):
        tell(args, measure_sampler, shape, rows)
    for shape, script in product(shapes, ("sft", "grpo")):
        tell(args, measure_training, script, shape)
    print(f"\n{time.perf_counter() - BEGAN:.0f} seconds in all")


if __name__ == "__main__":
    main()
