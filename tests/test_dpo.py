"""dpo.py: known answers, gradients, parity with TRL, its invariants, and what it says to bad input."""

import gc
import json
import math
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, first_rows, metrics, refuses, run

import dpo
from common.tokenizer import render_chat

PAIRS = ["--dataset", first_rows("preferences_train.jsonl", 240), "--eval-dataset", TINY / "preferences_test.jsonl"]
SHORT = [*PAIRS, "--steps", 6, "--eval-every", 0, "--eval-rows", 8, "--eval-samples", 1, "--batch-size", 8]
LOSSES = ["dpo", "cdpo", "rdpo", "ipo", "dpo_norm", "rpo", "simpo", "orpo", "kto"]


def t(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(value, expected, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(value).double(), t(*expected), atol=tolerance, rtol=0)


def same(a: dict, b: dict, tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0)


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(name: str, count: int) -> list[dict]:
    return [json.loads(line) for line in (TINY / name).read_text().splitlines()[:count]]


# ---------------------------------------------------------------------------------------------- known answers


def test_t18_dpo_detail_7_sums_and_means():
    delta = t(-10.0) - t(-11.0) - (t(-12.0) - t(-11.0))
    close(dpo.dpo_loss(delta, 0.1), [0.598139])
    close(dpo.cdpo_loss(delta, 0.1, 0.1), [0.618139])
    close(dpo.rdpo_loss(delta, 0.1, 0.1), [0.573139])
    close(dpo.ipo_loss(delta, 0.1), [9.0])
    close(dpo.ipo_loss(t(1 / 5 + 1 / 4), 0.1), [20.7025])
    close(dpo.dpo_norm_loss(t(1 / 5), t(-1 / 4), 5.0), [0.100207])
    close(dpo.dpo_loss(t(0.0), 0.1), [math.log(2)])
    # The same through what the script calls: which losses take sums and which means.
    logprobs, ratio, lengths = t(-10, -12), t(1, -1), t(5, 4)
    for loss, expected in (("dpo", 0.598139), ("ipo", 9.0), ("dpo_norm", 0.670900), ("rpo", 0.598139 + 2)):
        close(dpo.pair_losses(dpo.Args(loss=loss), 0.1, logprobs, ratio, lengths), [expected])


def test_t19_dpo_detail_8_simpo_and_orpo():
    close(dpo.simpo_loss(t(-2.0), t(-3.0), 2.0, 1.0), [0.313262])
    close(dpo.orpo_loss(t(-0.5), t(-1.0), 0.1), [0.532030])
    close(dpo.orpo_loss(t(-0.5), t(-1.0), 1.0) - 0.5, [math.log1p(math.exp(-0.974077))])
    x = torch.tensor([-1e-6, -1e-3, -0.69, -0.7, -30.0], requires_grad=True)
    expected = [math.log(-math.expm1(v)) for v in x.tolist()]
    close(dpo.log1mexp(x).detach(), expected, 2e-6)
    assert dpo.log1mexp(x).sum().backward() is None and x.grad.isfinite().all()
    certain = torch.zeros(1, requires_grad=True)  # a mean log-probability of exactly 0
    loss = dpo.orpo_loss(certain, torch.tensor([-80.0]), 1.0)
    loss.sum().backward()
    assert loss.isfinite().all() and certain.grad.isfinite().all()


def test_t20_kto():
    yes, no = torch.tensor([True]), torch.tensor([False])
    close(dpo.kto_loss(t(2.0), yes, 0.5, 0.1, 1, 1), [0.462570])
    close(dpo.kto_loss(t(1.0), no, 0.5, 0.1, 1, 1), [0.512497])
    close(dpo.kto_loss(t(0.0), no, 0.0, 0.1, 1, 1), [0.5])
    close(dpo.kto_loss(t(0.0), yes, 0.0, 0.1, 3, 1), [1.5])
    assert dpo.kto_baseline(t(-2.0, 1.0)) == 0 and dpo.kto_baseline(t(2.0, -1.0)) == 0.5


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_against_finite_differences(loss):
    torch.manual_seed(0)
    lengths = t(5, 4, 3, 7)
    ref = -torch.rand(4, dtype=torch.float64) * 5
    logprobs = (-torch.rand(4, dtype=torch.float64) * 5).requires_grad_()
    args, labels = dpo.Args(loss=loss, simpo_gamma=1.0), torch.tensor([True, False, False, True])

    def value(x):
        if loss == "kto":
            return dpo.kto_loss(x - ref, labels, 0.3, 0.1, 1.0, 1.3)
        return dpo.pair_losses(args, 0.7, x, x - ref, lengths)

    assert torch.autograd.gradcheck(value, logprobs)


# ---------------------------------------------------------------------------------------------- parity with TRL


@pytest.mark.parametrize("ours,theirs", [
    ("dpo", ["sigmoid"]), ("rdpo", ["robust"]), ("dpo_norm", ["sigmoid_norm"]), ("ipo", ["ipo"]),
    ("rpo", ["sigmoid", "sft"]),
])  # fmt: skip
def test_parity_with_trl_dpo_trainer(ours, theirs, tmp_path, tokenizer):
    """From rows to the number: TRL's batch and loss against ours, for a policy that has left its reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in read("preferences_train.jsonl", 40)]
    if ours == "rpo":  # TRL averages over the batch's tokens, we over each answer's: equal for one pair
        rows = rows[:1]
    config = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(rows), use_cpu=True, bf16=False, report_to="none",
        loss_type=theirs, loss_weights=[1.0] * len(theirs), beta=0.3, label_smoothing=0.1,
        max_length=None, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(str(TINY), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    reference = dpo.load_model(dpo.Args(), torch.device("cpu"))
    policy = dpo.load_model(dpo.Args(), torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        for mine, his in zip(policy.parameters(), trainer.model.parameters()):
            mine.add_(torch.randn_like(mine) * 0.01)
            his.copy_(mine)
    expected = trainer.compute_loss(trainer.model.eval(), batch).detach()
    examples = dpo.encode_rows(tokenizer, rows, "rows", 500, 128)
    cpu = torch.device("cpu")
    logprobs, lengths = dpo.completion_logprobs(policy, examples, cpu, False)
    ref_logprobs, _ = dpo.completion_logprobs(reference, examples, cpu, False)
    ratio = logprobs - ref_logprobs
    if ours == "ipo":  # TRL takes means per token
        ratio = ratio / lengths
    losses = dpo.pair_losses(dpo.Args(loss=ours), 0.3, logprobs, ratio, lengths)
    torch.testing.assert_close(losses.mean().detach(), expected, atol=2e-5, rtol=1e-4)


def test_parity_with_trl_orpo_and_simpo():
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    torch.manual_seed(0)
    chosen, rejected = -torch.rand(6) * 3, -torch.rand(6) * 3
    accelerator = SimpleNamespace(device="cpu")
    odds, *_ = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.3, accelerator=accelerator), chosen, rejected)
    torch.testing.assert_close(dpo.orpo_loss(chosen, rejected, 0.3), -chosen - odds)
    stub = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=0.5, beta=2.0, label_smoothing=0.0, accelerator=accelerator
    )
    expected, *_ = CPOTrainer.cpo_loss(stub, chosen, rejected)
    torch.testing.assert_close(dpo.simpo_loss(chosen, rejected, 2.0, 0.5), expected)
    stub.loss_type, stub.label_smoothing = "sigmoid", 0.1  # cDPO is CPO's smoothed loss of log-ratios
    expected, *_ = CPOTrainer.cpo_loss(stub, chosen, rejected)
    torch.testing.assert_close(dpo.cdpo_loss(chosen - rejected, 2.0, 0.1), expected)


def test_parity_with_trl_kto():
    """TRL's KTO loss on given log-probabilities: the model is a stub that returns them."""
    from collections import defaultdict

    from trl import KTOTrainer

    torch.manual_seed(0)
    new, mismatched = -torch.rand(4, 5), -torch.rand(4, 5)
    ref, ref_mismatched = -torch.rand(4) * 3, -torch.rand(4) * 3
    label = torch.tensor([True, False, True, False])
    ones, width = torch.ones(4, 6, dtype=torch.long), 5

    def model(input_ids, **_):
        values = mismatched if (input_ids == 2).all() else new
        return SimpleNamespace(log_probs=values, entropy=torch.zeros(4, width), mean_logits=torch.zeros(4, width),
                               mean_token_accuracy=torch.zeros(()), num_correct=torch.zeros(()))  # fmt: skip

    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, calculate_KL=True, precompute_ref_logps=True,
        aux_loss_enabled=False, loss_type="kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.3, _tp_size=1,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, use_kernel=False,
    )  # fmt: skip
    trainer._compute_kl_logps = lambda m, b: KTOTrainer._compute_kl_logps(trainer, m, b)
    batch = {
        "input_ids": ones, "attention_mask": ones, "completion_mask": ones, "KL_input_ids": ones * 2,
        "KL_attention_mask": ones, "KL_completion_mask": ones, "label": label, "ref_logps": ref,
        "ref_KL_logps": ref_mismatched,
    }  # fmt: skip
    expected = KTOTrainer._compute_loss(trainer, model, batch, False)
    baseline = dpo.kto_baseline(mismatched.sum(1) - ref_mismatched)
    ours = dpo.kto_loss(new.sum(1) - ref, label, baseline, 0.1, 1.0, 1.3)
    torch.testing.assert_close(ours.mean(), expected)


