"""reward_model.py: its mathematics against known answers and TRL, its numbered details, its contract, and bad input."""

import json
from datetime import datetime
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, first_rows, metrics, refuses, run, weights
from transformers import AutoModelForSequenceClassification

import dpo
import ppo
import reward_model as rm
from common.kl import RewardModel
from common.tokenizer import load_tokenizer, pad

CPU = torch.device("cpu")
PAIRS = ["--dataset", first_rows("preferences_train.jsonl", 240), "--eval-dataset", TINY / "preferences_test.jsonl"]
STEPS = ["--dataset", first_rows("steps_train.jsonl", 240), "--eval-dataset", TINY / "steps_test.jsonl"]
SHORT = ["--steps", 6, "--eval-every", 0, "--eval-rows", 8, "--batch-size", 8]
KINDS = {
    "outcome": PAIRS,
    "process": [*STEPS, "--kind", "process"],
    "ensemble": [*PAIRS, "--ensemble-size", 2, "--ensemble-score", "uwo"],
}


def tiny_classifier(**settings):
    return rm.load_reward_backbone(rm.Args(**settings), CPU, 0)


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(prompt="1+1=?", chosen="2", rejected="3", **more) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def encoded(tokenizer, rows: list[dict], **settings) -> list:
    return rm.encode_examples(tokenizer, rows, "rows", rm.Args(**settings), 512)


def scores_of(model, examples) -> torch.Tensor:
    with torch.no_grad():
        return rm.score_examples(model, examples, CPU, False)


def normalised(folder, text_ids: list[list[int]]) -> torch.Tensor:
    """What any loader of a saved folder does: score each text by itself, then normalise by the config's constants."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in text_ids])
    return (logits - model.config.reward_mean) / model.config.reward_std


# ---------------------------------------------------------------------------------------------- the mathematics


def test_t9_preference_losses():
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    assert rm.preference_loss(one, zero).item() == pytest.approx(0.313262, abs=1e-6)
    assert rm.preference_loss(one, zero, margin=1.0).item() == pytest.approx(0.693147, abs=1e-6)
    assert rm.preference_loss(one, zero, centering=0.01).item() == pytest.approx(0.323262, abs=1e-6)
    scores = torch.tensor([2.0, 1.0, 0.0])
    better, worse, _, weight = rm.ranked_pairs([3])
    assert (rm.preference_loss(scores[better], scores[worse]) * weight).sum().item() == pytest.approx(
        0.251150, abs=1e-6
    )


def test_t10_aggregation():
    scores = torch.tensor([[1.0], [2.0], [3.0]])
    found = [rm.aggregate_scores(scores, how, 0.5).item() for how in ("mean", "min", "uwo")]
    assert found == pytest.approx([2, 1, 1.666667], abs=1e-6)
    steps = torch.tensor([0.9, 0.8, 0.5])
    assert rm.solution_score(steps, "product").item() == pytest.approx(0.36)
    assert rm.solution_score(steps, "min").item() == pytest.approx(0.5)


def test_preference_loss_has_the_gradient_of_cross_entropy():
    scores = torch.tensor([0.7, -0.2], dtype=torch.float64, requires_grad=True)
    p, margin, centering = 0.8, 0.3, 0.05
    rm.preference_loss(scores[:1], scores[1:], margin, p, centering).sum().backward()
    sigma = 1 / (1 + torch.exp(torch.tensor(-(0.7 + 0.2 - margin), dtype=torch.float64)))
    pull = 2 * centering * (0.7 - 0.2)
    torch.testing.assert_close(scores.grad, torch.stack([sigma - p + pull, p - sigma + pull]))


def test_preference_loss_equals_trl():
    """RewardTrainer's own compute_loss, on scores that a stand-in for its model returns."""
    from trl import RewardTrainer

    better, worse = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    margin = torch.rand(16, generator=torch.Generator().manual_seed(1))
    outputs = SimpleNamespace(logits=torch.cat([better, worse])[:, None])
    for margins, centering in ((None, None), (margin, None), (None, 0.01)):
        trainer = MagicMock()
        trainer.args.center_rewards_coefficient, trainer.model.training = centering, False
        trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda x: x
        inputs = {"input_ids": torch.zeros(32, 1), "attention_mask": torch.ones(32, 1)}
        inputs |= {"margin": margins} if margins is not None else {}
        theirs = RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
        ours = rm.preference_loss(better, worse, 0.0 if margins is None else margins, 1.0, centering or 0.0).mean()
        torch.testing.assert_close(ours, theirs)


