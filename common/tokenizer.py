"""From text to token ids: rows of data sets, chats with exact masks, padding, packing, microbatches.

Rules that hold everywhere in this project, and that the functions here make hold:

* ids are the tokenizer's own: those of the rendered chat as a whole, or of plain text behind a BOS where it has one;
* masks come from lengths and spans, never from `ids != pad` (pad is often the end-of-sequence token);
* the token that ends a turn belongs to the assistant, so a model learns to stop;
* text that a user, a tool or a data set wrote cannot become a control token;
* a row that cannot be used is dropped and counted; the others are kept as Arrow on disk, not as Python objects.
"""

from __future__ import annotations

import json
import os
import re
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

TINY = Path(__file__).resolve().parent / "tiny"  # the embedded model and its data
PLAIN_TEMPLATE = (  # for base models: no new tokens, every turn of the assistant ends with the EOS
    "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content + (eos_token if m.role == 'assistant' else '') }}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PROBE = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "REPLY"), ("user", "b"))]
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function": "tool"}
ROLES |= {role: role for role in ("system", "developer", "user", "assistant", "tool", "ipython", "observation")}
PROMPT, CHAT = ("prompt", "question", "problem"), ("messages", "conversations", "conversation")  # columns
JSON_LINE = "line of JSON"  # the only column of JSONL files


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def tell(sentence: str) -> None:
    """Print, once for all processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(sentence)


def read_lines(path: str, flag: str) -> list[str]:
    """The lines of a file that are not empty. Exits with a sentence that names `flag` if there are none."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
    if not (kept := [line.strip() for line in lines if line.strip()]):
        raise SystemExit(f"{flag} {path}: no file with lines of text.")
    return kept


# ---------------------------------------------------------------------------------------------- text and chats


def load_tokenizer(path: str, today: str | None = None, flag: str = "--model"):
    """The tokenizer at `path` (folder or Hub name), with a pad token, which only fills gaps. Chat templates print the
    date `today` (YYYY-MM-DD), so that a resumed run sees the prompts it began with. Exits with a sentence that names
    `flag` if there is none, or none that is fast and has an end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"{flag} {path}: no tokenizer could be loaded from there ({first_line(error)}).") from error
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise SystemExit(f"{flag} {path}: needs a fast tokenizer, for masks, and an end-of-sequence token, to stop at.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.no_truncation()  # which some are saved with
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.today = date.fromisoformat(today) if today else date.today()
    return tokenizer


def ensure_chat_template(tokenizer, file: str | None = None) -> None:
    """Give the tokenizer the template in `file`, or a plain one if it has none; it is saved with the model."""
    if file:
        if not Path(file).is_file():
            raise SystemExit(f"--chat-template {file}: no such file.")
        tokenizer.chat_template = Path(file).read_text()
    elif not tokenizer.chat_template:
        has_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{ bos_token }}" if has_bos else "") + PLAIN_TEMPLATE
        tell(f"{tokenizer.name_or_path} has no chat template: its chats become 'User: …', 'Assistant: …' and the EOS.")


def control_tokens(tokenizer) -> re.Pattern:
    """Matches every special token written out, and every other added token with which the chat template marks roles."""
    return _control_tokens(tokenizer, str(tokenizer.chat_template))


@lru_cache
def _control_tokens(tokenizer, template: str) -> re.Pattern:
    try:
        marks = _render(tokenizer, PROBE, None, False).replace("<think>", "").replace("</think>", "")
    except Exception:  # no template, or one that refuses the probe
        marks = ""
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    literals = {token.content for token in added if token.special or token.content in marks}
    return re.compile("|".join(map(re.escape, sorted(literals, key=len, reverse=True))) or r"(?!)")


def defused(tokenizer, value):
    """`value` (text, or lists and dicts of it) with every control token that is written out in it broken by a space, so
    that data cannot forge one. Half surrogate pairs, which no tokenizer accepts, become U+FFFD."""
    if isinstance(value, str):
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not value.isascii() else value
        return control_tokens(tokenizer).sub(lambda match: f"{match[0][0]} {match[0][1:]}", value)
    if isinstance(value, dict):
        return {defused(tokenizer, key): defused(tokenizer, inner) for key, inner in value.items()}
    return [defused(tokenizer, inner) for inner in value] if isinstance(value, list) else value


def encode_text(tokenizer, text: str, begins: bool = True) -> list[int]:
    """Ids of plain text as the tokenizer gives them, with its BOS, if it adds one, unless `begins` is false because the
    text continues another. Control tokens written in it stay ordinary characters."""
    return tokenizer.backend_tokenizer.encode(defused(tokenizer, text), add_special_tokens=begins).ids


def encode_continuation(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Ids of a plain-text prompt, and of its completion with the EOS. They are tokenised as one text, unless a token
    would span the boundary: a model is asked with the ids of the prompt alone."""
    ids, whole = encode_text(tokenizer, prompt), encode_text(tokenizer, prompt + completion)
    rest = whole[len(ids) :] if whole[: len(ids)] == ids else encode_text(tokenizer, completion, begins=False)
    return ids, rest + [tokenizer.eos_token_id]


def _render(tokenizer, messages: list[dict], tools, generation_prompt: bool) -> str:
    """The chat as text; a template that asks for the date gets that of `load_tokenizer`."""
    today, asked = getattr(tokenizer, "today", date.today()), r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    template = tokenizer.get_chat_template(tools=tools)
    template = re.sub(asked, lambda match: repr(today.strftime(match[2])), template)
    options = {"tools": tools, "chat_template": template, "tokenize": False}
    return tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, **options)