# ---------------------------------------------------------------------------------------------- details


def test_dpo_detail_1_one_prompt_trimmed_once(tokenizer):
    row = read("preferences_train.jsonl", 1)[0]
    example = dpo.encode_rows(tokenizer, [row], "rows", 500, 128)[0]
    trimmed = dpo.encode_rows(tokenizer, [row], "rows", 3, 128)[0]
    assert trimmed.prompt == example.prompt[-3:] and trimmed.completions == example.completions
    packed = dpo.pack_completions([example.prompt] * 2, example.completions)
    assert packed.ids.numel() == len(example.prompt) + sum(map(len, example.completions))


def test_dpo_detail_2_sums_over_the_answer_with_its_end_of_turn(tokenizer, model):
    row = read("preferences_train.jsonl", 1)[0]
    example = dpo.encode_rows(tokenizer, [row], "rows", 500, 128)[0]
    for ids, side in zip(example.completions, ("chosen", "rejected")):
        assert example.prompt + ids == render_chat(tokenizer, row["prompt"] + row[side]).ids
        assert ids[-1] == tokenizer.eos_token_id
    sums, lengths = dpo.completion_logprobs(model, [example], torch.device("cpu"), False)
    assert lengths.tolist() == [len(ids) for ids in example.completions]
    for total, ids in zip(sums.tolist(), example.completions):
        logits = model(torch.tensor([example.prompt + ids])).logits[0, :-1].log_softmax(-1)
        own = logits[range(len(example.prompt) - 1, len(logits)), ids].sum()
        assert total == pytest.approx(own.item(), abs=1e-4)