def test_calibration_error_and_normalisation():
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([True, True, True, False])
    assert rm.calibration_error(confidence, right) == pytest.approx(0.05)  # 0.05 in both bins
    mean, std = rm.normalisation_constants(torch.tensor([[1.0, 3.0], [2.0, 8.0]]), "scale")
    assert mean.tolist() == [[2.0], [5.0]] and std.tolist() == [[1.0], [3.0]]
    assert rm.normalisation_constants(torch.ones(1, 3), "shift")[1].item() == 1


# ---------------------------------------------------------------------------------------------- numbered details


def test_reward_model_detail_1_t8_scores_ignore_padding_and_neighbours(tokenizer):
    model = tiny_classifier().eval()
    rows = [pair("1+1=?", "2", "<answer>3</answer>"), pair("47*8=?", "376, I think", "4")]
    examples = encoded(tokenizer, rows)
    together = scores_of(model, examples)
    assert together.shape == (4,)
    torch.testing.assert_close(torch.cat([scores_of(model, [e]) for e in examples]), together, atol=1e-5, rtol=0)
    texts = [e.prompt + ids for e in examples for ids in e.completions]
    for side in ("left", "right"):
        ids, mask, positions = pad(texts, tokenizer.pad_token_id, side)
        last = (mask * torch.arange(mask.shape[1])).argmax(1)
        assert (ids[torch.arange(4), last] == torch.tensor([t[-1] for t in texts])).all()
        model.config.pad_token_id = tokenizer.pad_token_id
        with torch.no_grad():
            theirs = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]
        torch.testing.assert_close(theirs, together, atol=1e-5, rtol=0)


def test_reward_model_detail_2_head_starts_small_in_float32_without_dropout():
    model = tiny_classifier(seed=5)
    assert model.score.weight.std().item() == pytest.approx((128 + 1) ** -0.5, rel=0.2)
    assert model.score.weight.dtype == torch.float32 and not model.training
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    with torch.autocast("cpu", torch.bfloat16):
        tokenizer = load_tokenizer(str(TINY))
        assert rm.score_examples(model, encoded(tokenizer, [pair()]), CPU, True).dtype == torch.float32


def test_reward_model_detail_3_each_text_is_forwarded_once(tokenizer):
    ranked = {"prompt": "12+30=?", "completions": ["42", "<answer>42</answer>", "41", "no idea"]}
    (example,) = encoded(tokenizer, [ranked])
    packed, positions = rm.pack_examples([example])
    assert packed.ids.numel() == len(example.prompt) + sum(map(len, example.completions))
    assert len(positions) == 4 and len(rm.ranked_pairs([4])[0]) == 6


def test_reward_model_detail_4_mean_over_pairs_then_prompts(tokenizer):
    scores = torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0])
    rows = [{"prompt": "a", "completions": ["1", "2", "3"]}, {"prompt": "b", "completions": ["1", "2"]}]
    examples = encoded(tokenizer, rows)
    total, sums = rm.outcome_loss(scores, examples, 0.0)
    assert total.item() / rm.targets(examples, "outcome") == pytest.approx((0.251150 + 0.313262) / 2, abs=1e-6)
    apart = rm.outcome_loss(scores[:3], examples[:1], 0.0)[0] + rm.outcome_loss(scores[3:], examples[1:], 0.0)[0]
    torch.testing.assert_close(apart, total)
    assert sums["preference/accuracy"].item() == pytest.approx(2)


def test_reward_model_detail_5_labels_below_one_half_turn_the_pair_round():
    plain = rm.read_comparison(pair(margin=0.5, chosen_probability=0.3), "row 1")
    assert plain.completions == ["3", "2"] and plain.margin == -0.5 and plain.probability == pytest.approx(0.7)
    a, b = torch.tensor([0.4]), torch.tensor([-1.1])
    direct = rm.preference_loss(a, b, 0.5, 0.3)
    torch.testing.assert_close(rm.preference_loss(b, a, plain.margin, plain.probability), direct)


