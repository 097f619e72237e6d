"""The contract of the script with the older plumbing: they learn, resume exactly, agree over processes."""

import ast
import json
import re
import shutil
import signal
import time
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, TINY, first_rows, metrics, refuses, run, start, weights

import rlvr_math

SCRIPTS = [p.stem for p in ROOT.glob("*.py")]
REWRITTEN = {"sft", "reward_model", "ppo", "dpo", "grpo", "dapo", "agentic"}  # their contract stands in test_core.py
# Short runs of each script, deterministic on a CPU.
BRIEF = ["--steps", 4, "--eval-every", 0, "--eval-rows", 8]
FEW = {name: ["--dataset", first_rows(f"{name}_train.jsonl", 240), "--eval-dataset", TINY / f"{name}_test.jsonl"]
       for name in ("maths",)}  # fmt: skip
SAMPLED = [*BRIEF, *FEW["maths"], "--batch-size", 4, "--max-completion-tokens", 24]  # room for a guess at once
# For data whose groups do not differ, so that no batch could be filled, and no advantage would need a forward.
EASY = {"rlvr_math": ["--beta", 0.1]}
SHORT = {
    "rlvr_math": [*SAMPLED, "--num-samples", 4, "--eval-samples", 2],
}  # fmt: skip
# The same, and the settings of a script that take another path through its loop.
CASES = {script: (script, flags) for script, flags in SHORT.items()} | {
    "rlvr_math_experts": ("rlvr_math", [*SHORT["rlvr_math"], "--algorithm", "expert_iteration", "--save-verified"]),
    "rlvr_math_rloo": (
        "rlvr_math",
        [*SHORT["rlvr_math"], "--algorithm", "rloo", "--minibatches", 2, "--beta", 0.1, "--max-completion-tokens", 64],
    ),
}  # fmt: skip
TIMES = ("time/", "memory/", "throughput/")


def same(a: dict, b: dict, tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


# ---------------------------------------------------------------------------------------------- the files


def test_copies_between_scripts_are_identical():
    seen = {}
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "Args", "reward"):
                text, name = ast.get_source_segment(source, node), (script in REWRITTEN, node.name)
                assert seen.setdefault(name, text) == text, f"{node.name} of {script}.py differs from its copy"


def test_a_script_stands_alone():
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & set(SCRIPTS)


@pytest.mark.parametrize("script", SHORT)
def test_numbered_details_are_marked_in_the_code_and_tested(script):
    source = (ROOT / f"{script}.py").read_text()
    listed = [int(n) for n in re.findall(r"^ ?(\d+)\. ", ast.get_docstring(ast.parse(source)), re.MULTILINE)]
    marked = {int(n) for mark in re.findall(r"# .*\bdetails? (.*)", source) for n in re.findall(r"\d+", mark)}
    names = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    tested = {int(n) for name in re.findall(r"def (test_\w+)", names)
              for n in re.findall(rf"{script}_detail_(\d+)", name)}  # fmt: skip
    assert listed == list(range(1, len(listed) + 1)) and len(listed) > 5
    assert marked == set(listed) and tested == set(listed)


EVERYWHERE = """model dataset subset split eval_dataset output_dir resume overwrite seed steps learning_rate
    warmup_steps lr_schedule weight_decay max_grad_norm batch_size microbatch_tokens max_prompt_tokens
    max_completion_tokens dtype device gradient_checkpointing eval_every eval_rows save_every log_samples wandb_project
    trust_remote_code""".split()


def test_flags_of_the_contract_are_there_and_of_one_kind():
    modules = {"rlvr_math": rlvr_math}
    kinds = {name: {field.name: field.type for field in fields(module.Args)} for name, module in modules.items()}
    for flag in [*EVERYWHERE, "num_samples", "temperature"]:
        scripts = list(modules)
        assert [script for script in scripts if flag not in kinds[script]] == [], flag
        different = {kinds[script][flag] for script in scripts} - {"int | None"}  # steps may come from epochs
        assert len(different) == 1 or flag == "dataset", (flag, different)  # sft.py takes several