def test_dpo_detail_3_no_second_model_in_training(tmp_path, monkeypatch):
    alive, load, count = [], dpo.load_model, dpo.optimizer_step
    monkeypatch.setattr(dpo, "load_model", lambda *a: alive.append(weakref.ref(m := load(*a))) or m)

    def step(*a):
        gc.collect()
        assert sum(ref() is not None for ref in alive) == 1
        return count(*a)

    monkeypatch.setattr(dpo, "optimizer_step", step)
    small = {"steps": 1, "batch_size": 2, "eval_rows": 4, "eval_samples": 1, "dataset": str(PAIRS[1])}
    for loss, cached in (("dpo", 2), ("simpo", 0), ("orpo", 0)):
        alive.clear()
        folder = tmp_path / loss
        dpo.main(dpo.Args(loss=loss, **small, output_dir=str(folder)))
        values = [json.loads(path.read_text()) for path in folder.glob("reference/*.json")]
        assert sorted(map(len, values)) == [2, 4][:cached]  # the pairs that the run draws, and the held-out ones
        assert len(alive) == (1 if cached == 0 else 2)  # the second for the KL of the last evaluation only
    scored = []
    monkeypatch.setattr(dpo, "all_logprobs", lambda *a: scored.append(a) or [])
    one, args, cpu = [1, 2], dpo.Args(), torch.device("cpu")
    examples = [dpo.Example(one, [[3], [4]])]
    run_ = SimpleNamespace(folder=tmp_path / "cache", is_main=True)
    run_.folder.mkdir()
    for weights_, bfloat16 in (("a", False), ("a", False), ("b", False), ("a", True)):
        dpo.score_reference(run_, examples, weights_, args, lambda: None, (cpu, 0, 1, bfloat16))
    dpo.score_reference(run_, [dpo.Example(one, [[3], [5]])], "a", args, lambda: None, (cpu, 0, 1, False))
    assert len(scored) == 4  # the second was known


def test_dpo_detail_5_ties_are_wrong(tmp_path):
    run("dpo", *SHORT, "--steps", 1, "--eval-prompts", 3, "--output-dir", tmp_path)
    before, after = metrics(tmp_path)
    answered = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in answered] == [0, 0, 0, 1, 1, 1]
    assert before["eval/preference_accuracy"] == 0 and abs(after["loss/train"] - math.log(2)) < 1e-5
    assert before["eval/loss"] == pytest.approx(math.log(2)) and abs(before["eval/kl"]) < 1e-4


