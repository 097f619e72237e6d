"""reward_model.py: its mathematics against known answers and TRL, its numbered details, the judge, and bad rows."""

import json
import math
import shutil
from dataclasses import replace
from datetime import datetime
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import test_core
import torch
import torch.nn.functional as F
from conftest import TINY, first_rows, jsonl, metrics, weights
from datasets import Dataset
from test_dpo import turns, watch
from transformers import AutoModelForSequenceClassification

import reward_model as rm
from common import kl
from common import tokenizer as text
from common.kl import RewardModel

CPU = torch.device("cpu")
FEW = str(first_rows("preferences_train.jsonl", 48))
quick = partial(test_core.quick, "reward_model", dataset=FEW)
SEED = 1_000_003  # of the first member's head, at the default --seed 1


def pair(prompt="1+1=?", chosen="2", rejected="3", **more) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def encoded(tokenizer, rows: list[dict]) -> list[dict]:
    return [text.encode_comparison(tokenizer, row, 128, 128, least=2, whole=True) for row in rows]


def texts_of(examples: list[dict]) -> list[list[int]]:
    return [one["ids"] + ids for one in examples for ids in one["completions"]]


def logits(model, texts: list[list[int]]) -> torch.Tensor:
    """Scores [B] as transformers gives them, of one text at a time."""
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in texts])


def normalised(folder, texts: list[list[int]]) -> torch.Tensor:
    """What any loader of a saved folder does: score the texts, then normalise by the constants of the config."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return (logits(model, texts) - model.config.reward_mean) / model.config.reward_std


def test_t9_preference_loss_and_that_of_trl():
    """RewardTrainer's own compute_loss, on scores that a stand-in for its model returns."""
    from trl import RewardTrainer

    one, zero = torch.ones(1), torch.zeros(1)
    for settings, expected in (({}, 0.313262), ({"margin": 1.0}, 0.693147), ({"centering": 0.01}, 0.323262)):
        assert rm.preference_loss(one, zero, **settings).item() == pytest.approx(expected, abs=1e-6)
    better, worse, margin = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    outputs = SimpleNamespace(logits=torch.cat([better, worse])[:, None])
    trainer = MagicMock()
    trainer.args.center_rewards_coefficient, trainer.model.training = 0.01, False
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda x: x
    inputs = {"input_ids": torch.zeros(32, 1), "attention_mask": torch.ones(32, 1), "margin": margin}
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
    torch.testing.assert_close(rm.preference_loss(better, worse, margin, centering=0.01).mean(), theirs)


def test_t10_aggregation_calibration_error_and_normalisation_constants():
    scores = torch.tensor([[1.0], [2.0], [3.0]])
    found = [kl.aggregate_scores(scores, how, 0.5).item() for how in ("mean", "min", "uwo")]
    assert found == pytest.approx([2, 1, 1.666667], abs=1e-6)
    confidence, right = torch.tensor([0.95, 0.95, 0.55, 0.55, 1.0]), torch.tensor([True, True, True, False, False])
    assert rm.calibration_error(confidence[:4], right[:4]) == pytest.approx(0.05)  # 0.05 in both bins
    assert rm.calibration_error(confidence, right) == pytest.approx((0.9 + 0.1) / 5)
    for how, expected in (("none", [0, 0, 1, 1]), ("shift", [2, 5, 1, 1]), ("scale", [2, 5, 1, 3])):
        constants = rm.normalisation_constants(torch.tensor([[1.0, 3.0], [2.0, 8.0]]), how)
        assert torch.cat(constants).flatten().tolist() == expected


def test_reward_model_detail_2_a_head_starts_small_runs_in_float32_and_stays_so_in_a_bfloat16_model(
    tmp_path, tokenizer
):
    head = (model := kl.load_scalar_model(str(TINY), CPU, head_seed=5)).score.weight
    assert head.std().item() == pytest.approx((128 + 1) ** -0.5, rel=0.2)
    assert head.mean().abs() < 0.03 and head.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        scores = kl.token_scores(model, *text.pack_scored(encoded(tokenizer, [pair(), pair("2+2=?", "4", "5")])))
    assert scores.dtype == torch.float32 and (scores != scores.bfloat16().float()).all()
    quick(tmp_path, dtype="bfloat16")
    saved = weights(tmp_path)
    assert saved["score.weight"].dtype == torch.float32 and saved["model.norm.weight"].dtype == torch.bfloat16


