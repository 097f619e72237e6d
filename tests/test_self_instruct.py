"""Rows that a model makes for sft.py: invented ones, and revised answers."""

import re
import shutil

import pytest
import torch
from conftest import TINY, cases, first_rows, jsonl, lines_of, run
from test_core import quick

import sft
from common.generation import Completion, Speaker, self_instruct
from common.tokenizer import PLAIN_TEMPLATE, load_tokenizer, read_conversation, read_row, render_chat, render_text

SEEDS = ["Name the capital of the country where Goethe was born.", "What do whales eat in winter?", "Spell the word."]
GOOD = "How many legs have three spiders together?"
INSTRUCT = (  # a template whose user's turn ends in plain text
    "{% for m in messages %}{{ 'Q: ' + m.content + ' A:' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)


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
    source = jsonl(folder / "seeds.jsonl", *[{"question": text, "answer": "fine"} for text in seeds])
    self_instruct(folder / "made.jsonl", [source], Scripted(questions), len(questions), 2)
    return [row["prompt"] for row in lines_of(folder / "made.jsonl")]


def test_a_question_is_kept_unless_a_filter_names_its_fault(tmp_path, capsys):
    for row in cases("question", "fault"):
        assert invented(tmp_path, [GOOD, row["question"]]) == [GOOD]
        tried = capsys.readouterr().out
        assert "1 of 2 rows, from 16 candidates" in tried and row["fault"] in tried
    near = "How many legs have four spiders at home?"  # 0.667
    assert invented(tmp_path, [GOOD, near]) == [GOOD, near]
    sums = ["12+34=?", "34+12=?"]  # filters that most seeds fail do not hold
    assert invented(tmp_path, [*sums, "12+34=?"], ["11+22=?", "7*80=?", SEEDS[1]]) == sums
    (tmp_path / "made.jsonl").unlink()
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


def test_invented_rows_alone_are_trained_and_two_processes_and_a_resumed_run_have_the_same(
    tmp_path, tokenizer, trained, monkeypatch
):
    few = str(first_rows("demonstrations_train.jsonl", 60))
    settings = {"self_instruct": 16, "steps": 0, "epochs": 1, "batch_size": 4, "dataset": (few,)}
    quick("sft", tmp_path, **settings)
    rows = lines_of(tmp_path / "self_instruct.jsonl")
    assert len(rows) == 16 and sorted(trained) == texts(rows, tokenizer)
    assert sum(bool(re.fullmatch(r"\d\d[-+*]\d\d?=\?", row["prompt"])) for row in rows) > 14
    flags = ["--self-instruct", 16, "--steps", 1, "--batch-size", 4, "--eval-rows", 2, "--eval-samples", 1]
    told = run("sft", *flags, "--dataset", few, "--eval-dataset", few, "--output-dir", tmp_path / "two", processes=2)
    assert told.count("16 of 16 rows") == 1 and lines_of(tmp_path / "two" / "self_instruct.jsonl") == rows
    jsonl(tmp_path / "self_instruct.jsonl", *rows[:8])
    shutil.rmtree(tmp_path / "checkpoints")
    trained.clear()
    monkeypatch.setattr(sft, "Speaker", None)
    quick("sft", tmp_path, **settings, resume=str(tmp_path))
    assert sorted(trained) == texts(rows[:8], tokenizer)


def test_answers_are_criticised_by_a_principle_revised_and_trained(tmp_path, tokenizer, trained, monkeypatch):
    heard, principles, asked = [], ["Be brief.", "Be kind."], [{"role": "user", "content": "2+2=?"}]
    monkeypatch.setattr(sft, "Speaker", lambda *_: Scripted(heard=heard))
    (tmp_path / "principles.txt").write_text("\n\n".join(principles) + "\n")
    rows = [{"prompt": "1+1=?"}, {"messages": [*asked, {"role": "assistant", "content": "5"}]}, {"prompt": "cut"}]
    source = jsonl(tmp_path / "prompts.jsonl", *rows, *[{"prompt": f"{n}+1=?"} for n in range(12)])
    settings = {"dataset": (source,), "steps": 0, "epochs": 1, "batch_size": 1}
    quick("sft", tmp_path / "run", revise=str(tmp_path / "principles.txt"), **settings)
    made = lines_of(tmp_path / "run" / "revisions.jsonl")
    assert len(made) == 14 and sorted(trained) == texts(made, tokenizer) and made[1]["prompt"] == asked
    assert {row["principle"] for row in made} == set(principles)
    assert all((row["draft"], row["critique"], row["completion"]) == ("After 1", "After 3", "After 5") for row in made)
    for row, criticised, revised in zip(made, heard[15:29], heard[29:], strict=True):
        assert criticised[:2] == revised[:2] == [*row["prompt"], {"role": "assistant", "content": "After 1"}]
        assert row["principle"] in criticised[2]["content"] and len(criticised) == 3 and len(revised) == 5


def test_rows_of_alpaca_and_self_instruct_are_read():
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    rows += [{"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]}]
    read = [[turn["content"] for turn in read_conversation(read_row(row))] for row in rows]
    assert read == [["Add.\n\n1 2", "3"]] * 2
    assert read_row({"instruction": "Go.", "input": "", "output": "I go."})["prompt"] == "Go."