def test_dpo_detail_6_mismatches_are_of_other_prompts(tokenizer):
    examples = dpo.encode_rows(tokenizer, read("preferences_train.jsonl", 20), "rows", 500, 128)
    singles = dpo.split_pairs(examples, 1, "rows")
    assert len(singles) == 40 and sum(s.desirable for s in singles) == 20
    answers = {tuple(s.prompt): [x.completions[0] for x in singles if x.prompt == s.prompt] for s in singles}
    for single in singles:
        assert single.mismatch.prompt == single.prompt
        assert single.mismatch.completions[0] not in answers[tuple(single.prompt)]


def test_dpo_detail_9_best_and_worst_without_ties(tokenizer):
    from common.generation import Completion

    def sample(text, stopped=True):
        return Completion(tokenizer.encode(text, add_special_tokens=False), [-1.0], stopped)

    groups = [
        [sample("<answer>1</answer>"), sample("<answer>2</answer>")],
        [sample("<answer>1</answer>"), sample("<answer> 1</answer>")],  # both right: a tie
        [sample("<answer>1</answer>", stopped=False), sample("<answer>1</answer>.")],  # the first was cut
    ]
    sampler = SimpleNamespace(generate=lambda *a, **k: groups)
    questions = [{"ids": [5, i], "gold": "1", "row": {"prompt": "1"}} for i in range(3)]
    pairs, about = dpo.sample_pairs(sampler, tokenizer, questions, (None, None), dpo.Args(), 1, 0, 1)
    assert pairs == [([5, 0], groups[0][0].ids, groups[0][1].ids), ([5, 2], groups[2][1].ids, groups[2][0].ids)]
    assert about["preference/pairs"] == 2 and about["reward/mean"] == pytest.approx((1 + 2 + 1) / 6)


def test_a_judge_ranks_by_win_rate_in_both_orders():
    """Three samples; the judge prefers the longer one."""

    def judge(triples, numbers):
        assert numbers == [4, 4, 4]
        return [(0.9, 0.3) if len(a) > len(b) else (0.2, 0.8) for _, a, b in triples]

    rates, readings = dpo.win_rates(judge, ["q"], [["x", "xxx", "xx"]], [4])
    close(rates[0], [(0.2 + 0.2) / 2, (0.8 + 0.8) / 2, (0.8 + 0.2) / 2])
    assert len(readings) == 3


# ---------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("seed", [1, 2])
def test_dpo_learns_style_and_truth(seed, tmp_path):
    shorter = ["--epochs", 0.6, "--eval-every", 0, "--eval-samples", 2]
    output = run("dpo", "--seed", seed, *shorter, "--output-dir", tmp_path / "run")
    before, after = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    for name in ("eval/accuracy", "eval/style", "eval/accuracy_greedy"):
        assert after[name] >= before[name] + 0.12, name
    assert after["eval/preference_accuracy"] >= 0.75 and 0.1 < after["eval/kl"] < 5
    command = output.strip().splitlines()[-1].split("python rlvr_math.py ")[1].split()
    run("rlvr_math", *command, "--steps", 1, "--eval-rows", 8, "--output-dir", tmp_path / "next")


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_runs_and_moves_towards_the_chosen(loss, tmp_path):
    run("dpo", *SHORT, "--steps", 10, "--batch-size", 16, "--eval-rows", 64, "--loss", loss, "--output-dir", tmp_path)
    before, after = metrics(tmp_path)[0], metrics(tmp_path)[-1]
    assert after["eval/preference_margin"] > before["eval/preference_margin"]
    assert ("eval/kl" in after) == (loss not in ("simpo", "orpo")) == (tmp_path / "reference").exists()
    assert {"preference/chosen_reward", "preference/rejected_reward", "preference/chosen_logprob",
            "preference/rejected_logprob", "preference/margin", "preference/accuracy"} <= set(after)  # fmt: skip


def test_online_iterations_draw_from_the_policy(tmp_path):
    flags = [*PAIRS, "--iterations", 2, "--steps", 4, "--batch-size", 8, "--eval-rows", 8, "--eval-samples", 1]
    run("dpo", *flags, "--output-dir", tmp_path)
    rows = metrics(tmp_path)
    assert len(list((tmp_path / "pairs").iterdir())) == 1 and rows[1]["preference/pairs"] > 50
    drawn = json.loads((tmp_path / "pairs" / "0000.json").read_text())[0]
    assert all(chosen != rejected for _, chosen, rejected in drawn)


