"""Rows that a model makes for sft.py: invented ones, and revised answers."""

import json
import re
import shutil

import pytest
import torch
from conftest import TINY, run
from test_core import quick

import sft
from common.generation import Completion, Speaker, is_correct, self_instruct
from common.tokenizer import PLAIN_TEMPLATE, load_tokenizer, read_conversation, read_row, render_chat, render_text

SEEDS = [
    "Name the capital of the country where Goethe was born.",
    "What do whales eat in winter?",
    "Spell the word cat.",
]
GOOD = "How many legs have three spiders together?"
FAULTS = {
    "of 3 words or fewer or over 150": ["How are you?", "word " * 151],
    "for more than text": ["Describe the image of a red house.", "Sum up all Files of the folder."],
    "for a program": ["Write a program that adds two numbers."],
    "opened by no letter or digit": ["- What is the tallest tree?", "Écris une phrase sur la mer."],
    "not new": ["Name the capital of the country where Schiller was born.", GOOD],
    "cut or empty": ["cut"],
}
INSTRUCT = (  # a template whose user's turn ends in plain text
    "{% for m in messages %}{{ 'Q: ' + m.content + ' A:' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Scripted:
    """A speaker whose questions are given, and whose answers say how many turns came before; "cut" does not end."""

    def __init__(self, questions=(), heard=None):
        self.seed, self.questions, self.heard = 1, questions, [] if heard is None else heard

    def __call__(self, chats, role):
        self.heard += chats.values()
        texts = {i: (*self.questions, *["cut"] * 999)[i] if role == "user" else f"After {len(chats[i])}" for i in chats}
        ended = [i for i in chats if "cut" not in (texts[i], chats[i][-1:] and chats[i][-1]["content"])]
        return {i: [*chats[i], {"role": role, "content": texts[i]}] for i in ended}


def invented(folder, questions, seeds=SEEDS) -> list[str]:
    source = write(folder / "seeds.jsonl", [{"question": text, "answer": "fine"} for text in seeds])
    self_instruct(folder / "made.jsonl", [source], Scripted(questions), len(questions), 2)
    return [row["prompt"] for row in rows_of(folder / "made.jsonl")]


@pytest.mark.parametrize("why,bad", [(why, bad) for why, texts in FAULTS.items() for bad in texts])
def test_a_question_is_kept_unless_a_filter_names_its_fault(why, bad, tmp_path, capsys):
    assert invented(tmp_path, [GOOD, bad]) == [GOOD]
    tried = capsys.readouterr().out
    assert "1 of 2 rows, from 16 candidates" in tried and (f"1 {why}" in tried or why == "cut or empty")
    near = "How many legs have four spiders at home?"  # 0.667
    assert invented(tmp_path, [GOOD, near]) == [GOOD, near]


def test_filters_that_most_seeds_fail_do_not_hold(tmp_path):
    assert invented(tmp_path, ["12+34=?", "34+12=?", "12+34=?"], ["11+22=?", "7*80=?", SEEDS[1]]) == [
        "12+34=?",
        "34+12=?",
    ]


def test_nothing_kept_is_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="nothing to train on"):
        invented(tmp_path, ["cut"])
    assert not (tmp_path / "made.jsonl").exists()


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE, INSTRUCT])
def test_turns_stand_where_the_template_puts_them(template, monkeypatch):
    tokenizer, given = load_tokenizer(str(TINY)), []
    tokenizer.chat_template = template or tokenizer.chat_template
    speak = Speaker(str(TINY), tokenizer, torch.device("cpu"), False, 20, 1)
    chat = [{"role": "user", "content": "1+1=?<|end|>"}, {"role": "assistant", "content": "2"}]
    whole, _ = render_text(tokenizer, [*chat, {"role": "user", "content": "Hi?"}], generation_prompt=True)
    before, _, after = whole.partition("Hi?")

    def generate(prompts, budgets, **_):
        given[:] = prompts
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (f"Hi?{after}Oh <answer>", "Hi?")]
        return [[Completion(ids[0], [], True)], [Completion(ids[1], [], False)]]

    monkeypatch.setattr(speak.sampler, "generate", generate)
    assert speak({0: chat, 1: chat}, "user") == {0: [*chat, {"role": "user", "content": "Hi?"}]}
    assert given[0] == tokenizer(before.rstrip(" "), add_special_tokens=False).input_ids
    assert given[0].count(tokenizer.eos_token_id) == (1 if template else 2)  # data cannot forge one
    assert not speak({0: [{"role": "user", "content": "1" * 600}]}, "assistant")  # more than the context
    assert speak({0: chat[:1], 1: chat[:1]}, "assistant")[0][-1]["role"] == "assistant"
    assert given[0] == tokenizer(render_text(tokenizer, chat[:1], None, True)[0], add_special_tokens=False).input_ids