def trained(scored: list) -> list[list[int]]:
    """The packed ids of those calls of `token_scores` that are trained on."""
    return [args[1].ids[0].tolist() for args, _, scores in scored if scores.requires_grad]


def check_step(row: dict, loss: torch.Tensor, model) -> None:
    """A step had this loss, and the norm of its gradient."""
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert [row["loss/train"], row["optim/grad_norm"]] == pytest.approx([loss.item(), norm.item()], rel=1e-4)


def test_reward_model_detail_1_reward_model_detail_3_reward_model_detail_4_a_step_by_hand(
    tmp_path, tokenizer, monkeypatch
):
    """Each prompt and answer is forwarded once, the loss is the mean over the pairs of a prompt, then over prompts,
    whatever the microbatches, and scores are those that transformers gives one text at a time."""
    rows = [{"prompt": "12+30=?", "completions": ["42", "<answer>42</answer>", "41", "no idea"]},
            pair(margin=0.5, chosen_probability=0.8)]  # fmt: skip
    flags, (scored,) = {"microbatch_tokens": 10, "centering": 0.1}, watch(monkeypatch, rm, "token_scores")
    row = quick(tmp_path / "run", dataset=jsonl(tmp_path / "ranked.jsonl", *rows), **flags)
    examples, model = encoded(tokenizer, rows), kl.load_scalar_model(str(TINY), CPU, head_seed=SEED)
    once = [sorted(one["ids"] + sum(one["completions"], [])) for one in examples]
    assert sorted(map(sorted, trained(scored))) == sorted(once)
    a, b, c, d, right, wrong = logits(model, texts_of(examples))
    pairs = [-F.logsigmoid(x - y) + 0.1 * (x + y) ** 2 for x, y in ((a, b), (a, c), (a, d), (b, c), (b, d), (c, d))]
    soft = -0.8 * F.logsigmoid(right - wrong - 0.5) - 0.2 * F.logsigmoid(wrong + 0.5 - right)
    check_step(row, (sum(pairs) / 6 + soft + 0.1 * (right + wrong) ** 2) / 2, model)


def test_reward_model_detail_5_any_loader_finds_scores_normalised_while_loss_and_calibration_are_of_raw_ones(
    tmp_path, tokenizer
):
    """On demonstrations if there are any, else on the better held-out answers."""
    held_out, shown = ([pair(f"{i}+1=?", f"<answer>{i + 1}</answer>", "no") for i in range(start, start + 8)]
                       for start in (10, 50))  # fmt: skip
    demonstrations = ({"prompt": row["prompt"], "completion": row["chosen"]} for row in shown)
    path, rows, configs = jsonl(tmp_path / "shown.jsonl", *demonstrations), {}, {}
    data = {"eval_dataset": jsonl(tmp_path / "held_out.jsonl", *held_out), "eval_rows": 8}
    for how, references, scored in (("none", None, held_out), ("shift", path, shown), ("scale", None, held_out)):
        rows[how] = quick(tmp_path / how, normalisation=how, reference_dataset=references, **data)
        configs[how] = json.loads((tmp_path / how / "model" / "config.json").read_text())
        scores = normalised(tmp_path / how / "model", texts_of(encoded(tokenizer, scored))[::2])
        assert (abs(scores.mean().item()) < 1e-4) == (how != "none")
        assert (abs(scores.std(correction=0).item() - 1) < 1e-3) == (how == "scale")
        for name in ("eval/loss", "eval/calibration_error", "eval/accuracy"):
            assert rows[how][name] == rows["none"][name]
    std = configs["scale"]["reward_std"]
    assert rows["scale"]["eval/margin"] * std == pytest.approx(rows["none"]["eval/margin"], rel=1e-4)
    assert abs(configs["shift"]["reward_mean"]) > 1e-3 and configs["shift"]["reward_std"] == 1 != std


