"""dpo.py: known answers, parity with TRL, its numbered details, its data, and what is told of bad input."""

import json
import math
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import test_core
import torch
from conftest import TINY, first_rows, jsonl, metrics

import dpo
from common import kl
from common.generation import Completion
from common.tokenizer import encode_comparisons, encode_prompt, load_rows, load_tokenizer, render_chat, with_mismatches

CPU, MODEL = torch.device("cpu"), str(TINY)
ARGS = dpo.Args(simpo_gamma=1.0, undesirable_weight=1.3)
LOSSES = [*dpo.PAIR_LOSSES, "kto"]
FEW = str(first_rows("preferences_train.jsonl", 240))
same = torch.testing.assert_close
unasked = patch.object(dpo, "evaluate_answers", lambda *args: ({}, []))  # whose samples take half of the time
sampled_quick = partial(test_core.quick, "dpo", batch_size=4, warmup_steps=1, dataset=FEW)
quick = unasked(partial(sampled_quick, max_completion_tokens=24))


def t(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(value, *expected):
    same(value, t(*expected), atol=1e-6, rtol=0)


def read(count: int) -> list[dict]:
    return [json.loads(line) for line in first_rows("preferences_train.jsonl", count).read_text().splitlines()]


def encoded(tokenizer, rows: list[dict], folder, max_completion=100):
    lines = load_rows(jsonl(folder / "rows.jsonl", *rows))
    return encode_comparisons(tokenizer, lines, "rows", 100, max_completion)


def direct_logprob(model, example: dict, k: int) -> float:
    """Of answer k, summed over its tokens, by the model's own logits of this text alone."""
    prompt, ids = example["ids"], example["completions"][k]
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logprobs[range(len(ids)), ids].sum())


def watch(monkeypatch, module, *names) -> list[list]:
    """For each of these functions, a list of the arguments, by place and by name, and the result of every call."""

    def noting(real, calls: list):
        return lambda *args, **named: calls.append((args, named, real(*args, **named))) or calls[-1][2]

    watched = {name: [] for name in names}
    for name, calls in watched.items():
        monkeypatch.setattr(module, name, noting(getattr(module, name), calls))
    return list(watched.values())


def check_references(forwards: list, rewarded: list) -> None:
    """The reference is the model that training began with, and the policy has left it."""
    model, ratios = dpo.load_model(MODEL, CPU), [args[3] for args, *_ in rewarded if args[3].requires_grad]
    for ((_, examples, *_), _, (logprobs, _)), ratio in zip(forwards, ratios, strict=True):
        expected = torch.tensor([[direct_logprob(model, one, k) for k in (-2, -1)] for one in examples])
        same(logprobs - ratio, expected, atol=1e-4, rtol=0)
    assert ratios[-1].abs().max() > 0.1


def test_t18_t19_t20_dpo_detail_7_losses_of_sums_and_of_means():
    logprobs, ratio, lengths = t([-10, -12]), t([1, -1]), t([5, 4])
    for loss, beta, value in (
        ("dpo", 0.1, 0.598139), ("cdpo", 0.1, 0.618139), ("rdpo", 0.1, 0.573139), ("ipo", 0.1, 9),
        ("dpo_norm", 5.0, 0.100207), ("rpo", 0.1, 2.598139), ("simpo", 2.0, 0.313262),
    ):  # fmt: skip
        close(dpo.PAIR_LOSSES[loss](logprobs, ratio, lengths, beta, ARGS), value)
    close(dpo.ipo_loss(None, ratio / lengths, None, 0.1, ARGS), 20.7025)
    close(dpo.dpo_loss(None, t([7, 7]), None, 0.1, ARGS), math.log(2))
    close(dpo.orpo_loss(t([-2.5, -4]), None, lengths, 0.1, ARGS), 0.532030)
    close(dpo.orpo_loss(t([-2.5, -4]), None, lengths, 1.0, ARGS), 0.5 + math.log1p(math.exp(-0.974077)))
    weighted = replace(ARGS, desirable_weight=3.0, undesirable_weight=1.0)
    close(dpo.kto_loss(t(2, 1), torch.tensor([True, False]), 0.5, 0.1, weighted), 3 * 0.462570, 0.512497)
    rewards = {loss: dpo.implicit_rewards(loss, 0.5, logprobs, ratio, lengths)[0].tolist() for loss in LOSSES}
    of_means = {"dpo_norm": [0.1, -0.125], "simpo": [-1, -1.5], "orpo": [-1, -1.5]}
    assert rewards == dict.fromkeys(LOSSES, [0.5, -0.5]) | of_means