def end_of_turn(tokenizer) -> str:
    """The control token that closes an assistant's turn in the chat template, e.g. `<|im_end|>`: the last one, if there
    are several. One that closes only whole conversations is used if turns have none; else it exits with a sentence."""
    return _end_of_turn(tokenizer, str(tokenizer.chat_template))


@lru_cache
def _end_of_turn(tokenizer, template: str) -> str:
    last, inner = (_render(tokenizer, chat, None, False).rpartition("REPLY")[2] for chat in (PROBE[:2], PROBE))
    shared = os.path.commonprefix([last, inner])
    found = control_tokens(tokenizer).findall(shared) or control_tokens(tokenizer).findall(last)
    if not found:
        raise SystemExit(
            f"The chat template of {tokenizer.name_or_path} ends an assistant turn without a special token: a model "
            "trained with it would never stop. Close the turn, for example with the end-of-sequence token."
        )
    return found[-1]


def stop_token_ids(tokenizer, model=None) -> list[int]:
    """Every id that ends a completion: the tokenizer's EOS, the chat template's end of turn, the model's own list."""
    stops = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        stops.add(tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer)))
    configured = model.generation_config.eos_token_id if model is not None and model.generation_config else None
    stops.update([configured] if isinstance(configured, int) else configured or [])
    return sorted(stops)


def read_messages(value, role: str = "user") -> list[dict]:
    """`value` as messages with `role` and `content`. It may be plain text (one message of `role`), such messages, their
    JSON, ShareGPT's `from` and `value`, pairs of `input` and `output`, or a transcript as HH-RLHF has them (blank line,
    `Human: …`, blank line, `Assistant: …`); else raises ValueError."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        with suppress(ValueError):  # a text that begins like that
            decoded = json.loads(value)
            value = decoded if all({"role", "from", "input"} & set(message) for message in decoded) else value
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        turns = re.split(r"\n\n(Human|Assistant):", value.removesuffix("\n\nAssistant:"))[1:]
        value = [{"from": name.lower(), "value": text.strip()} for name, text in zip(turns[::2], turns[1::2])]
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise ValueError("conversations must be text or lists of messages with role and content")
    messages = []
    for message in value:
        if "input" in message and "output" in message:
            messages.append({"role": "user", "content": message["input"]})
            messages.append({"role": "assistant", "content": message["output"]})
        elif "from" in message and "value" in message:
            messages.append({"role": message["from"], "content": message["value"]})
        else:
            messages.append(dict(message))
    for message in messages:
        content, calls = message.get("content"), message.get("tool_calls") or []
        if message.get("role") not in ROLES:
            raise ValueError(f"no role of a message: {str(message.get('role'))[:40]!r}")
        message["role"] = ROLES[message["role"]]
        if not calls and not isinstance(content, str):
            raise ValueError("a message without text, or with more than text")
        if not calls and message["role"] == "assistant" and not content.strip():
            raise ValueError("an empty turn of the assistant")
        for function in (call.get("function", call) for call in calls):
            if isinstance(function.get("arguments"), str):  # as they come over the wire; templates want the object
                function["arguments"] = json.loads(function["arguments"] or "{}")
    return messages


def render_text(tokenizer, messages: list[dict], tools=None, generation_prompt: bool = False):
    """A conversation as text, and the spans of characters that the assistant wrote, end of turn included. A turn starts
    where the conversation before it, rendered with a generation prompt, ends; this works for templates that drop the
    reasoning of earlier turns. Raises ValueError if the template changes earlier text, or leaves out a tool call."""
    safe, tools = defused(tokenizer, messages), defused(tokenizer, tools)
    text, spans = _render(tokenizer, safe, tools, generation_prompt), []
    for i, message in enumerate(safe):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, safe[:i], tools, True)
        is_plain = "</think>" not in str(message.get("content"))
        if is_plain and before.rstrip().endswith("<think>") and not text.startswith(before):
            before = before[: before.rindex("<think>")]  # the prompt begins the reasoning that this turn has not
        end = text.find(end_of_turn(tokenizer), len(before)) + len(end_of_turn(tokenizer))
        if not text.startswith(before) or end <= len(before):
            raise ValueError("the chat template rewrites earlier turns once there are later ones")
        if spans and spans[-1][1] > len(before):
            raise ValueError("the chat template closes no turn but the last")
        calls = [call.get("function", call)["name"] for call in message.get("tool_calls") or []]
        if not all(name in text[len(before) : end] for name in calls):
            raise ValueError("the chat template does not know tool calls")
        spans.append((len(before), end))
    return text, spans


class Rendered(NamedTuple):  # a conversation
    ids: list[int]
    mask: list[bool]  # which of them the assistant wrote


def render_chat(tokenizer, messages: list[dict], tools=None, generation_prompt: bool = False) -> Rendered:
    """Ids of a conversation, tokenised as a whole, and the mask of what the assistant wrote (see `render_text`)."""
    text, spans = render_text(tokenizer, messages, tools, generation_prompt)
    encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    mask, (starts, ends) = [False] * len(encoded.ids), zip(*encoded.offsets)
    for first, last in spans:  # offsets may lack white space, or have some behind a control token
        for i in range(bisect_right(ends, first), bisect_left(starts, last)):
            mask[i] = starts[i] >= first
    return Rendered(encoded.ids, mask)


def opening_text(tokenizer, prompt: str | list[dict], tools: list | None = None) -> tuple[str, str]:
    """A prompt as text up to the point where the model continues, and the part of the assistant's turn that it already
    contains: a final message of the assistant, or a `<think>` written by the template. Without a chat template, plain
    text stays as it is. Raises ValueError if `prompt` cannot be read as messages."""
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return defused(tokenizer, prompt), ""
    messages, prefill = defused(tokenizer, read_messages(prompt)), ""
    whole = _render(tokenizer, messages, defused(tokenizer, tools), False)
    if messages[-1]["role"] == "assistant":
        prefill = messages.pop()["content"]
    text = _render(tokenizer, messages, defused(tokenizer, tools), True)
    if prefill and whole.startswith(text) and prefill in whole[len(text) :]:
        return whole[: whole.rindex(prefill) + len(prefill)], prefill  # with what the template puts in front of it
    opens = "<think>" if text.rstrip().endswith("<think>") else ""
    return text + prefill, opens + prefill


def user_opening(tokenizer, messages: list[dict]) -> tuple[str, str]:
    """A chat as text up to where the user's next turn begins, and a pattern that matches where such a turn ends: at a
    control token, or at what the template puts between it and the answer."""
    asked = [*defused(tokenizer, messages), {"role": "user", "content": "QUESTION"}]
    opening, _, closing = _render(tokenizer, asked, None, True).rpartition("QUESTION")
    ends = filter(None, [control_tokens(tokenizer).pattern, re.escape(closing.strip())])
    return opening.rstrip(" "), "|".join(ends)  # a space belongs to the first token of what follows


def encode_prompt(tokenizer, prompt: str | list[dict], tools: list | None = None) -> list[int]:
    """Ids to continue by sampling (see `opening_text`)."""
    text, _ = opening_text(tokenizer, prompt, tools)
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template).ids


def encode_answered(tokenizer, prompt: str | list[dict], text: str) -> list[int]:
    """Ids of a prompt with the assistant's answer to it, as a reward model reads them."""
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return sum(encode_continuation(tokenizer, prompt, text), [])
    messages = read_messages(prompt)
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages  # a beginning that `text` has, too
    chat = defused(tokenizer, [*messages, {"role": "assistant", "content": text}])
    return tokenizer.backend_tokenizer.encode(_render(tokenizer, chat, None, False), add_special_tokens=False).ids