@pytest.mark.parametrize("script", SHORT)
def test_help_names_every_flag_and_is_quick(script):
    began = time.time()
    output = run(script, "--help", interpreter=True)
    assert time.time() - began < 15  # 6 seconds on a quiet machine; this one may be busy
    for flag in ("--model", "--dataset", "--output-dir", "--resume", "--microbatch-tokens", "--learning-rate"):
        assert flag in output


# ---------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("script", SHORT)
def test_output_folder_is_complete(script, tmp_path):
    run(script, *SHORT[script], "--output-dir", tmp_path)
    assert json.loads((tmp_path / "args.json").read_text())["script"] == script
    for name in ("metrics.jsonl", "samples.jsonl", "curves.png", "model/tokenizer.json", "model/config.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert list((tmp_path / "tensorboard").iterdir()) and list((tmp_path / "checkpoints").glob("step-*"))
    assert {"step", "prompt", "completion", "reward"} <= set(
        json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    )
    glossary = (ROOT / "README.md").read_text().partition("<summary>Every metric</summary>")[2].split("</details>")[0]
    known = {re.sub(r"@\w+", "@k", name) for row in metrics(tmp_path) for name in row if name != "step"}
    assert known <= set(re.findall(r"`([a-z]+/[a-z_@]+)`", glossary))
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [0]


def timeless(folder) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in metrics(folder)]


@pytest.mark.parametrize("case", CASES)
def test_any_split_is_the_same(case, tmp_path):
    script, flags = CASES[case]
    # After two steps of at most 1e-5: Adam divides tiny differences by tiny gradients, hence a tenth of that way.
    steps = [*flags, "--steps", 2, "--warmup-steps", 1, "--learning-rate", "1e-5"]
    run(script, *steps, "--output-dir", tmp_path / "one")
    run(script, *steps, "--microbatch-tokens", 60, "--output-dir", tmp_path / "small")
    run(script, *steps, "--output-dir", tmp_path / "two", processes=2)
    for other in ("small", "two"):
        same(weights(tmp_path / "one"), weights(tmp_path / other), 2e-6)
        for a, b in zip(timeless(tmp_path / "one"), timeless(tmp_path / other), strict=True):
            for name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=5e-6), name
    if case in SHORT:  # a checkpoint of two processes goes on in one, and one of one in two
        run(script, "--resume", tmp_path / "two", "--steps", 3)
        run(script, "--resume", tmp_path / "one", "--steps", 3, processes=2)
        assert metrics(tmp_path / "two")[-1]["step"] == metrics(tmp_path / "one")[-1]["step"] == 3
        same(weights(tmp_path / "one"), weights(tmp_path / "two"), 4e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case not in SHORT])  # those are in test_faults.py
def test_resume_after_kill_9_is_exact_with_other_settings(case, tmp_path):
    script, flags = CASES[case]
    run(script, *flags, "--output-dir", tmp_path / "whole")
    killed = tmp_path / "run_to_kill"  # in the middle of writing its last checkpoint
    flags = [*flags, "--save-every", 2, "--output-dir", killed]
    process = start(script, *flags, environment={"DIE_AT": "checkpoint file#12"})
    assert process.finish(200)[0] == -signal.SIGKILL
    assert list((killed / "checkpoints").glob("step-*")) and not (killed / "model").exists()
    run(script, "--resume", killed)
    same(weights(tmp_path / "whole"), weights(killed))
    assert timeless(tmp_path / "whole") == timeless(killed)
    if (tmp_path / "whole" / "verified.jsonl").exists():
        verified = (tmp_path / "whole" / "verified.jsonl").read_text()
        assert verified and verified == (killed / "verified.jsonl").read_text()