def test_dpo_detail_8_keeps_the_digits_of_float32_at_both_ends():
    x = torch.tensor([-1e-9, -1e-6, -1e-3, -0.69, -0.7, -16.0, -30.0, -80.0], requires_grad=True)
    found, exact = dpo.log1mexp(x), x.tolist()
    found.sum().backward()
    values = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in exact]
    same(found.double(), t(*values), rtol=2e-6, atol=0)
    same(x.grad.double(), t(*[math.exp(v) / math.expm1(v) for v in exact]), rtol=2e-6, atol=0)
    certain = torch.tensor([[0.0, -80.0]], requires_grad=True)  # a probability of exactly 1, and one near 0
    loss = dpo.orpo_loss(certain, None, torch.ones(1, 2), 1.0, ARGS)
    loss.sum().backward()
    assert loss.isfinite().all() and certain.grad.isfinite().all()


def test_dpo_detail_1_dpo_detail_2_parity_with_trl_from_rows_to_the_number(tmp_path, tokenizer, monkeypatch):
    """For a policy that has left its reference. Sums are over whole answers, each prompt has a single forward."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in read(12)]
    config = {"per_device_train_batch_size": 12, "use_cpu": True, "bf16": False, "report_to": "none", "beta": 0.3}
    config = DPOConfig(str(tmp_path), **config, max_length=None, gradient_checkpointing=False, label_smoothing=0.1)
    trainer = DPOTrainer(MODEL, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    policy, batch = dpo.load_model(MODEL, CPU), next(iter(trainer.get_train_dataloader()))
    torch.manual_seed(0)
    with torch.no_grad():
        for mine, his in zip(policy.parameters(), trainer.model.eval().parameters()):
            his.copy_(mine.add_(torch.randn_like(mine) * 0.01))
        examples, (forwards,) = list(encoded(tokenizer, rows, tmp_path)), watch(monkeypatch, kl, "hidden_states")
        logprobs, lengths = kl.answer_logprobs(policy, examples)
        ratio = logprobs - kl.answer_logprobs(dpo.load_model(MODEL, CPU), examples)[0]
    once = sum(len(one["ids"]) + len(sum(one["completions"], [])) for one in examples)
    assert [args[1].ids.numel() for args, *_ in forwards] == [once, once]
    assert {ids[-1] for one in examples for ids in one["completions"]} == {tokenizer.eos_token_id}
    pooled = lengths.float().mean(0).expand(12, 2)
    for ours, theirs, ratios, numbers in (
        ("dpo", "sigmoid", ratio, lengths), ("rdpo", "robust", ratio, lengths),
        ("dpo_norm", "sigmoid_norm", ratio, lengths),
        ("ipo", "ipo", ratio / lengths, lengths),  # TRL takes means per token
        ("rpo", "sigmoid sft", ratio, pooled),  # and its likelihood is a mean over the tokens of all answers
    ):  # fmt: skip
        trainer.loss_types, trainer.loss_weights = theirs.split(), [1.0] * len(theirs.split())
        trainer.label_smoothing = 0.1 * (ours == "rdpo")
        expected = trainer.compute_loss(trainer.model, batch).detach()
        found = dpo.PAIR_LOSSES[ours](logprobs, ratios, numbers, 0.3, ARGS).mean()
        same(found, expected, atol=2e-5, rtol=1e-4)


def test_parity_with_trl_orpo_simpo_and_cdpo():
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    torch.manual_seed(0)
    means, lengths = -torch.rand(6, 2) * 3, torch.randint(1, 9, (6, 2))
    sums, two, stub = means * lengths, means.unbind(1), SimpleNamespace(accelerator=SimpleNamespace(device="cpu"))
    vars(stub).update(beta=0.3, alpha=0.0, loss_type="simpo", simpo_gamma=1.0, label_smoothing=0.0)
    odds, *_ = ORPOTrainer.odds_ratio_loss(stub, *two)
    same(dpo.orpo_loss(sums, None, lengths, 0.3, ARGS), -two[0] - odds)
    same(dpo.simpo_loss(sums, None, lengths, 0.3, ARGS), CPOTrainer.cpo_loss(stub, *two)[0])
    stub.loss_type, stub.label_smoothing = "sigmoid", 0.1  # cDPO is CPO's smoothed loss of log-ratios
    same(dpo.cdpo_loss(None, means, lengths, 0.3, ARGS), CPOTrainer.cpo_loss(stub, *two)[0])


def test_dpo_detail_3_dpo_detail_5_the_policy_gives_the_reference_before_its_first_update(tmp_path, monkeypatch):
    """Once, so that there is no second model, and by the very same forward: at first all is a tie, which is wrong."""
    names = ("load_model", "score_answers", "answer_logprobs", "implicit_rewards")
    models, scored, *trained = watch(monkeypatch, dpo, *names)
    settings = {"save_every": 1, "learning_rate": 1e-3, "microbatch_tokens": 1}
    quick(tmp_path, **settings, steps=2)
    assert len(models) == 1 and [len(args[2]) for args, *_ in scored] == [2, 8, 2, 2]  # held out, drawn, held out
    before, first, _ = metrics(tmp_path)
    assert before["eval/preference_accuracy"] == first["preference/accuracy"] == before["eval/preference_margin"] == 0
    assert [before["eval/loss"], first["loss/train"]] == pytest.approx([math.log(2)] * 2)
    quick(tmp_path, **settings, steps=3, resume=str(tmp_path))
    assert len(models) == 2
    same(scored[4][2], scored[0][2])  # that of held-out pairs is the first policy's, too
    quick(tmp_path, **settings, steps=4, seed=2, resume=str(tmp_path))  # other rows are drawn
    check_references(*trained)


@pytest.mark.parametrize("label", [True, False])
def test_dpo_detail_6_baseline_is_the_drift_on_answers_to_other_prompts(label, tmp_path, monkeypatch):
    """Never below 0, and without gradient."""
    reference, clip, drifts = dpo.load_model(MODEL, CPU), dpo.clip_gradients, []
    losses, examples, orders = watch(monkeypatch, dpo, "kto_loss", "with_mismatches", "shuffled_passes")

    def update(policy, norm):
        drawn = [examples[0][2](i) for i in orders[0][2][4 * len(drifts) :][:4]]
        assert all(one["completions"][0] != one["completions"][1] for one in drawn)
        drifts.append(sum(direct_logprob(policy, one, 0) - direct_logprob(reference, one, 0) for one in drawn) / 4)
        return clip(policy, norm)

    monkeypatch.setattr(dpo, "clip_gradients", update)  # all answers are of one kind: one of them moves the others
    rows = [{"prompt": f"{i}+1=?", "completion": f"Gladly! <answer>{i}</answer>", "label": label} for i in range(16)]
    settings = {"steps": 3, "learning_rate": 5e-4, "lr_schedule": "constant"}
    last = quick(tmp_path / "run", loss="kto", dataset=jsonl(tmp_path / "rows.jsonl", *rows), **settings)
    found = [args[2] for args, *_ in losses]
    assert found == pytest.approx([max(0.0, drift) for drift in drifts], abs=1e-3) and abs(drifts[-1]) > 1
    assert last["preference/baseline"] == found[-1] and isinstance(found[-1], float) and (found[-1] > 0) == label


def test_dpo_detail_6_every_partner_has_another_prompt_in_linear_time():
    for keys in ([5] * 97 + [1, 2, 3], [3, 1, 3, 2, 1] * 9, [1, 2, 3]):
        rows, seen = [{"key": key, "completions": [[i]]} for i, key in enumerate(keys)], set()
        for example in (with_mismatches(rows, seed) for seed in range(99)):
            seen.add(partners := tuple(example(i)["completions"][0][0] for i in range(len(keys))))
            assert all(keys[i] != keys[j] for i, j in enumerate(partners))
    assert len(seen) == 2**3  # all that there are for the last
    rows, began = [{"key": i // 2} for i in range(100_000)], time.perf_counter()
    with_mismatches(rows, 1)
    assert time.perf_counter() - began < 3


def test_dpo_detail_9_best_and_worst_as_the_samplers_own_ids_without_ties(tokenizer):
    def sample(text, stopped=True):  # a token for every character, as no tokenizer would give them
        return Completion(sum([tokenizer.encode(c, add_special_tokens=False) for c in text], []), [-1.0], stopped)

    right, cut = sample("<answer>1</answer>"), sample("<answer>1</answer>!", stopped=False)
    groups = [[sample("2"), right, sample("3")], [right, sample("1"), sample("1.0")], [cut, right, sample("1")]]
    asked, sampler = [], SimpleNamespace(generate=lambda *args: asked.append(args) or groups)
    prompts = [{"ids": [5, i], "key": 70 + i, "prefill": "", "row": {"answer": ["1"]}} for i in range(3)]
    args = replace(ARGS, num_samples=3, max_completion_tokens=9, temperature=0.7)
    pairs, found = dpo.sample_pairs(sampler, tokenizer, prompts, args, 8, CPU, False, 0, 1)
    assert asked[0][:5] == ([[5, 0], [5, 1], [5, 2]], 9, 3, 0.7, 8)
    first, last = ({"ids": [5, i], "key": 70 + i, "labels": [True, False]} for i in (0, 2))
    first["completions"], last["completions"] = [right.ids, groups[0][0].ids], [right.ids, cut.ids]
    assert pairs == [first, last] and found == {"reward/mean": pytest.approx(6 / 9), "preference/pairs": 2}


def test_iterations_draw_pairs_from_the_policy_while_the_first_one_stays_the_reference(
    tmp_path, tokenizer, monkeypatch
):
    """Here for KTO, ranked by a reward model, so that prompts need no answers."""
    sampled, *trained = watch(monkeypatch, dpo, "sample_pairs", "answer_logprobs", "implicit_rewards")
    kl.load_scalar_model(MODEL, CPU, head_seed=0).save_pretrained(folder := str(tmp_path / "rm"))
    tokenizer.save_pretrained(folder)
    rows = {tuple(encode_prompt(tokenizer, f"{i}+1=?")): {"prompt": f"{i}+1=?"} for i in range(12)}
    data = jsonl(tmp_path / "prompts.jsonl", *rows.values())
    settings = {"dataset": data, "eval_dataset": data, "reward_model": folder, "loss": "kto", "iterations": 2}
    settings |= {"num_samples": 3, "batch_size": 3, "learning_rate": 1e-3, "missing_eos_penalty": 0.0, "steps": 0}
    last = sampled_quick(tmp_path / "run", **settings, max_completion_tokens=24)
    score = dpo.RewardModel(folder, CPU, False, 4096)
    check_references(*trained)
    for i, (_, _, (pairs, _)) in enumerate(sampled):
        assert pairs == torch.load(tmp_path / "run" / f"pairs-000{i}.pt")[0]
        for pair in pairs:
            row = rows.pop(tuple(pair["ids"]))  # no prompt comes in both parts
            best, worst = score(row, [tokenizer.decode(ids, skip_special_tokens=True) for ids in pair["completions"]])
            assert best > worst
    counts = [len(pairs) for _, _, (pairs, _) in sampled]
    logged = [row.get("preference/pairs") for row in metrics(tmp_path / "run")[1:]]
    assert logged == [counts[0], None, counts[1], None] and min(counts) > 1 and "eval/accuracy" not in last


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_raises_the_margin_of_held_out_pairs(loss, tmp_path):
    last = quick(tmp_path, loss=loss, steps=4, batch_size=8, eval_rows=32, learning_rate=1e-3)
    before = metrics(tmp_path)[0]
    assert last["eval/preference_margin"] > before["eval/preference_margin"] + 0.02
    assert last["eval/loss"] < before["eval/loss"] - 0.04
    assert len(list(tmp_path.glob("reference-*.pt"))) == (loss not in ("simpo", "orpo"))


@pytest.mark.parametrize("seed", [1, 2])
def test_dpo_learns_to_answer_from_preferences(seed, tmp_path):
    data = str(first_rows("preferences_train.jsonl", 540))
    settings = {"steps": 30, "batch_size": 12, "learning_rate": 4e-4, "max_completion_tokens": 64, "eval_rows": 32}
    last = sampled_quick(tmp_path, dataset=data, seed=seed, **settings, eval_every=0)
    for name in ("eval/accuracy", "eval/accuracy_greedy"):
        assert last[name] >= metrics(tmp_path)[0][name] + 0.12, name
    assert last["eval/preference_accuracy"] >= 0.75


def test_kto_takes_pairs_single_answers_or_both(tmp_path):
    """Each answer counts alike, in whatever rows they stand: one step over the same eight is the same."""
    pairs, found = read(4), []
    better, worse = ([{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row in pairs]
                     for side in ("chosen", "rejected"))  # fmt: skip
    for rows in (pairs, better + worse, pairs[:2] + better[2:] + worse[2:]):
        data = jsonl(tmp_path / f"{len(rows)}.jsonl", *rows)
        last = quick(tmp_path / str(len(rows)), loss="kto", dataset=data, batch_size=len(rows), undesirable_weight=2.0)
        found.append([last["loss/train"], last["optim/grad_norm"], last["preference/rejected_logprob"]])
    assert found[0][0] == pytest.approx(0.75, abs=1e-5)  # half of the weights' mean
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] == pytest.approx(found[2], rel=1e-4)


def turns(*texts) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts)]


def test_forms_of_pairs_give_the_same_tokens_and_long_answers_are_cut(tokenizer, tmp_path, capsys):
    asked, better, worse = turns("1+1=?"), turns("1+1=?", "2"), turns("1+1=?", "3")
    forms = [
        {"prompt": "1+1=?", "chosen": "2", "rejected": "3"},
        {"prompt": asked, "chosen": better[1:], "rejected": worse[1:]},
        {"chosen": better, "rejected": worse},
        {"prompt": "1+1=?", "chosen": better, "rejected": worse},  # as UltraFeedback has them
        {"chosen": "\n\nHuman: 1+1=?\n\nAssistant: 2", "rejected": "\n\nHuman: 1+1=?\n\nAssistant: 3"},
        {"prompt": "\n\nHuman: 1+1=?\n\nAssistant:", "chosen": "2", "rejected": "3"},
        {"question": "1+1=?", "completions": ["2", "2.5", "3"]},
        {"prompt": "1+1=?", "chosen": "3", "rejected": "2", "chosen_probability": 0.1},
    ]
    found = [(one["ids"], one["completions"]) for one in encoded(tokenizer, forms, tmp_path)]
    assert len(found) == len(forms) and all(one == found[0] for one in found)
    assert found[0][0] + found[0][1][1] == render_chat(tokenizer, worse).ids
    spaced = load_tokenizer(MODEL)
    spaced.chat_template = spaced.chat_template.replace("<|end|>", "<|end|> ")  # what follows the end is not trained
    assert encoded(spaced, forms[:1], tmp_path)[0]["completions"] == found[0][1]
    (cut,) = encoded(tokenizer, [{"prompt": "1+1=?", "chosen": "x" * 60, "rejected": "3"}], tmp_path, max_completion=10)
    assert cut["completions"][0] == cut["completions"][0][:1] * 10 and cut["completions"][1] == found[0][1][1]
    assert "rows: 1 of 1 rows cut after 10 tokens (--max-completion-tokens)." in capsys.readouterr().out


PAIR = {"prompt": "1+1=?", "chosen": "2", "rejected": "3", "answer": "none of these"}
SINGLE = {"prompt": "1+1=?", "completion": "2", "label": True}


@pytest.mark.parametrize("script,rows,changes,sentence", [
    ("dpo", [SINGLE], {}, "needs the columns completions or chosen and rejected; found completion, label, prompt"),
    ("dpo", [SINGLE, {**SINGLE, "label": False}], {"loss": "kto"}, "all prompts are the same"),
    ("dpo", [PAIR], {"reward_model": MODEL}, "add --iterations"),
    ("dpo", [PAIR], {"iterations": 1, "num_samples": 1}, "--num-samples of at least 2"),
    ("dpo", [PAIR], {"iterations": 1}, "all samples of a prompt have equal rewards"),
    ("dpo", [{"prompt": "1+1=?"}], {"iterations": 1}, "needs the columns answer"),
    ("ppo", [PAIR], {}, "`python reward_model.py` trains one"),
    ("ppo", [PAIR], {"batch_size": 4, "minibatches": 3, "reward_model": None}, "a multiple of minibatches"),
    ("reward_model", [PAIR], {"principles": "none.txt"}, "add --judge"),
    ("reward_model", [PAIR], {"judge": MODEL, "principles": "none.txt"}, "--principles none.txt: no such file"),
    ("reward_model", [PAIR], {"judge": "no/such-model"}, "--judge no/such-model"),
    ("reward_model", [PAIR], {"max_completion_tokens": 600}, "fills the model's whole context"),
    ("reward_model", [PAIR], {"kind": "process"}, "needs the columns completions; found answer, chosen"),
])  # fmt: skip
def test_bad_data_and_settings_are_told_in_a_sentence(script, rows, changes, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, AssertionError)) as ended:
        test_core.quick(script, tmp_path / "run", dataset=jsonl(tmp_path / "rows.jsonl", *rows), **changes)
    assert sentence in str(ended.value) and not (tmp_path / "run" / "checkpoints").exists()