# ---------------------------------------------------------------------------------------------- rows of data sets


def load_rows(source: str, limit: int | None = None):
    """The rows, or the first `limit`, of a file (JSONL, JSON, CSV, Parquet), a folder or a Hub data set
    `name[:subset[:split]]` (split: train), as a `datasets.Dataset`. JSONL has one column, the unparsed line, since a
    table would give every row the columns of all; `read_row` parses it. Exits with a sentence if there are no rows."""
    from datasets import disable_progress_bars, load_dataset

    if not sys.stderr.isatty():
        disable_progress_bars()
    kind = {".jsonl": "text", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(source).suffix)
    name, subset, split = (source, "", "") if Path(source).exists() else (source.split(":") + ["", ""])[:3]
    where = {"path": kind, "data_files": source} if kind else {"path": name, "name": subset or None}
    options = {"encoding_errors": "replace"} if kind == "text" else {}
    try:
        rows = load_dataset(**where, **options, split=split or "train")
        assert len(rows), "it is empty"
    except Exception as error:  # datasets raises many kinds; all of them are about what the user named
        why = first_line(error.__cause__ or error)
        what = "no such file, folder or Hub data set that can be reached, or no rows in it"
        raise SystemExit(f"{source}: {what} ({why}).") from error
    if kind == "text":
        rows = rows.rename_column("text", JSON_LINE)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def read_row(row: dict) -> dict:
    """A row as a dict without nulls, with its `tools` decoded from JSON, and with `prompt` and `completion` if it has
    the columns of Alpaca or Self-Instruct. Raises ValueError if it is not an object."""
    row = json.loads(row[JSON_LINE] or "null") if JSON_LINE in row else dict(row)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    row = without_nulls(row)
    if isinstance(row.get("tools"), str):
        row["tools"] = json.loads(row["tools"] or "[]")
    if "instruction" in row and not {*CHAT, *PROMPT} & set(row):
        instance = (row.get("instances") or [row])[0]
        row["prompt"] = "\n\n".join(filter(None, [row["instruction"], instance.get("input")]))
        row |= {"completion": instance["output"]} if "output" in instance else {}
    return row


def without_nulls(value):
    """`value` without its null fields, which tables add because every row, message and tool gets the fields of all. The
    `content` of a message stays even if null, because templates test for that."""
    if isinstance(value, dict):
        kept = ["content"] if "role" in value else []
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None or key in kept}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def first_of(row: dict, *names: str):
    """The first of these columns that the row has. Raises ValueError if it has none."""
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"needs the columns {' or '.join(names)}; found {', '.join(sorted(row)) or 'none'}")


