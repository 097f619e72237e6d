"""What this project does on a GPU, in one command: `python tests/gpu.py`, under five minutes on an H100.

Runs `pytest -m cuda`, then prints a table: the sampler against `model.generate` and against what reading all weights,
keys and values once a token takes; steps of sft.py and grpo.py with the share of the card's peak they use (MFU), also
with compiled decoder layers. Models are random and shaped as SmolLM2-135M and Qwen2.5-0.5B: nothing is downloaded.
`python tests/gpu.py --device cpu --quick` rehearses it in under two minutes.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from datetime import date
from itertools import product
from pathlib import Path
from statistics import median

import torch
import transformers
from benchmark import ROOT  # which also lets the next ones be found

import grpo
import sft
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
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the datasheets; others are measured
BEGAN = time.perf_counter()


def build(config, device, dtype=torch.float32, is_compiled: bool = False):
    torch.manual_seed(0)
    torch.compiler.reset()  # layers of another shape count as compiled before
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    kl.use_layout(model)
    for layer in model.base_model.layers if is_compiled else []:
        layer.compile()
    return model


def seconds(work) -> float:  # of work that waits for its results
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ceilings(args) -> tuple[float, float]:
    """Bytes a second of a copy, and operations a second of a product in bfloat16."""
    size = 1024 if args.quick else 8192
    a = torch.randn(size, size, device=args.device, dtype=torch.bfloat16)
    big, there = torch.ones(2, size**2 * 8, dtype=torch.uint8, device=args.device)
    works = [(lambda: there.copy_(big)[0].item(), 2 * big.nbytes), (lambda: (a @ a)[0, 0].item(), 2 * size**3)]
    copy, matrices = (amount / median(seconds(work) for _ in range(10)) for work, amount in works)
    return copy, next((peak for part, peak in PEAKS.items() if part in args.name), matrices)


def measure_sampler(args, shape: str, rows: int) -> list[str]:
    prompt, new = (16, 16) if args.quick else (128, 256)
    config, model = SHAPES[shape], build(SHAPES[shape], args.device, torch.bfloat16)
    prompts = torch.randint(config.vocab_size, (rows // 8, prompt)).tolist()
    sampler = Sampler(model, [-1], torch.bfloat16)  # nothing stops
    sampler.generate(prompts, new, 8)  # captures the graphs
    ours = rows * new / seconds(lambda: sampler.generate(prompts, new, 8, seed=1))
    graphs, sampler = len(sampler.slots.graphs), None  # its memory is free
    model.set_attn_implementation("sdpa")
    model.generation_config = transformers.GenerationConfig(do_sample=True, top_k=0, pad_token_id=0)
    few, ids = new // 4, torch.tensor(prompts, device=args.device)
    options = {"attention_mask": torch.ones_like(ids), "num_return_sequences": 8}
    model.generate(ids, max_new_tokens=2, **options)
    theirs = rows * few / seconds(lambda: model.generate(ids, max_new_tokens=few, **options).tolist())
    heads, dim = kl.heads_and_dim(config)
    read = 2 * model.num_parameters() + rows * (prompt + new / 2) * config.num_hidden_layers * 2 * heads * dim * 2
    bound = rows * args.bandwidth / read
    beside = f"1/{bound / ours:.1f} of the bandwidth's {bound:,.0f}; {graphs} graphs"
    return [f"sampler, {shape}, {rows} rows", f"{ours:,.0f}", f"{ours / theirs:.1f} × `model.generate`", beside]


def measure_training(args, script: str, shape: str, is_compiled: bool) -> list[str]:
    """Medians over three steps of the script itself, which loads a random model and neither evaluates nor saves."""
    module, config, logged = {"sft": sft, "grpo": grpo}[script], SHAPES[shape], []
    length, batch, samples, budget = (128, 8, 4, 16) if args.quick else (1024, 64, 8, 256)
    module.load_model = lambda path, device, *others, **more: build(config, device, is_compiled=is_compiled)
    module.frozen = lambda policy, device, *others: build(config, device)
    module.evaluate_answers = lambda *others, **more: ({}, [])
    module.Run.log = lambda run, step, metrics, samples=(): logged.append(metrics)
    module.Run.save = module.Run.finish = lambda *others: None
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        load_tokenizer(str(TINY)).save_pretrained(folder)
        data, words = f"{folder}/rows.jsonl", "ten and " * 400
        if script == "sft":
            texts = {"prompt": "or", "completion": words[: length - 20]}
            sizes = {"dataset": (data,), "batch_size": batch, "max_length": length}
        else:
            texts = {"question": words[:100], "answer": "1"}
            sizes = {"dataset": data, "batch_size": batch // 2, "num_samples": samples, "max_completion_tokens": budget}
        Path(data).write_text((json.dumps(texts) + "\n") * 64)
        common = {"model": folder, "eval_dataset": data, "eval_rows": 1, "dtype": "bfloat16", "steps": 4}
        common |= {"device": str(args.device), "output_dir": f"{folder}/run", "microbatch_tokens": 16384}
        with redirect_stdout(io.StringIO()):
            module.main(module.Args(**common, **sizes))
    found = {name: median(step[name] for step in logged[-3:]) for name in logged[1]}
    if script == "sft":
        rate, passes, told = found["throughput/tokens_per_second"], 6, f"{found['time/step']:.2f} s a step"
    else:  # 8: the policy's forward and backward, and the reference's forward; a prompt's is shared by its samples
        drawn, trained, answer = (found[name] for name in ("time/sample", "time/train", "completions/length_mean"))
        rate, passes, length = batch // 2 * (100 + samples * answer) / trained, 8, 100 + answer
        told = f"{drawn:.2f} s of sampling + {trained:.2f} s a step"
    weights = build(config, "meta").num_parameters() + config.num_hidden_layers * config.hidden_size * length
    title = f"{script}.py, {shape}{', compiled layers' * is_compiled}"
    return [title, f"{rate:,.0f}", told, f"{100 * rate * passes * weights / args.peak:.1f} % MFU"]


def tell(args, measure, *which) -> None:
    """One row of the table; what fails or comes too late says so and leaves the others their turn."""
    if is_cuda := args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        if time.perf_counter() - BEGAN > args.limit:
            raise TimeoutError(f"{args.limit} s are over")
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
    parser.add_argument("--limit", type=int, default=285, help="seconds after which no measurement begins")
    parser.add_argument("--only", nargs="+", default=["tests", "sampler", "training", "compiled"])
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no GPU here; `--device cpu --quick` rehearses this on the CPU.")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    args.name = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    print(f"{date.today()}, {args.name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"commit {commit.stdout.strip() or 'unknown'}", flush=True)
    if "tests" in args.only:
        command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "tests/test_cuda.py"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "REHEARSE": "1"})  # which a GPU does not ask for
    args.bandwidth, args.peak = ceilings(args)
    print(f"a copy moves {args.bandwidth / 1e12:.2f} TB/s; MFU is of {args.peak / 1e12:.2g} TFLOP/s\n")
    print("| what | tokens/s | time | share of the bound | peak memory |\n" + "|---" * 5 + "|")
    shapes = ["tiny"] if args.quick else ["0.5B", "135M"]
    for shape, rows in product(shapes, (8, 16) if args.quick else (256, 64, 1024)) if "sampler" in args.only else []:
        tell(args, measure_sampler, shape, rows)
    kinds = [part == "compiled" for part in ("training", "compiled") if part in args.only]
    for is_compiled, shape, script in product(kinds, shapes, ("sft", "grpo")):
        if not (args.quick and is_compiled and script == "grpo"):  # a compiler takes its time
            tell(args, measure_training, script, shape, is_compiled)
    print(f"\n{time.perf_counter() - BEGAN:.0f} seconds in all")


if __name__ == "__main__":
    main()