# ---------------------------------------------------------------------------------------------- data


def turn(role, content):
    return {"role": role, "content": content}


def test_forms_of_pairs_give_the_same_tokens(tokenizer):
    forms = [
        {"prompt": "1+1=?", "chosen": "2", "rejected": "3"},
        {"prompt": [turn("user", "1+1=?")], "chosen": [turn("assistant", "2")], "rejected": [turn("assistant", "3")]},
        {"chosen": [turn("user", "1+1=?"), turn("assistant", "2")],
         "rejected": [turn("user", "1+1=?"), turn("assistant", "3")]},
        {"prompt": "1+1=?", "chosen": [turn("user", "1+1=?"), turn("assistant", "2")],
         "rejected": [turn("user", "1+1=?"), turn("assistant", "3")]},
        {"chosen": "\n\nHuman: 1+1=?\n\nAssistant: 2", "rejected": "\n\nHuman: 1+1=?\n\nAssistant: 3"},
    ]  # fmt: skip
    encoded = [(e.prompt, e.completions) for e in dpo.encode_rows(tokenizer, forms, "rows", 50, 50)]
    assert len(encoded) == 5 and all(e == encoded[0] for e in encoded)


def test_odd_rows_are_dropped_counted_and_named(tokenizer, capsys):
    talk = [turn("user", "a"), turn("user", "b"), turn("assistant", "c"), turn("user", "d")]
    rows = [
        {"prompt": "q", "chosen": "x", "rejected": "x"},
        {"prompt": "q", "chosen": " ", "rejected": "y"},
        {
            "chosen": [turn("user", "a"), turn("assistant", "x")],
            "rejected": [turn("user", "b"), turn("assistant", "y")],
        },
        {"prompt": talk, "chosen": "x", "rejected": "y"},  # roles that do not alternate are fine for this template
        {"prompt": "q", "chosen": "x" * 60, "rejected": "y"},
        {"chosen": [turn("user", "a"), turn("user", "x")], "rejected": [turn("user", "a"), turn("user", "y")]},
    ]
    kept = dpo.encode_rows(tokenizer, rows, "rows.jsonl", 4, 10)
    told = capsys.readouterr().out
    assert len(kept) == 2 and len(kept[1].completions[0]) == 10 and "rows.jsonl: 4 rows dropped" in told
    for reason in ("1 for equal answers", "1 for an empty side", "1 for different prompts",
                   "1 prompts trimmed on the left to 4 tokens", "1 answers cut after 10", "2 rows kept"):  # fmt: skip
        assert reason in told
    tokenizer = dpo.load_tokenizer(str(TINY))
    tokenizer.chat_template = "{% if messages[0].content == 'b' %}{{ raise_exception('no') }}{% endif %}" + (
        tokenizer.chat_template
    )
    rows = [{"prompt": p, "chosen": "x", "rejected": "y"} for p in "ab"]
    assert len(dpo.encode_rows(tokenizer, rows, "rows", 50, 50)) == 1
    assert "refuses" in capsys.readouterr().out


PAIR = {"prompt": "1+1=?", "chosen": "2", "rejected": "3"}
YES, NO = ({"prompt": "1+1=?", "completion": "2", "label": label} for label in (True, False))