def gold_answers(row: dict) -> list[str]:
    """The right answers of a row as text; any of them counts. Raises ValueError if it has none or all are empty."""
    if isinstance(row.get("reward_model"), dict):  # as DAPO-Math-17k has it
        row = {"answer": row["reward_model"].get("ground_truth") or ""} | row
    columns = ("answer", "golden_answers", "answers", "solution")
    first_of(row, *columns)
    for name in columns:  # some have `proof` or `notfound` for an answer, and perhaps one in the solution
        answers = row[name] if isinstance(row.get(name), list) else [row.get(name, "")]
        answers = [str(answer) for answer in answers if answer is not None]
        answers = [a for a in answers if a.rpartition("####")[2].strip() and a.lower() not in ("proof", "notfound")]
        if name == "solution" and {*columns[:3]} & set(row):  # beside an empty answer, what it states counts
            answers = [answer for answer in answers if "\\boxed" in answer]
        if answers:
            return answers
    raise ValueError("its answer is empty")


def read_conversation(row: dict) -> list[dict] | str:
    """What a row demonstrates: messages, or plain text. Raises ValueError if it has neither, or an empty completion."""
    if "text" in row and not {*CHAT, *PROMPT} & set(row):
        return row["text"]
    if {*CHAT} & set(row):
        return read_messages(first_of(row, *CHAT))
    prompt, reply = read_messages(first_of(row, *PROMPT)), first_of(row, "completion", "solution", "answer")
    if isinstance(reply, list) and reply and not isinstance(reply[0], dict):
        reply = reply[0]  # the first of several answers
    return with_reply(prompt, read_messages(str(reply) if isinstance(reply, (int, float)) else reply, "assistant"))


def with_reply(prompt: list[dict], reply: list[dict]) -> list[dict]:
    """A prompt and the reply to it, which continues the prompt's last message if the assistant has begun that."""
    if prompt[-1]["role"] == reply[0]["role"] == "assistant":
        begun = {**reply[0], "content": prompt[-1]["content"] + reply[0]["content"]}
        prompt, reply = prompt[:-1], [begun, *reply[1:]]
    return prompt + reply


def read_answers(row: dict, least: int = 2) -> list[list[dict]]:
    """Conversations that differ in their last turn, best first: those of `chosen` and `rejected`, or of ranked
    `completions`, each an answer to the row's prompt or a whole conversation; if `least` is 1, also a demonstration.
    Raises ValueError if they cannot be compared, or are fewer than `least`."""
    if least == 1 and not {"chosen", "completions"} & set(row):
        return [read_conversation(row)]
    is_pair = {"chosen", "rejected"} <= set(row)
    answers = [row["chosen"], row["rejected"]] if is_pair else first_of(row, "completions", "chosen and rejected")
    if not isinstance(answers, list) or len(answers) < least:
        raise ValueError(f"completions must be a list of at least {least}")
    conversations = [read_messages(answer, "assistant") for answer in answers]
    if conversations[0][0]["role"] == "assistant":
        conversations = [with_reply(read_messages(first_of(row, *PROMPT)), reply) for reply in conversations]
    if any(conversation[:-1] != conversations[0][:-1] for conversation in conversations):
        raise ValueError("the answers' prompts differ")
    if any(conversation[-1]["role"] != "assistant" for conversation in conversations):
        raise ValueError("an answer that is not the assistant's")
    return conversations


def encode_rows(tokenizer, rows, source: str, encode: Callable, columns: dict[str, str], required: bool = True):
    """A data set of what `encode` (a `partial` of a named function) returns for every row: `ids`, the named `columns`,
    the row's `index`, and a `key` that rows with the same `prompt` share. It runs once per machine, in parallel if
    there are many rows, and is cached by `datasets`. Rows for which it raises are dropped, and counted by reason, as
    are those of which it has something to `tell`. Exits with a sentence if all are dropped; with `required` false,
    neither counts nor exits."""
    from datasets import Features, List, Value

    if tokenizer.chat_template:
        end_of_turn(tokenizer)  # which may exit, and should not do so in a worker
    kinds = {"ids": "ints", **columns, "key": "int64", "index": "int64", "tell": "string"}
    lists = {"ints": List(Value("int32")), "lists": List(List(Value("int32"))), "bools": List(Value("bool"))}
    features = Features({name: lists.get(kind) or Value(kind) for name, kind in kinds.items()})

    def encode_one(row: dict, index: int) -> dict:
        made = dict.fromkeys(kinds) | {"index": index}
        try:
            made |= encode(read_row(row))
        except Exception as error:  # templates raise what they like; it is counted and told
            return made | {"tell": f"dropped: {first_line(error)[:100]}"}
        key = blake2b(made.pop("prompt").encode("utf-8", "replace"), digest_size=8).digest()
        return made | {"key": int.from_bytes(key, "big", signed=True)}

    dated = "strftime_now" in str(tokenizer.chat_template) and str(getattr(tokenizer, "today", ""))
    settings = (rows._fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)
    settings += (tokenizer.chat_template, dated, encode.func.__name__, encode.keywords, Path(__file__).read_text())
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not is_first:
        dist.barrier()  # the first process of a machine goes ahead; the others find in the cache what it has made
    encoded = rows.map(
        encode_one, with_indices=True, remove_columns=rows.column_names, features=features,
        num_proc=min(os.cpu_count(), 16) if len(rows) > 20_000 else None, desc=f"tokenising {Path(source).name}",
        new_fingerprint=blake2b(repr(settings).encode(), digest_size=16).hexdigest(),
    )  # fmt: skip
    if dist.is_initialized() and is_first:
        dist.barrier()
    told = encoded["tell"][:]
    kept = [i for i, what in enumerate(told) if not (what or "").startswith("dropped: ")]
    counts = Counter(filter(None, told)).most_common(8)
    sentences = [f"{count} of {len(rows)} rows {what}." for what, count in counts]
    if required and not kept:
        raise SystemExit(f"{source}: no row can be used: " + " ".join(sentences))
    for sentence in sentences if required else []:
        tell(f"{source}: {sentence}")
    return encoded.select(kept) if len(kept) < len(rows) else encoded