def test_reward_model_detail_6_rows_that_teach_nothing_are_dropped_and_named(tokenizer, capsys):
    chat = [{"role": "user", "content": "1+1=?"}]
    rows = [
        pair(), pair(chosen="3"), pair(chosen=" "), pair(prompt="1" * 600), pair(chosen="2" * 600),
        {"chosen": [*chat, {"role": "assistant", "content": "2"}],
         "rejected": [{"role": "user", "content": "2+2=?"}, {"role": "assistant", "content": "4"}]},
        {"chosen": [*chat, {"role": "assistant", "content": "2"}],
         "rejected": [*chat, {"role": "assistant", "content": "3"}]},
        {"chosen": "\n\nHuman: 1+1=?\n\nAssistant: 2", "rejected": "\n\nHuman: 1+1=?\n\nAssistant: 3"},
    ]  # fmt: skip
    examples = encoded(tokenizer, rows)
    assert len(examples) == 3 and all(e.prompt == examples[0].prompt for e in examples)
    told = capsys.readouterr().out
    assert "5 of 8 rows dropped" in told and "2 because they are too long" in told
    for reason in ("two completions are equal", "a completion is empty", "their prompts differ"):
        assert f"1 because {reason}" in told


def test_reward_model_detail_7_saved_scores_are_normalised(tmp_path, tokenizer):
    demonstrations = [{"prompt": f"{i}+1=?", "completion": f"<answer>{i + 1}</answer>"} for i in range(10, 18)]
    data = write(tmp_path / "d.jsonl", demonstrations)
    run(
        "reward_model",
        *SHORT,
        *PAIRS,
        "--normalisation",
        "scale",
        "--reference-dataset",
        data,
        "--output-dir",
        tmp_path / "r",
    )
    comparisons = [rm.Comparison(row["prompt"], [row["completion"]]) for row in demonstrations]
    texts = [rm.encode_comparison(tokenizer, comparison).tokens() for comparison in comparisons]
    scores = normalised(tmp_path / "r" / "model", texts)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_reward_model_detail_8_members_differ_and_other_scripts_load_them(tmp_path, tokenizer):
    run("reward_model", *SHORT, *KINDS["ensemble"], "--output-dir", tmp_path)
    first, second = (AutoModelForSequenceClassification.from_pretrained(tmp_path / "model" / name)
                     for name in ("", "member_1"))  # fmt: skip
    assert not torch.equal(first.score.weight, second.score.weight)
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, second.model.layers[0].mlp.up_proj.weight)
    assert first.config.reward_mean != second.config.reward_mean
    assert metrics(tmp_path)[-1]["eval/disagreement"] > 0.01
    prompts = [[{"role": "user", "content": f"{i}+1=?"}] for i in range(9)]
    texts = ["2", "<answer>12</answer>", "3"] * 3
    chats = [[*p, {"role": "assistant", "content": text}] for p, text in zip(prompts, texts)]
    ids = [rm.render_chat(tokenizer, chat).ids for chat in chats]
    members = torch.stack([normalised(tmp_path / "model" / name, ids) for name in ("", "member_1")])  # [N, B]
    for how, expected in (("mean", members.mean(0)), ("min", members.amin(0)),
                          ("uwo", members.mean(0) - 0.5 * members.var(0, correction=0))):  # fmt: skip
        args = dpo.Args(reward_model=str(tmp_path / "model"), ensemble_score=how, microbatch_tokens=50)
        found = dpo.load_reward_model(args, CPU, False)(list(zip(prompts, texts)))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        score = RewardModel(str(tmp_path / "model"), CPU, False, 50, how)
        found = torch.cat([score({"prompt": p}, [text]) for p, text in zip(prompts, texts)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_reward_model_detail_8_members_begin_apart_and_see_the_data_in_another_order(tmp_path, monkeypatch):
    heads = [rm.load_reward_backbone(rm.Args(), CPU, member).score.weight for member in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    seen, score = [], rm.score_examples
    note = lambda model, examples, *rest: seen.append(examples) or score(model, examples, *rest)  # noqa: E731
    monkeypatch.setattr(rm, "score_examples", lambda *a: (note if torch.is_grad_enabled() else score)(*a))
    small = {"steps": 1, "batch_size": 8, "eval_rows": 4, "log_samples": 0, "output_dir": str(tmp_path / "run")}
    rm.main(rm.Args(dataset=str(PAIRS[1]), ensemble_size=2, **small))
    assert len(seen) == 2 and len(seen[0]) == len(seen[1]) == 8 and seen[0] != seen[1]


def test_reward_model_detail_9_targets_end_at_the_first_wrong_step():
    assert rm.supervised_steps([True, False, True, False]) == [True, True, False, False]
    assert rm.supervised_steps([True, True]) == [True, True] and rm.supervised_steps([False]) == [True]
    scores = torch.tensor([0.5, -1.0, 3.0], requires_grad=True)
    supervised = torch.tensor(rm.supervised_steps([True, False, True])).float()
    loss = rm.process_loss(scores, torch.tensor([1.0, 0.0, 1.0]), supervised).sum()
    loss.backward()
    assert loss.item() == pytest.approx(float(-F.logsigmoid(torch.tensor(0.5)) - F.logsigmoid(torch.tensor(1.0))))
    assert scores.grad[2] == 0 and scores.grad[0] < 0 < scores.grad[1]


def test_reward_model_detail_10_separators_do_not_merge_with_steps(tmp_path):
    """A tokenizer that knows `2,` as one token: rendered as one text, a step's last token would take its separator."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*"0123456789+=,?", "<e>"]
    vocabulary = {c: i for i, c in enumerate([*letters, "2,"])}
    inner = Tokenizer(models.BPE(vocabulary, [("2", ",")], unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("\0", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>")
    assert tokenizer.encode("1+1=2,", add_special_tokens=False)[-1] == vocabulary["2,"]
    row = {"prompt": "1+1+1=?", "completions": ["1+1=2", "2+1=3"], "labels": [True, True]}
    example = rm.encode_solution(tokenizer, row, "row 1", ",")
    assert example.ends == [[6, 12]] and vocabulary["2,"] not in example.completions[0]
    assert [example.completions[0][end - 1] for end in example.ends[0]] == [vocabulary[","]] * 2


def test_reward_model_detail_11_t11_both_orders_of_the_two_options(tokenizer, model, capsys):
    assert rm.judged_probability(0.8, 0.4) == pytest.approx(0.7)
    judge = rm.load_judge(rm.Args(judge=str(TINY)), CPU, False)
    pairs = [("1+1=?", "2", "3"), ("1" * 600, "2", "3")]
    (first, swapped), beyond_its_context = judge(pairs, [0, 1])
    assert beyond_its_context is None
    a, b = tokenizer.convert_tokens_to_ids(["A", "B"])
    for probability, answers in ((first, ("2", "3")), (swapped, ("3", "2"))):
        ids = rm.encode_prompt(tokenizer, rm.judge_question("1+1=?", *answers, rm.PRINCIPLE))
        ids += rm.encode_text(tokenizer, "The better answer is Answer ")
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        assert probability == pytest.approx(torch.sigmoid(logits[a] - logits[b]).item(), abs=1e-5)
    assert first != swapped
    rm.report_flips([(0.9, 0.9), (0.8, 0.7), (0.9, 0.2)], 3)
    told = capsys.readouterr()
    assert "in 67% its choice flips" in told.out and "flip rate 67%" in told.err and "first wins in 83%" in told.err
    rm.report_flips([(0.9, 0.2), (0.1, 0.9)], 2)
    assert not capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("kind", KINDS)
def test_output_folder_is_complete(kind, tmp_path):
    output = run("reward_model", *SHORT, "--eval-rows", 32, *KINDS[kind], "--output-dir", tmp_path)
    assert json.loads((tmp_path / "args.json").read_text())["script"] == "reward_model"
    for name in ("metrics.jsonl", "samples.jsonl", "curves.png", "scores.png", "model/tokenizer.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert list((tmp_path / "tensorboard").iterdir()) and list((tmp_path / "checkpoints").glob("step-*"))
    sample = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert {"step", "prompt", "completion", "reward"} <= set(sample)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["reward_kind"] == ("process" if kind == "process" else "outcome") and config["pad_token_id"] == 1
    assert config["reward_members"] == 1 + (kind == "ensemble")
    if kind == "process":
        with pytest.raises(SystemExit, match="one label that scores whole answers"):
            RewardModel(str(tmp_path / "model"), CPU, False, 64)
    names = {"eval/loss", "eval/accuracy", "loss/train", "optim/grad_norm"}
    if kind != "process":
        names |= {"preference/accuracy", "preference/margin", "eval/margin", "eval/calibration_error",
                  "eval/accuracy_chosen_longer", "eval/accuracy_chosen_shorter", "eval/length_correlation"}  # fmt: skip
    assert names <= set(metrics(tmp_path)[-1]) and "→" in output
    if kind == "outcome":  # a folder that a later stage takes, in a batch of texts of different length too
        told = output.strip().splitlines()[-1]
        assert told.endswith(f"python ppo.py --reward-model {tmp_path / 'model'}")


def test_a_reward_model_can_be_trained_on(tmp_path):
    run("reward_model", *SHORT, *PAIRS, "--output-dir", tmp_path / "a")
    run("reward_model", *SHORT, *PAIRS, "--model", tmp_path / "a" / "model", "--output-dir", tmp_path / "b")
    a, b = metrics(tmp_path / "a")[-1], metrics(tmp_path / "b")[0]
    assert a["eval/margin"] == pytest.approx(b["eval/margin"], abs=1e-5)


def test_a_reward_model_may_have_another_tokenizer_than_the_policy(tmp_path, tokenizer):
    """The same model with the ids of two digits exchanged, in tokenizer and embeddings: texts score the same."""
    model, swap = tiny_classifier().eval(), tokenizer.convert_tokens_to_ids(["1", "2"])
    model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[swap] = table[swap[::-1]].clone()
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    path = tmp_path / "b" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= dict(zip("12", swap[::-1]))
    path.write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path / "b")).convert_tokens_to_ids(["1", "2"]) == swap[::-1]
    texts = [([{"role": "user", "content": f"{i}+11=?"}], f"<answer>{i + 11}</answer>") for i in range(8)]
    models = [RewardModel(str(tmp_path / x), CPU, False, 64) for x in "ab"]
    scores = [torch.cat([score({"prompt": prompt}, [text]) for prompt, text in texts]) for score in models]
    torch.testing.assert_close(*scores)
    assert scores[0].std() > 0.01


def test_pad_token_that_ends_conversations_is_not_named(tmp_path, tokenizer):
    """Otherwise transformers takes the token before the end for the last."""
    tokenizer = load_tokenizer(str(TINY))
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_classifier().eval()
    examples = encoded(tokenizer, [pair()])
    (tmp_path / "run").mkdir()
    holder = type("Run", (), {"folder": tmp_path / "run", "is_main": True, "args": rm.Args()})
    constants = [torch.zeros(1, 1), torch.ones(1, 1)]
    rm.save_reward_models(holder, [model], tokenizer, constants, {tokenizer.eos_token_id}, False)
    texts = [examples[0].prompt + ids for ids in examples[0].completions]
    scores = normalised(tmp_path / "run" / "model", texts)
    torch.testing.assert_close(scores, scores_of(model, examples), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- AI feedback, odd data


def test_a_judge_labels_pairs_and_samples(tmp_path):
    rows = [pair(f"{a}+1=?", str(a + 1), str(a + 2)) for a in range(30)]
    principles = tmp_path / "principles.txt"
    principles.write_text("Prefer right answers.\n\nPrefer short answers.\n")
    judge = ["--judge", TINY, "--principles", principles]
    output = run("reward_model", *SHORT, *judge, "--dataset", write(tmp_path / "pairs.jsonl", rows),
                 "--output-dir", tmp_path / "run")  # fmt: skip
    assert "The judge labelled 30 of 30 pairs" in output
    labelled = [json.loads(line) for line in (tmp_path / "run" / "labelled.jsonl").read_text().splitlines()]
    assert all(set(row) == {"prompt", "chosen", "rejected", "chosen_probability"} for row in labelled)
    assert [row["prompt"] for row in labelled] == [row["prompt"] for row in rows]
    assert all(0.5 <= row["chosen_probability"] <= 1 for row in labelled)
    run("reward_model", *SHORT, "--dataset", tmp_path / "run" / "labelled.jsonl", "--output-dir", tmp_path / "again")
    a, b = metrics(tmp_path / "run")[-1], metrics(tmp_path / "again")[-1]
    assert a["loss/train"] == b["loss/train"]
    bare = write(tmp_path / "prompts.jsonl", [{"prompt": f"{a}+{a}=?"} for a in range(10, 40)])
    run(
        "reward_model", *SHORT, *judge, "--dataset", bare, "--max-completion-tokens", 48, "--output-dir", tmp_path / "s"
    )
    assert (tmp_path / "s" / "labelled.jsonl").stat().st_size > 0
    run("reward_model", "--resume", tmp_path / "s", "--steps", 7)


def test_reward_model_detail_5_a_margin_turns_with_a_pair_that_the_judge_overrules(tmp_path, monkeypatch):
    rows = [{**pair("1+1=?", "2", "3"), "margin": 1.5, "asked": datetime(2026, 1, 2)}, pair("2+2=?", "4", "5")]
    rows.append({**pair("3+3=?", "6", "7"), "margin": 2.0})
    judge = lambda triples, numbers: [(0.1, 0.2), (0.9, 0.8), (0.9, 0.8)]  # noqa: E731
    monkeypatch.setattr(rm, "load_judge", lambda *args: judge)
    run_, args = SimpleNamespace(folder=tmp_path, is_main=True), rm.Args(dataset="pairs.jsonl")
    labelled = rm.ai_feedback(args, rows, None, run_, 256, ("cpu", 0, 1, False))
    assert [(row["chosen"], row.get("margin")) for row in labelled] == [("3", -1.5), ("4", None), ("6", 2.0)]
    written = [json.loads(line) for line in (tmp_path / "labelled.jsonl").read_text().splitlines()]
    assert written[0]["asked"].startswith("2026-01-02")
    assert [rm.read_comparison(row, "here").margin for row in labelled] == [-1.5, 0.0, 2.0]


def test_the_saved_head_keeps_the_precision_of_its_constants(tmp_path):
    run("reward_model", *SHORT, "--dtype", "bfloat16", "--output-dir", tmp_path / "run")
    saved = weights(tmp_path / "run")
    assert saved["score.weight"].dtype == torch.float32 and saved["model.norm.weight"].dtype == torch.bfloat16


def test_odd_rows_do_not_crash(tmp_path, tokenizer):
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    rows = [
        pair([turn("user", "a"), turn("assistant", "b"), turn("assistant", "c"), turn("user", "d")]),
        pair([turn("user", "a"), turn("assistant", "b")]),
        pair([turn("assistant", "b"), turn("user", "")]),
        pair([turn("user", "naïve ☃ <|end|>")], chosen=""),
        pair([turn("user", "x")], chosen=[turn("assistant", "y")], rejected="z"),
        {"prompt": "q", "chosen": [turn("user", "q"), turn("assistant", "y")],
         "rejected": [turn("user", "q"), turn("assistant", "z")], "chosen_probability": None},
    ]  # fmt: skip
    assert len(encoded(tokenizer, rows)) == 4  # a conversation that the assistant opens cannot be rendered
    run("reward_model", *SHORT, "--dataset", write(tmp_path / "odd.jsonl", rows * 4), "--output-dir", tmp_path / "run")


def test_templates_that_refuse_roles_drop_the_row(capsys):
    tokenizer = load_tokenizer(str(TINY))
    strict = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('user first') }}{% endif %}"
    tokenizer.chat_template = strict + tokenizer.chat_template
    rows = [pair(), pair([{"role": "assistant", "content": "hello"}, {"role": "user", "content": "1+1=?"}])]
    assert len(encoded(tokenizer, rows)) == 1
    assert "1 because the chat template refuses them" in capsys.readouterr().out


def test_solutions_whose_prompt_the_template_refuses_are_dropped(capsys):
    tokenizer = load_tokenizer(str(TINY))
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = strict + tokenizer.chat_template
    solution = {"prompt": "1+1=?", "completions": ["1+1=2"], "labels": [True]}
    refused = {**solution, "prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}
    assert len(encoded(tokenizer, [solution, refused], kind="process")) == 1
    assert "1 because the chat template refuses them" in capsys.readouterr().out


@pytest.mark.parametrize("module", [dpo, ppo])
def test_scores_of_other_heads_are_not_rounded_in_bfloat16(module, tokenizer, monkeypatch):
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.head = SimpleNamespace(), torch.nn.Linear(1, 1)

        def forward(self, input_ids):
            return SimpleNamespace(logits=self.head(input_ids.float().mean(1, keepdim=True)))

    other = Other()
    monkeypatch.setattr(module, "load_scalar_models", lambda *args: (tokenizer, [other]))
    pairs = [([{"role": "user", "content": "1+1=?"}], text) for text in ("2", "3", "4")]
    args = module.Args(reward_model=str(TINY))
    exact, rounded = (module.load_reward_model(args, CPU, bfloat16)(pairs) for bfloat16 in (False, True))
    assert exact.tolist() == rounded.tolist() and len(set(exact.tolist())) == 3


def test_plain_text_without_a_chat_template():
    tokenizer = load_tokenizer(str(TINY))
    tokenizer.chat_template = None
    (example,) = encoded(tokenizer, [pair()])
    assert example.completions[0][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.prompt) == "1+1=?"


STEPS = {"prompt": "1+1+1=?", "completions": ["1+1=2", "2+1=3"], "labels": [True, True]}


@pytest.mark.parametrize("rows,flags,sentence", [
    ([pair(chosen="3")] * 20, [], "two completions are equal"),
    ([pair(chosen="")] * 20, [], "a completion is empty"),
    ([pair(chosen_probability=1.5)] * 20, [], "row 1: chosen_probability must lie between 0 and 1, found 1.5"),
    ([pair(margin="big")] * 20, [], "margin must be a number"),
    ([{"prompt": "a", "completions": ["only"]}] * 20, [], "at least two, ranked best first"),
    ([{"chosen": "a", "rejected": "b"}] * 20, [], "without a prompt column"),
    ([{"q": 1}], [], "needs the columns chosen + rejected or prompt + completions"),
    ([pair()], [], "too few to hold any out"),
    ([pair()] * 20, ["--kind", "process"], "needs the columns prompt + completions + labels"),
    ([{**STEPS, "labels": [True]}] * 20, ["--kind", "process"], "lists of the same length"),
    ([{**STEPS, "labels": [1, -1]}] * 20, ["--kind", "process"], "labels true or false"),
    ([{**STEPS, "completions": ["", "x"]}] * 20, ["--kind", "process"], "a step is empty"),
    ([pair()] * 20, ["--judge", TINY, "--kind", "process"], "--kind outcome only"),
    ([pair()] * 20, ["--principles", "none.txt"], "name one with --judge"),
    ([pair()] * 20, ["--judge", TINY, "--principles", "none.txt"], "no such file"),
    ([pair()] * 20, ["--max-prompt-tokens", 3], "--max-prompt-tokens 3"),
    ([pair()] * 20, ["--batch-size", 0], "at least 1"),
    ([pair()] * 20, ["--model", "no/such-model"], "no/such-model"),
])  # fmt: skip
def test_bad_data_and_settings_are_told_in_a_sentence(rows, flags, sentence, tmp_path):
    data = write(tmp_path / "data.jsonl", rows)
    assert sentence in refuses("reward_model", "--dataset", data, *flags, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("seed", [1, 2])
def test_process_model_finds_the_first_wrong_step(seed, tmp_path):
    shorter = ["--kind", "process", "--seed", seed, "--epochs", 0.5, "--eval-every", 0]
    run("reward_model", *shorter, "--output-dir", tmp_path)
    before, after = metrics(tmp_path)[0], metrics(tmp_path)[-1]
    assert after["eval/first_error_accuracy"] >= before["eval/first_error_accuracy"] + 0.25
    assert before["eval/accuracy"] < 0.65 and after["eval/accuracy"] >= 0.75


def test_steps_are_labelled_by_arithmetic():
    for line in (ROOT / "common" / "tiny" / "steps_test.jsonl").read_text().splitlines():
        row = json.loads(line)
        wrong = row["labels"].index(False) if False in row["labels"] else len(row["labels"])
        for i, step in enumerate(row["completions"][: wrong + 1]):
            left, _, right = step.removeprefix("<think>").partition("=")
            assert (eval(left) == int(right)) == (i < wrong)
        assert not any(row["labels"][wrong:])