def test_reward_model_detail_6_members_differ_in_head_and_order_and_are_normalised_then_joined(
    tmp_path, tokenizer, monkeypatch
):
    """In the evaluation, and by RewardModel: as computed by hand from the folders of the members."""
    loaded, scored = watch(monkeypatch, rm, "load_scalar_model", "token_scores")
    held_out = [pair(f"{i}+1=?", f"<answer>{i + 1}</answer>", "3") for i in range(8)]
    flags = {"eval_dataset": jsonl(tmp_path / "held_out.jsonl", *held_out), "eval_rows": 8, "normalisation": "scale"}
    row = quick(tmp_path, ensemble_size=2, ensemble_score="uwo", reference_dataset=None, **flags)
    assert [named["head_seed"] for _, named, _ in loaded] == [SEED, SEED + 1]
    first, second = trained(scored)
    assert first != second
    folders = [tmp_path / "model", tmp_path / "model" / "member_1"]
    members = torch.stack([normalised(folder, texts_of(encoded(tokenizer, held_out))) for folder in folders])
    mean, variance = members.mean(0), (members[0] - members[1]).square() / 4
    expected = {"mean": mean, "min": members.min(0).values, "uwo": mean - variance / 2}
    margins = expected["uwo"][::2] - expected["uwo"][1::2]
    assert row["eval/margin"] == pytest.approx(margins.mean().item(), abs=1e-3) and variance.max() > 0.1
    for how, values in expected.items():
        score = RewardModel(str(tmp_path / "model"), CPU, False, 50, how)
        found = torch.cat([score(one, [one["chosen"], one["rejected"]]) for one in held_out])
        torch.testing.assert_close(found, values, atol=1e-3, rtol=0)


def test_reward_model_detail_7_steps_are_trained_at_their_last_tokens_up_to_the_first_wrong_one(tmp_path, model):
    """By a tokenizer that knows `2,` as one token, with which a step's last token must not merge with its separator;
    and a solution's score is the product of its steps'."""
    assert [rm.supervised_steps(labels) for labels in ([True, False, True, False], [True, True], [False])] == [2, 2, 1]
    tokenizer = text.load_tokenizer(str(TINY))
    tokenizer.add_tokens(["2,"])
    for part in (model, tokenizer):
        part.save_pretrained(start := str(tmp_path / "start"))
    solutions = [{"prompt": "1+1+1=?", "completions": ["1+1=2", "2+1=4", "4=4"], "labels": [True, False, True]},
                 {"prompt": "2+2=?", "completions": ["2+2=4"], "labels": [1]}]  # fmt: skip
    path = jsonl(tmp_path / "steps.jsonl", *solutions)
    flags = {"kind": "process", "dataset": path, "eval_dataset": path, "microbatch_tokens": 10}
    row = quick(tmp_path / "run", model=start, **flags)
    first, second = (f"<|user|>{asked}<|end|><|assistant|>" for asked in ("1+1+1=?", "2+2=?"))
    read = [(first, "1+1=2", ","), (first, "1+1=2", ",", "2+1=4", ","), (second, "2+2=4", ",")]  # to each target
    ids = [sum((tokenizer(part).input_ids for part in parts), []) for parts in read]
    right, wrong, other = logits(model := kl.load_scalar_model(start, CPU, head_seed=SEED), ids)
    loss = -(F.logsigmoid(right) + F.logsigmoid(-wrong) + F.logsigmoid(other)) / 3
    check_step(row, loss, model)
    assert metrics(tmp_path / "run")[0]["eval/loss"] == pytest.approx(loss.item(), rel=1e-4)
    said = ["1+1=2,2+1=4</think><answer>3</answer>", "<answer>3</answer>"]  # the second has no step
    scores = RewardModel(str(tmp_path / "run" / "model"), CPU, False, 64)({"prompt": "1+1+1=?"}, said).sigmoid()
    expected = normalised(tmp_path / "run" / "model", ids[:2]).sigmoid().prod()
    assert scores[0].item() == pytest.approx(expected.item(), rel=1e-3) and scores[1] < 1e-5