def with_rows(some: dict) -> dict:
    """A batch of an encoded data set, with its rows as dicts again."""
    return {**some, "row": [json.loads(row or "{}") for row in some["row"]]} if "row" in some else some


def encode_question(tokenizer, row: dict, max_tokens: int, needs_answer: bool, instruction: str) -> dict:
    """A row of `encode_questions`, with the `prompt` it is held out by. Raises ValueError if it cannot be asked."""
    prompt = first_of(row, *PROMPT)
    if instruction:
        *before, asked = read_messages(prompt)
        prompt = [*before, {**asked, "content": asked["content"] + instruction}]
    try:
        row["answer"] = gold_answers(row)
    except ValueError:
        if needs_answer:
            raise
        row.pop("answer", None)
    text, prefill = opening_text(tokenizer, prompt, row.get("tools"))
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template).ids
    if not 0 < len(ids) <= max_tokens:
        raise ValueError(f"a prompt of more than {max_tokens} tokens (--max-prompt-tokens)" if ids else "no prompt")
    return {"ids": ids, "prefill": prefill, "row": json.dumps(row, default=str), "prompt": text}


def encode_questions(
    tokenizer, rows, source: str, max_tokens: int, needs_answer=True, required=True, instruction: str = ""
):
    """Questions as a data set of `ids` (the prompt's), `prefill` (the part of the assistant's turn that the prompt
    already contains) and `row` (a dict; its `answer`, if any, is a list of texts). Rows with no prompt, one of more
    than `max_tokens`, or no answer where one is needed are dropped (see `encode_rows`, also for `required`). An
    `instruction` is put behind what is asked."""
    settings = {"max_tokens": max_tokens, "needs_answer": needs_answer, "instruction": instruction}
    encode = partial(encode_question, tokenizer, **settings)
    columns = {"prefill": "string", "row": "string"}
    return encode_rows(tokenizer, rows, source, encode, columns, required).with_transform(with_rows)


def encode_conversation(tokenizer, row: dict, max_length: int, loss_on: str) -> dict:
    """A row for `encode_conversations`. Rows of one `prompt`, all up to the first question, are held out together.
    Raises ValueError if nothing can be learned from it."""
    said = read_conversation(row)
    if isinstance(said, str):
        prompt, ids = said, encode_text(tokenizer, said) + [tokenizer.eos_token_id]
        mask = [True] * len(ids)
    else:
        ids, mask = render_chat(tokenizer, said, row.get("tools"))
        asked = next((i for i, message in enumerate(said) if message["role"] == "user"), 0)
        prompt = repr([(message["role"], message.get("content")) for message in said[: asked + 1]])
    trained = ([True] * len(ids) if loss_on == "all" else mask)[:max_length]
    if not any(trained[1:]):
        raise ValueError("no token of the assistant within --max-length" if any(mask) else "nothing to train on")
    cut = f"cut after {max_length} tokens (--max-length)" if len(ids) > max_length else None
    return {"ids": ids[:max_length], "mask": trained, "tell": cut, "prompt": prompt}


def encode_conversations(tokenizer, rows, source: str, max_length: int, loss_on: str = "assistant"):
    """Conversations as a data set of `ids`, `mask` (which of them are trained) and `index` (of the row in `rows`).
    Longer ones are cut to `max_length` tokens; rows from which nothing could be learned are dropped."""
    encode = partial(encode_conversation, tokenizer, max_length=max_length, loss_on=loss_on)
    return encode_rows(tokenizer, rows, source, encode, {"mask": "bools"})