@pytest.fixture()
def trained(monkeypatch) -> list[list[int]]:
    """The texts that forwards with gradients see."""
    seen, real = [], sft.pack

    def pack(segments):
        seen.extend(segment.ids for segment in segments if torch.is_grad_enabled())
        return real(segments)

    monkeypatch.setattr(sft, "pack", pack)
    return seen


def texts(rows: list[dict], tokenizer) -> list[list[int]]:
    return sorted(render_chat(tokenizer, read_conversation(row)).ids for row in rows)


def test_invented_rows_alone_are_trained_and_a_resumed_run_reuses_them(tmp_path, tokenizer, trained, monkeypatch):
    settings = {"self_instruct": 12, "steps": 0, "epochs": 1, "batch_size": 4}
    quick("sft", tmp_path, **settings)
    rows = rows_of(tmp_path / "self_instruct.jsonl")
    assert len(rows) == 12 and sorted(trained) == texts(rows, tokenizer)
    write(tmp_path / "self_instruct.jsonl", rows[:8])
    shutil.rmtree(tmp_path / "checkpoints")
    trained.clear()
    monkeypatch.setattr(sft, "Speaker", None)
    quick("sft", tmp_path, **settings, resume=str(tmp_path))
    assert sorted(trained) == texts(rows[:8], tokenizer)


def test_two_processes_invent_the_rows_of_one(tmp_path):
    flags = ["--self-instruct", 24, "--steps", 1, "--batch-size", 4, "--eval-rows", 8, "--eval-samples", 1]
    told = [run("sft", *flags, "--output-dir", tmp_path / f"{n}", processes=n) for n in (1, 2)]
    assert rows_of(tmp_path / "1" / "self_instruct.jsonl") == rows_of(tmp_path / "2" / "self_instruct.jsonl")
    assert all(text.count("24 of 24 rows") == 1 for text in told)


def test_the_embedded_model_invents_sums_before_and_after_it_is_trained_on_them(tmp_path, tokenizer):
    def share_right(model: str) -> float:
        speak = Speaker(model, tokenizer, torch.device("cpu"), False, 128, 1)
        self_instruct(tmp_path / "sums.jsonl", [f"{TINY}/demonstrations_train.jsonl"], speak, 100, 0)
        rows = [row for row in rows_of(tmp_path / "sums.jsonl") if re.fullmatch(r"\d\d[-+*]\d\d?=\?", row["prompt"])]
        assert len(rows) > 95
        return sum(is_correct(row["completion"], str(eval(row["prompt"][:-2]))) for row in rows) / len(rows)

    before = share_right(str(TINY))
    quick("sft", tmp_path / "run", self_instruct=100, steps=0, batch_size=32)
    assert share_right(str(tmp_path / "run" / "model")) > before - 0.15 > 0.15  # its own answers teach it nothing


def test_answers_are_criticised_by_a_principle_revised_and_trained(tmp_path, tokenizer, trained, monkeypatch):
    heard, principles, asked = [], ["Be brief.", "Be kind."], [{"role": "user", "content": "2+2=?"}]
    monkeypatch.setattr(sft, "Speaker", lambda *_: Scripted(heard=heard))
    (tmp_path / "principles.txt").write_text("\n\n".join(principles) + "\n")
    rows = [{"prompt": "1+1=?"}, {"messages": [*asked, {"role": "assistant", "content": "5"}]}, {"prompt": "cut"}]
    rows += [{"prompt": f"{n}+1=?"} for n in range(12)]
    source, changes = write(tmp_path / "prompts.jsonl", rows), {"steps": 0, "epochs": 1, "batch_size": 1}
    quick("sft", tmp_path / "run", revise=str(tmp_path / "principles.txt"), dataset=(source,), **changes)
    made = rows_of(tmp_path / "run" / "revisions.jsonl")
    assert len(made) == 14 and sorted(trained) == texts(made, tokenizer) and made[1]["prompt"] == asked
    assert {row["principle"] for row in made} == set(principles)
    assert all((row["draft"], row["critique"], row["completion"]) == ("After 1", "After 3", "After 5") for row in made)
    for row, criticised, revised in zip(made, heard[15:29], heard[29:], strict=True):
        assert criticised[:2] == revised[:2] == [*row["prompt"], {"role": "assistant", "content": "After 1"}]
        assert row["principle"] in criticised[2]["content"] and len(criticised) == 3 and len(revised) == 5


def test_rows_of_alpaca_and_self_instruct_are_read():
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    rows += [{"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]}]
    for row in rows:
        assert [turn["content"] for turn in read_conversation(read_row(row))] == ["Add.\n\n1 2", "3"]
    assert read_row({"instruction": "Go.", "input": "", "output": "I go."})["prompt"] == "Go."