@pytest.mark.parametrize("is_one_token", [True, False])
def test_reward_model_detail_8_the_options_are_compared_as_they_follow_the_words(is_one_token, model):
    """Where ` A` is one token, that is the option; for the embedded tokenizer the space belongs to what was asked."""
    tokenizer, said = text.load_tokenizer(str(TINY)), "The better answer is:"
    tokenizer.add_tokens([" A", " B"] * is_one_token)
    options = tokenizer.convert_tokens_to_ids([" A", " B"] if is_one_token else ["A", "B"])
    asked = [f"<|user|>1+1=?<|end|><|assistant|>{said}", f"<|user|>{'1' * 600}<|end|>{said}", f"<|user|>A or B? {said}"]
    found = kl.option_probabilities(model, tokenizer, asked, [" A", " B"], 512, 100, False)
    assert found[1].isnan().all()  # beyond the context
    for i in (0, 2):
        ids = tokenizer(asked[i] + ("" if is_one_token else " ")).input_ids
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1, options].softmax(0)
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=0)


def test_reward_model_detail_8_a_judge_is_asked_in_both_orders_and_labels_turn_with_their_margin(
    tmp_path, monkeypatch, tokenizer, capsys
):
    rows = [pair(margin=1.5, asked=datetime(2026, 1, 2)), pair("2+2=?", "4", "5"), pair("a"), pair("b", margin=2.0)]
    readings, asked = torch.tensor([0.1, 0.8, 0.9, 0.2, math.nan, 0.5, 0.8, 0.7])[:, None], []
    monkeypatch.setattr(rm, "option_probabilities", lambda *args: asked.extend(args[2]) or readings)
    Dataset.from_list(rows).to_parquet(data := str(tmp_path / "rows.parquet"))
    (tmp_path / "principles.txt").write_text("Be right.\n\nBe short.\n")
    flags = {"judge": str(TINY), "dataset": data, "principles": str(tmp_path / "principles.txt")}
    rm.label_pairs(tmp_path / "labelled.jsonl", replace(rm.EMBEDDED, **flags), tokenizer, 128, CPU, False, 0, 1)
    assert "Answer A: 2\n\nAnswer B: 3" in asked[0] and "Answer A: 3\n\nAnswer B: 2" in asked[1]
    assert all(question.endswith("<|assistant|>The better answer is Answer") for question in asked)
    assert [("Be right." in question, "Be short." in question) for question in asked[1:4]] == [
        (True, False), (False, True), (False, True)]  # fmt: skip
    labelled = [json.loads(line) for line in (tmp_path / "labelled.jsonl").read_text().splitlines()]
    assert [(row["chosen"][0]["content"], row["margin"]) for row in labelled] == [("3", -1.5), ("4", 0), ("2", 2)]
    assert [row["chosen_probability"] for row in labelled] == pytest.approx([0.85, 0.85, 0.55])  # a NaN drops the row
    told = capsys.readouterr().out
    assert "labelled 3 of 4 rows" in told and "flips with the order of the answers in 33%" in told
    assert labelled[0]["asked"].startswith("2026-01-02")
    (plain,) = encoded(tokenizer, [pair(chosen="3", rejected="2")])  # a probability overrules what it stands beside
    for read in encoded(tokenizer, [labelled[0], pair(margin=1.5, chosen_probability=0.15)]):
        assert read["completions"] == plain["completions"] and read["margin"] == -1.5
        assert read["probability"] == pytest.approx(0.85)


SUMS = [pair(f"{a}+1=?", str(a + 1), str(a + 2)) for a in range(12)]
ASKED = [{"prompt": f"{a}+{a}=?"} for a in range(10, 22)]


@pytest.mark.parametrize("rows,odd", [(SUMS, pair(margin=[1])), (ASKED, {})])
def test_a_judge_labels_pairs_and_samples_once_as_a_run_on_them_reads_them(rows, odd, tmp_path, monkeypatch):
    data = jsonl(tmp_path / "rows.jsonl", *rows, '{"prompt": "1', odd)
    labelled = tmp_path / "run" / "labelled.jsonl"
    first = quick(tmp_path / "run", judge=str(TINY), dataset=data, batch_size=4)
    written = [json.loads(line) for line in labelled.read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in written] == [row["prompt"] for row in rows]
    assert all(0.5 <= row["chosen_probability"] < 1 for row in written)
    again = quick(tmp_path / "again", dataset=str(labelled), batch_size=4)
    assert again["loss/train"] == first["loss/train"] and again["eval/loss"] == first["eval/loss"]
    monkeypatch.setattr(rm, "label_pairs", lambda *args: pytest.fail("a resumed run labels again"))
    quick(tmp_path / "run", judge=str(TINY), dataset=data, batch_size=4, resume=str(tmp_path / "run"), steps=2)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2]