@pytest.mark.parametrize("script,number", [("rlvr_math", signal.SIGTERM)])
def test_signals_finish_the_step_and_say_how_to_resume(script, number, tmp_path):
    process = start(script, *SHORT[script], "--steps", 4000, "--output-dir", tmp_path)
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 3:
        time.sleep(0.05)
    process.send_signal(number)
    status, output = process.finish(60)
    assert status == 128 + number and f"python {script}.py --resume {tmp_path}" in output
    done = metrics(tmp_path)[-1]["step"]
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == [f"step-{done:06d}"]


@pytest.mark.parametrize("script", SHORT)
def test_gradient_checkpointing_and_bfloat16(script, tmp_path):
    steps = [*SHORT[script], "--steps", 1, "--warmup-steps", 1, "--learning-rate", "1e-5"]
    kinds = {"plain": [], "checkpointed": ["--gradient-checkpointing"], "bf16": ["--dtype", "bfloat16"]}
    for name, flags in kinds.items():
        run(script, *steps, *flags, "--output-dir", tmp_path / name)
    run(script, *steps, *kinds["bf16"], "--output-dir", tmp_path / "two", processes=2)
    rows = {name: metrics(tmp_path / name)[-1] for name in (*kinds, "two")}
    norm = {name: row["optim/grad_norm"] for name, row in rows.items()}
    assert norm["checkpointed"] == pytest.approx(norm["plain"], rel=1e-4)
    same(weights(tmp_path / "plain"), weights(tmp_path / "checkpointed"), 1e-7)  # after a step of 1e-5
    assert norm["bf16"] == pytest.approx(norm["plain"], rel=0.02)
    assert norm["two"] == pytest.approx(norm["bf16"], rel=5e-3)
    assert rows["bf16"].get("policy/sampler_gap", 0) < 2e-3  # logits that are bfloat16 themselves would give twice that
    assert weights(tmp_path / "bf16")["model.norm.weight"].dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- bad input


def write(path, text: str):
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


GOOD = '{"prompt": "1+1=?", "completion": "<answer>2</answer>", "answer": "2", "chosen": "2", "rejected": "3"}\n'