@pytest.mark.parametrize("rows,flags,sentence", [
    ([{"prompt": "q", "chosen": "x"}] * 20, [], "needs the columns"),
    ([{**PAIR, "rejected": "2"}] * 20, [], "no row is left"),
    ([YES] * 20, [], "needs the columns"),
    ([YES] * 20, ["--loss", "kto"], "needs both kinds"),
    ([NO] * 20, ["--loss", "kto"], "needs both kinds"),
    ([YES, NO] * 10, ["--loss", "kto"], "all prompts are the same"),
    ([{**YES, "label": 3}] * 20, ["--loss", "kto"], "label must be true or false"),
    ([{**YES, "label": "yes"}] * 20, ["--loss", "kto"], "label must be true or false"),
    ([PAIR] * 20, ["--loss", "kto", "--batch-size", "1"], "at least 2"),
    ([{"chosen": "a", "rejected": "b"}] * 20, [], "text without a prompt"),
    ([{"prompt": 5, "chosen": "a", "rejected": "b"}] * 20, [], "must be text or lists of messages"),
    ([PAIR] * 20, ["--label-smoothing", "0.5"], "--label-smoothing"),
    ([PAIR] * 20, ["--beta", "0"], "--beta"),
    ([PAIR] * 20, ["--reward-model", str(TINY)], "need --iterations"),
    ([PAIR] * 20, ["--iterations", "1", "--reward-model", str(TINY), "--judge", str(TINY)], "give one of them"),
    ([PAIR] * 20, ["--principles", "none.txt"], "name one with --judge"),
    ([PAIR] * 20, ["--iterations", "1", "--judge", "no/such-model"], "--judge no/such-model"),
    ([PAIR] * 20, ["--iterations", "1", "--reward-model", "no/such-model"], "--reward-model no/such-model"),
    ([PAIR] * 20, ["--iterations", "1"], "prompt + answer"),
    ([{**PAIR, "answer": "2"}] * 20, ["--iterations", "1", "--num-samples", "1"], "--num-samples 2"),
    ([{**PAIR, "answer": "2"}] * 20, ["--iterations", "1", "--reward-model", str(TINY)], "one label"),
    ([PAIR] * 20, ["--model", "no/such-model"], "no/such-model"),
    ([PAIR] * 20, ["--max-completion-tokens", "600"], "whole context"),
    ([PAIR], [], "too few to hold any out"),
])  # fmt: skip
def test_bad_data_and_settings_are_told_in_a_sentence(rows, flags, sentence, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", rows)
    import tyro

    flags = ["--dataset", str(data), "--output-dir", str(tmp_path / "run"), *flags]
    with pytest.raises(SystemExit) as error:
        dpo.main(tyro.cli(dpo.Args, args=flags))
    assert sentence in str(error.value) and not (tmp_path / "run" / "checkpoints").exists()


def test_unpaired_rows_and_a_reward_model(tmp_path, tokenizer):
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    rows = [{"prompt": f"{i}+1=?", "completion": f"<answer>{i + 1}</answer>", "label": i % 3 > 0} for i in range(60)]
    run("dpo", *SHORT, "--loss", "kto", "--dataset", write(tmp_path / "d.jsonl", rows), "--output-dir", tmp_path / "a")
    assert "preference/baseline" in metrics(tmp_path / "a")[-1]
    torch.manual_seed(0)
    Qwen3ForSequenceClassification(Qwen3Config.from_pretrained(TINY, num_labels=1)).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"{i}+1=?"} for i in range(40)])
    run("dpo", *SHORT, "--iterations", 1, "--reward-model", tmp_path / "rm", "--dataset", prompts, "--output-dir",
        tmp_path / "b")  # fmt: skip
    assert metrics(tmp_path / "b")[1]["preference/pairs"] > 20
    output = run("dpo", *SHORT, "--iterations", 1, "--judge", TINY, "--num-samples", 3, "--dataset", prompts,
                 "--output-dir", tmp_path / "c")  # fmt: skip
    assert metrics(tmp_path / "c")[1]["preference/pairs"] > 20 and "The judge labelled 120 of 120 pairs" in output
    broken = json.loads((tmp_path / "rm" / "config.json").read_text()) | {"architectures": ["Qwen3ForCausalLM"]}
    shutil.copytree(TINY, tmp_path / "lm")
    (tmp_path / "lm" / "config.json").write_text(json.dumps(broken))
    told = refuses("dpo", *SHORT, "--iterations", 1, "--reward-model", tmp_path / "lm", "--dataset", prompts)
    assert "no reward model, its weights lack score.weight" in told


def test_an_empty_prompt_is_ranked_as_what_it_is(tokenizer):
    questions = [{"row": {"prompt": "", "answer": "4"}, "gold": "4"}]
    groups = [[SimpleNamespace(ids=tokenizer.encode("<answer>4</answer>"), stopped=True)]]
    rewards, _ = dpo.rank_samples(tokenizer, questions, [0], groups, None, None, 0.0)
    assert rewards == [[1.0]]


def test_iterations_need_a_prompt_each(tmp_path):
    told = refuses("dpo", "--iterations", 99, "--dataset", first_rows("preferences_train.jsonl", 20),
                   "--eval-dataset", first_rows("preferences_train.jsonl", 20), "--output-dir", tmp_path)  # fmt: skip
    assert "--iterations 99" in told and "20 prompts" in told


def test_answers_that_are_lists_are_no_gold(tokenizer):
    row = {"prompt": "1+1=?", "chosen": "2", "rejected": "3", "answer": ["2", "two"]}
    assert dpo.encode_rows(tokenizer, [row], "rows", 99, 99)[0].gold is None