SOLUTION = {"prompt": "1+1+1=?", "completions": ["1+1=2", "2+1=3"], "labels": [True, True]}


@pytest.mark.parametrize("row,sentence", [
    (pair(chosen_probability=3), "chosen_probability must lie between 0 and 1"),
    (pair(chosen="2" * 200), "an answer of more than 128 tokens .--max-completion-tokens"),
    (pair("q" * 200), "a prompt of more than 128 tokens .--max-prompt-tokens"),
    (pair(margin="abc"), "could not convert string to float: 'abc'"),
    (pair(chosen="3"), "two answers are equal"),
    (pair(chosen=" "), "an empty turn of the assistant"),
    (pair(chosen=turns("a", "x"), rejected=turns("b", "y")), "the answers' prompts differ"),
    (pair(chosen=turns("a", "b", "x"), rejected=turns("a", "b", "y")), "an answer that is not the assistant's"),
    ({"prompt": "a", "completions": ["b"]}, "completions must be a list of at least 2"),
    ({**SOLUTION, "labels": [1, -1]}, "labels true or false"),
    ({**SOLUTION, "labels": [True]}, "lists of the same length"),
    ({**SOLUTION, "completions": ["1" * 200, "2"]}, "over 128 and 128 tokens"),
    ({**SOLUTION, "prompt": None}, "needs the columns prompt or question"),
])  # fmt: skip
def test_dpo_detail_1_rows_that_cannot_be_read_are_dropped(row, sentence, tokenizer):
    """Whatever is raised for a row: test_data.py has how it is counted while the run goes on."""
    how = {"separator": ","} if "labels" in row else {"least": 2, "whole": True}
    encode = text.encode_solution if "labels" in row else text.encode_comparison
    with pytest.raises(ValueError, match=sentence):
        encode(tokenizer, text.read_row(dict(row)), 128, 128, **how)


def test_a_reward_model_can_be_trained_on(tmp_path):
    before = quick(tmp_path / "a", eval_rows=8)
    quick(tmp_path / "b", eval_rows=8, model=str(tmp_path / "a" / "model"))
    after, untrained = metrics(tmp_path / "b")[0], metrics(tmp_path / "a")[0]
    for name in ("eval/loss", "eval/margin"):
        assert before[name] == pytest.approx(after[name], abs=1e-6) != untrained[name]


@pytest.mark.parametrize("pad,named", [("<|end|>", None), ("<|pad|>", 1)])
def test_a_pad_token_that_ends_conversations_is_not_named_in_the_config(pad, named, tmp_path):
    """Otherwise transformers takes the token before the end for the last."""
    shutil.copytree(TINY, tmp_path / "start")
    path = tmp_path / "start" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": pad}))
    quick(tmp_path / "run", model=str(tmp_path / "start"))
    folder = tmp_path / "run" / "model"
    assert json.loads((folder / "config.json").read_text()).get("pad_token_id") == named
    score = RewardModel(str(folder), CPU, False, 64)
    ids = texts_of(encoded(score.tokenizer, SUMS[:1]))
    assert ids[0][-1] == 0 and score.tokenizer.pad_token_id == (named or 0)
    torch.testing.assert_close(normalised(folder, ids), score(SUMS[0], ["1", "2"]), atol=1e-5, rtol=0)


def test_a_process_model_finds_the_first_wrong_step(tmp_path):
    data = {"dataset": str(first_rows("steps_train.jsonl", 640)), "eval_dataset": f"{TINY}/steps_test.jsonl"}
    after = quick(tmp_path, kind="process", **data, steps=40, batch_size=16, warmup_steps=5, eval_rows=96)
    before = metrics(tmp_path)[0]
    assert after["eval/first_error_accuracy"] >= before["eval/first_error_accuracy"] + 0.25
    assert before["eval/accuracy"] < 0.65 and after["eval/accuracy"] >= 0.75