@pytest.mark.parametrize("script", SHORT)
@pytest.mark.parametrize("content,flags,sentence", [
    (GOOD + "{broken\n", [], "line 2: not JSON"),
    ("", [], "no rows in it"),
    ('{"q": 1, "z": 2}\n', [], "found q, z"),
    ('[1]\n', [], "expected a JSON object"),
    (GOOD, [], "too few to hold any out"),
    (GOOD * 20, ["--model", "no/such-model"], "no/such-model"),
    (GOOD * 20, ["--device", "cuda"], "no CUDA"),
    (GOOD * 20, ["--batch-size", "0"], "at least 1"),
    ("\udcff" + GOOD, [], "line 1: not JSON"),
    (GOOD.replace('"1+1=?"', "5") * 20, [], "row 1: conversations must be text or lists of messages"),
    (GOOD.replace('"1+1=?"', '[{"role": "user", "content": [{"type": "text"}]}]') * 20, [], "prompt is [{'role': 'us"),
    (GOOD.replace('"1+1=?"', '["hello"]') * 20, [], "prompt is ['hello']"),
])  # fmt: skip
def test_bad_data_and_settings_are_told_in_a_sentence(script, content, flags, sentence, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        flags, sentence = ["--batch-size", "0"], "at least 1"
    data = write(tmp_path / "data.jsonl", content)
    assert sentence in refuses(script, "--dataset", data, *flags, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("script", SHORT)
def test_missing_files_and_wrong_folders(script, tmp_path):
    assert "no such file" in refuses(script, "--dataset", tmp_path / "none.jsonl")
    assert "no run there" in refuses(script, "--resume", tmp_path)
    run(script, *SHORT[script], "--steps", 1, "--output-dir", tmp_path / "run")
    told = refuses(script, "--output-dir", tmp_path / "run")
    assert "--resume" in told and "--overwrite" in told
    assert "already done" in refuses(script, "--resume", tmp_path / "run")
    assert "--learning-rate cannot be changed" in refuses(script, "--resume", tmp_path / "run", "--learning-rate", "1")
    about = next((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))
    about.write_text(about.read_text().replace('"model": "', '"model": "x'))
    assert "another model" in refuses(script, "--resume", tmp_path / "run", "--steps", 2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "before its first checkpoint" in refuses(script, "--resume", tmp_path / "run", "--steps", 2)
    run(script, *SHORT[script], "--steps", 1, "--output-dir", tmp_path / "run", "--overwrite")


@pytest.mark.parametrize("script", SHORT)
def test_rows_that_the_chat_template_refuses_are_dropped(script, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    strict = "{% if messages and messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(strict + template.read_text())
    row = json.loads(GOOD)
    refused = [{**row, "prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}]
    refused += [{**row, "prompt": [{"role": "user", "content": None}]}, {**row, "prompt": []}]
    data = write(tmp_path / "d.jsonl", "".join(json.dumps(r) + "\n" for r in refused + [row] * 5))
    flags = [*SHORT[script], *EASY.get(script, []), "--model", tmp_path / "model", "--steps", 1]
    flags += ["--dataset", data, "--eval-dataset", data]
    output = run(script, *flags, "--output-dir", tmp_path / "run")
    assert "3 of 8 " in output or "3 rows dropped" in output


@pytest.mark.parametrize("script", ["rlvr_math"])
def test_prompts_that_are_all_too_long(script, tmp_path):
    flags = ["--dataset", write(tmp_path / "data.jsonl", GOOD * 20), "--max-prompt-tokens", 3]
    assert "--max-prompt-tokens" in refuses(script, *flags, "--output-dir", tmp_path / "run")


@pytest.mark.parametrize("module", [rlvr_math])
def test_unicode_line_separators_do_not_end_a_row(module, tmp_path):
    data = write(tmp_path / "d.jsonl", '{"question": "a\u2028b\x85c", "answer": "1"}\n' * 2)
    rows = module.load_rows(str(data), None, "train", (("question", "answer"),))
    assert [row["question"] for row in rows] == ["a\u2028b\x85c"] * 2


def test_held_out_rows_come_from_another_split_or_another_data_set(tmp_path, monkeypatch):
    columns, folder = (("prompt", "answer"),), tmp_path / "data"
    folder.mkdir()
    for name, answer in (("train", "1"), ("test", "2")):
        write(folder / f"{name}.jsonl", json.dumps({"prompt": "a", "answer": answer}) + "\n")
    args = rlvr_math.Args(dataset=str(folder), eval_dataset=str(folder), subset="default")
    with pytest.raises(SystemExit, match="--eval-split"):
        rlvr_math.load_held_out(args, str(folder), columns)
    args.eval_split = "test"
    assert [row["answer"] for row in rlvr_math.load_held_out(args, str(folder), columns)] == ["2"]
    asked = []
    monkeypatch.setattr(rlvr_math, "load_rows", lambda source, subset, split, columns: asked.append((subset, split)))
    rlvr_math.load_held_out(args, "another/one", columns)  # files and folders have no subsets: --subset is the other's
    args.dataset = "some/where"
    rlvr_math.load_held_out(args, "another/one", columns)
    args.eval_subset, args.eval_split = "hard", None
    rlvr_math.load_held_out(args, "another/one", columns)
    with pytest.raises(SystemExit, match="speak of --eval-dataset"):
        rlvr_math.hold_out([], rlvr_math.Args(eval_split="test"))
    assert asked == [("default", "test"), (None, "test"), ("hard", "train")]


@pytest.mark.parametrize("script", SHORT)
def test_a_loss_that_is_not_finite_stops_the_run(script, tmp_path, model, tokenizer):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = [*SHORT[script], *EASY.get(script, []), "--model", tmp_path / "model"]
    told = refuses(script, *flags, "--output-dir", tmp_path / "run")
    assert "diverged" in told and "none" in told.lower()