def encode_comparison(tokenizer, row: dict, max_prompt: int, max_completion: int, least: int, whole: bool) -> dict:
    """A row of `encode_comparisons`. Raises ValueError if its answers cannot be compared, or are fewer than `least`."""
    conversations, prompts, completions = read_answers(row, least), [], []
    for conversation in conversations if whole else [conversations[0], *conversations[1:][-1:]]:
        ids, mask = render_chat(tokenizer, conversation, row.get("tools"))
        end = len(mask) - mask[::-1].index(True)
        start = end - mask[end - 1 :: -1].index(False)
        prompts.append(ids[:start])
        completions.append(ids[start:] if whole else ids[start:end])
    is_long = max(map(len, completions)) > max_completion
    completions = [ids[:max_completion] for ids in completions]
    if len(set(map(tuple, prompts))) > 1:
        raise ValueError("the chat template writes the same prompt differently before another answer")
    if len(prompts[0]) > max_prompt:
        raise ValueError(f"a prompt of more than {max_prompt} tokens (--max-prompt-tokens)")
    if whole and is_long:
        raise ValueError(f"an answer of more than {max_completion} tokens (--max-completion-tokens)")
    if len(set(map(tuple, completions))) < len(completions):
        raise ValueError("two answers are equal")
    margin, probability = float(row.get("margin", 0)), float(row.get("chosen_probability", 1))
    labels = [row.get("label")] if len(completions) == 1 else [True, False]
    if not (0 <= probability <= 1 and abs(margin) < float("inf")):
        raise ValueError("chosen_probability must lie between 0 and 1, and margin must be a number")
    if not whole and labels[0] not in (True, False):
        raise ValueError(f"label must be true or false, not {labels[0]!r}")
    if probability < 0.5:  # so that the first is the more probable one
        completions, margin, probability = completions[::-1], -margin, 1 - probability
    pair = {"ids": prompts[0], "completions": completions, "ends": [[len(ids)] for ids in completions]}
    pair |= {"labels": list(map(bool, labels)), "margin": margin, "probability": probability, "row": "{}"}
    with suppress(ValueError):
        pair["row"] = json.dumps({"answer": gold_answers(row)})
    cut = f"cut after {max_completion} tokens (--max-completion-tokens)" if is_long else None
    return {**pair, "prefill": "", "prompt": repr(prompts[0]), "tell": cut}


def encode_solution(tokenizer, row: dict, max_prompt: int, max_completion: int, separator: str) -> dict:
    """A row of `encode_comparisons` with a `separator`: all steps of a solution are the only one of its `completions`.
    Steps and separators are tokenised apart, so that a step's last token never merges with what follows. Raises
    ValueError if it cannot be read."""
    steps, labels, ids, ends = first_of(row, "completions"), first_of(row, "labels"), [], []
    if not (isinstance(steps, list) and isinstance(labels, list) and len(steps) == len(labels) > 0):
        raise ValueError("completions and labels must be lists of the same length, a label for every step")
    if not all(isinstance(step, str) and step.strip() for step in steps) or not all(x in (0, 1) for x in labels):
        raise ValueError("steps must be texts that are not empty, and labels true or false")
    for step in steps:
        ids += encode_text(tokenizer, step, begins=False) + encode_text(tokenizer, separator, begins=False)
        ends.append(len(ids))
    prompt = encode_prompt(tokenizer, first_of(row, *PROMPT))
    if len(prompt) > max_prompt or len(ids) > max_completion:
        limits = "(--max-prompt-tokens, --max-completion-tokens)"
        raise ValueError(f"over {max_prompt} and {max_completion} tokens {limits}")
    scored = {"completions": [ids], "ends": [ends], "labels": list(map(bool, labels))}
    return {"ids": prompt, **scored, "prompt": repr(prompt)}


def encode_comparisons(
    tokenizer, rows, source: str, max_prompt: int, max_completion: int, least: int = 2, whole=False, separator=None
):
    """Rows as a data set of a prompt's `ids`, its `completions` from best to worst, and what belongs to these: `labels`
    (a single one has the row's own), `margin`, the `probability` that they are in this order, and `ends`, the lengths
    at which they are scored. Its rows serve as questions, too. Completions are the best and the worst up to their
    end-of-turn token, cut after `max_completion`; or, if `whole`, all up to the conversation's end. Rows with a longer
    prompt or a longer `whole` completion are dropped (see `encode_rows`)."""
    assert max_prompt > 0, "--max-completion-tokens fills the model's whole context"
    budget = {"max_prompt": max_prompt, "max_completion": max_completion}
    encode = partial(encode_comparison, tokenizer, **budget, least=least, whole=whole)
    if separator is not None:
        encode = partial(encode_solution, tokenizer, **budget, separator=separator)
    columns = {"completions": "lists", "ends": "lists", "labels": "bools", "margin": "float64"}
    columns |= {"probability": "float64", "prefill": "string", "row": "string"}
    return encode_rows(tokenizer, rows, source, encode, columns).with_transform(with_rows)


def load_questions(
    tokenizer, dataset: str, eval_dataset: str | None, eval_rows: int, max_tokens: int, seed: int, **settings
):
    """Two sets from `encode_questions`, which takes the `settings`: to train and to evaluate on (see `load_split`)."""
    assert max_tokens > 0, "--max-completion-tokens fills the model's whole context"
    encode = partial(encode_questions, tokenizer, max_tokens=max_tokens, **settings)
    return load_split(encode, dataset, eval_dataset, eval_rows, seed)


def load_split(encode: Callable, dataset: str, eval_dataset: str | None, eval_rows: int, seed: int):
    """What `encode(rows, source)` makes of the rows to train on, and of those to evaluate on: the first `eval_rows` of
    `eval_dataset`, or, if that is None, some held out of the others (see `hold_out`)."""
    encoded = encode(load_rows(dataset), dataset)
    if eval_dataset:
        return encoded, encode(load_rows(eval_dataset, eval_rows), eval_dataset)
    (encoded,), held_out = hold_out([encoded], eval_rows, seed)
    return encoded, held_out


def hold_out(sets: list, count: int, seed: int) -> tuple[list, object]:
    """Hold out `count` prompts of the first set, at least one and at most a tenth, and drop their rows from all sets.
    Returns the sets, and one row of each held-out prompt. Exits with a sentence if the first set has only one."""
    keys, first = numpy.unique(sets[0].with_format("numpy")["key"][:], return_index=True)
    if len(keys) < 2:
        raise SystemExit("One prompt is too few to hold any out for evaluation: give more rows, or --eval-dataset.")
    held = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).numpy()
    held = held[: max(1, min(count, len(keys) // 10))]
    is_held = [numpy.isin(rows.with_format("numpy")["key"][:], keys[held]) for rows in sets]
    kept = [rows.select(numpy.flatnonzero(~out)) for rows, out in zip(sets, is_held)]
    assert all(map(len, kept)), "holding prompts out leaves a data set without rows: give --eval-dataset"
    return kept, sets[0].select(first[held])


# ---------------------------------------------------------------------------------------- padding, packing, batches


def pad_rows(rows: Sequence[torch.Tensor], width: int | None = None) -> torch.Tensor:
    """Tensors of different lengths as the rows of one [B, T], filled with zeros on the right up to `width`."""
    padded = pad_sequence(list(rows), batch_first=True)
    return padded if width is None else F.pad(padded, (0, width - padded.shape[1]))


def pad(sequences: list[list[int]], pad_id: int, side: str = "right"):
    """Token lists as `ids`, `attention_mask` and `position_ids`, each int64 [B, T]. Positions count from the first real
    token whichever side is padded, because a model given left-padded rows without them sees shifted positions."""
    rows, options = [torch.tensor(ids, dtype=torch.long) for ids in sequences], {"padding_side": side}
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, **options)
    return pad_sequence(rows, batch_first=True, padding_value=pad_id, **options), mask, (mask.cumsum(1) - 1) * mask


class Segment(NamedTuple):  # a run of tokens in a packed row
    ids: list[int]
    mask: list[bool]  # which of them are scored
    prefix: int | None = None  # the earlier segment that they continue, such as a prompt; None for a text of its own


@dataclass
class Packed:
    """Segments laid end to end in one row of N tokens without any padding. Positions continue from a segment's prefix;
    a token sees its prefix and its own segment up to itself, nothing else. S tokens are scored; the first token of a
    segment without prefix never is, since nothing predicts it."""

    ids: torch.Tensor  # [1, N]
    position_ids: torch.Tensor  # [1, N]
    sources: torch.Tensor  # [S] index of the token whose output predicts the scored token
    targets: torch.Tensor  # [S] id of the scored token
    lengths: list[int]  # scored tokens per segment that has any, in order; sums to S
    document_lengths: torch.Tensor  # [N] tokens in the text (prefix included) that the token belongs to
    # Segments of about the same length attend in one call: places in the row of their queries [n, Tq], padded on the
    # right with any, and of their keys [n, P + Tq], the prefix's tokens and then their own; and P.
    blocks: list[tuple[torch.Tensor, torch.Tensor, int]]
    unpack: torch.Tensor  # [N] where each token's output stands among the blocks' flattened outputs

    def to(self, device) -> Packed:
        to = partial(torch.Tensor.to, device=device, non_blocking=True)  # waits for nothing that the device computes
        moved = {name: to(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        blocks = [(to(queries), to(keys), length) for queries, keys, length in self.blocks]
        return replace(self, **moved, blocks=blocks)


def pack(segments: list[Segment]) -> Packed:
    """Lay segments end to end. A segment's prefix must stand before it and have no prefix itself."""
    lengths = torch.tensor([len(segment.ids) for segment in segments])
    starts = lengths.cumsum(0) - lengths
    prefixes = torch.tensor([segment.prefix or 0 for segment in segments])
    continues = torch.tensor([segment.prefix is not None for segment in segments])
    offsets = lengths[prefixes] * continues  # tokens in the prefix

    # Of each token: its segment, its place in the row and in the segment, and whether it is scored. The last token of
    # the prefix predicts the first of its continuation; a text's own first token has no source.
    owner = torch.arange(len(segments)).repeat_interleave(lengths)
    place = torch.arange(len(owner))
    inside = place - starts[owner]
    source = torch.where(inside > 0, place - 1, (starts[prefixes] + offsets - 1)[owner])
    scored = torch.tensor([is_scored for segment in segments for is_scored in segment.mask], dtype=torch.bool)
    scored &= (inside > 0) | continues[owner]
    ids = torch.tensor([token for segment in segments for token in segment.ids])

    # Attention is computed block by block: segments that continue prefixes of one length, sorted by their own
    # length so that little of a block is padding.
    shapes, groups = list(zip(offsets.tolist(), lengths.tolist())), []
    for i in sorted(lengths.nonzero()[:, 0].tolist(), key=shapes.__getitem__, reverse=True):
        prefix_length, width = shapes[groups[-1][0]] if groups else (None, None)
        if shapes[i][0] != prefix_length or shapes[i][1] < 0.75 * width - 8:
            groups.append([])
        groups[-1].append(i)
    blocks, unpack, filled = [], torch.empty_like(place), 0
    for members in groups:
        prefix_length, width = shapes[members[0]]
        column, length = torch.arange(width), lengths[members, None]
        queries = starts[members, None] + torch.minimum(column, length - 1)
        prefix = starts[prefixes[members], None] + torch.arange(prefix_length)
        real = column < length
        unpack[queries[real]] = filled + real.flatten().nonzero()[:, 0]
        filled += real.numel()
        blocks.append((queries, torch.cat([prefix, queries], dim=1), prefix_length))
    return Packed(
        ids=ids[None],
        position_ids=(offsets[owner] + inside)[None],
        sources=source[scored],
        targets=ids[scored],
        lengths=owner[scored].unique_consecutive(return_counts=True)[1].tolist(),
        document_lengths=(offsets + lengths)[owner],
        blocks=blocks,
        unpack=unpack,
    )


def pack_completions(prompts: list[list[int]], completions: list[list[int]], masks=None) -> Packed:
    """Pack completions behind their prompts; all their tokens are scored, or those that `masks` names. A prompt that
    equals the one before it is laid out once and shared, so G samples of a prompt cost one prompt."""
    segments: list[Segment] = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        if i == 0 or prompt != prompts[i - 1]:
            prefix = len(segments)
            segments.append(Segment(prompt, [False] * len(prompt)))
        segments.append(Segment(completion, masks[i] if masks else [True] * len(completion), prefix))
    return pack(segments)


def pack_scored(examples: list[dict]) -> tuple[Packed, torch.Tensor]:
    """Rows of `encode_comparisons` as one packed row, and the places [S] in it where scores are read, which are the
    `ends` of completions. The completions of a prompt share it."""
    segments, places, filled = [], [], 0
    for example in examples:
        prefix = len(segments)
        segments.append(Segment(example["ids"], [False] * len(example["ids"])))
        filled += len(example["ids"])
        for ids, ends in zip(example["completions"], example["ends"]):
            segments.append(Segment(ids, [False] * len(ids), prefix))
            places += [filled + end - 1 for end in ends]
            filled += len(ids)
    return pack(segments), torch.tensor(places)


def split_by_tokens(sequences: list[list[int]], max_tokens: int, prompts: list[list[int]] | None = None):
    """Group consecutive sequences into microbatches of at most `max_tokens` tokens, or of one that is longer: a list of
    lists of indices. With `prompts`, each stands behind its own, and equal neighbours in a microbatch share one."""
    groups, filled, before = [], 0, None
    for i, (prompt, sequence) in enumerate(zip(prompts or [[]] * len(sequences), sequences)):
        cost = len(sequence) if prompt == before else len(prompt) + len(sequence)
        if not groups or filled + cost > max_tokens:
            groups.append([])
            filled, cost = 0, len(prompt) + len(sequence)
        groups[-1].append(i)
        filled, before = filled + cost, prompt
    return groups


def microbatches(sequences, prompts, max_tokens: int, rows: Sequence[int] | None = None) -> list[tuple]:
    """Split the indices `rows`, by default all of `sequences`, into microbatches (see `split_by_tokens`), as a list of
    (indices, weight). Weight is 1. All processes call this together and get equally many, because they gather sharded
    weights together: one with fewer adds its sequence 0 with weight 0, so it must have one."""
    rows = range(len(sequences)) if rows is None else rows
    split = split_by_tokens([sequences[i] for i in rows], max_tokens, prompts and [prompts[i] for i in rows])
    parts = [([rows[j] for j in part], 1.0) for part in split]
    if dist.is_initialized():
        most = torch.tensor(len(parts), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(most, dist.ReduceOp.MAX)
        parts += [(parts[0][0] if parts else [0], 0.0)] * (int(most) - len(parts))
    return parts


def example_microbatches(examples: list[dict], max_tokens: int, count: int | None = None):
    """`microbatches` of the first `count` examples, by default all: rows of `ids` and the `completions` behind them."""
    texts, prompts = [sum(one["completions"], []) for one in examples], [one["ids"] for one in examples]
    return microbatches(texts, prompts, max_tokens, range(len(examples) if count is None else count))


def merged(found: dict[int, object]) -> list:
    """What all processes have found under the numbers 0, 1, …, in this order, on every process."""
    shares = [found] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(shares, found)
    return [value for _, value in sorted(item for share in shares for item in share.items())]


def shuffled_passes(count: int, draws: int, seed: int) -> list[int]:
    """`draws` indices from passes over `count` rows, each in an order of its own. More draws only extend them: a
    resumed run may be given more steps."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-draws // count))]
    return torch.cat(passes)[:draws].tolist()


def shuffled_pass(rows, step: int, size: int, seed: int) -> list:
    """The `size` rows of `step` 1, 2, … in shuffled passes over `rows`, a function of seed and step alone."""
    places, order = range((step - 1) * size, step * size), {}
    for epoch in {place // len(rows) for place in places}:
        order[epoch] = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch))
    return [rows[int(order[place // len(rows)][place % len(rows)])] for place in places]


def with_mismatches(rows, seed: int) -> Callable[[int], dict]:
    """A function that gives row i of `encode_comparisons` with one more of its `completions` in front: an answer of
    either kind to another prompt, drawn in linear time but for a sort."""
    keys = torch.tensor([row["key"] for row in rows] if isinstance(rows, list) else rows["key"][:])
    _, group, sizes = keys.unique(return_inverse=True, return_counts=True)
    assert len(sizes) > 1, "all prompts are the same: there is no answer to another one"
    uniform = torch.rand(len(keys), generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    places = sizes.cumsum(0)[group] + (uniform * (len(keys) - sizes[group])).long()  # prompt by prompt, behind its own
    others = group.argsort(stable=True)[places % len(keys)].tolist()

    def example(i: int) -> dict:
        answers = rows[others[i]]["completions"]
        return {**rows[i], "completions": [answers[i % len(answers)], *rows[i]["completions"]]}

    return example
