"""From text to token ids: load a tokenizer, render chats with exact masks, pad, and pack.

Three rules hold everywhere in this project, and the functions here are what makes them hold:

* masks come from lengths and spans, never from `ids != pad` (pad is often the end-of-sequence token);
* the token that ends a turn belongs to the assistant, so a model learns to stop;
* text that a user, a tool or a data set wrote cannot become a special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

SENTINEL = "\ue000"  # private-use character: marks where a forged special token is cut, never tokenised


def load_tokenizer(path: str, trust_remote_code: bool = False, flag: str = "--model"):
    """The tokenizer at `path` (folder or Hub name), with a pad token; exits with a sentence, in which `flag` says where
    `path` came from, if there is none.

    The pad id is only a filler: nothing ever compares ids with it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(
            f"{flag} {path}: no tokenizer could be loaded from there ({_first_line(error)}). Give a folder saved "
            "with save_pretrained, or a Hub name that this machine can reach."
        ) from error
    if tokenizer.eos_token is None:
        raise SystemExit(f"{flag} {path}: its tokenizer has no end-of-sequence token, so no text could ever stop.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------- plain text


def _neutralise(tokenizer, text: str, special_only: bool) -> str:
    """Put a sentinel inside every literal of an added token, so that the tokenizer no longer recognises it."""
    added = [t for t in tokenizer.added_tokens_decoder.values() if len(t.content) > 1]
    literals = sorted({t.content for t in added if t.special or not special_only}, key=len, reverse=True)
    text = text.replace(SENTINEL, "")
    if not literals:
        return text
    pattern = re.compile("|".join(map(re.escape, literals)))
    while match := pattern.search(text):
        text = text[: match.start() + 1] + SENTINEL + text[match.start() + 1 :]
    return text


def _encode(tokenizer, text: str) -> list[int]:
    """Ids of rendered text. Pieces between sentinels are encoded apart; no BOS or EOS is added."""
    pieces = [piece for piece in text.split(SENTINEL) if piece]
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]


def encode_text(tokenizer, text: str, by_assistant: bool = False) -> list[int]:
    """Token ids of text from outside: special tokens written in it stay ordinary characters. An assistant may write
    added tokens that are no control tokens, such as <think>."""
    return _encode(tokenizer, _neutralise(tokenizer, text, special_only=by_assistant))


# ---------------------------------------------------------------------------------------------- chats


class Rendered(NamedTuple):
    """A rendered conversation: its token ids, and for each whether the assistant wrote it."""

    ids: list[int]
    mask: list[bool]


def _render(tokenizer, messages: list[dict], tools, generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt)


def end_of_turn(tokenizer) -> str:
    """The literal special token with which the chat template closes an assistant turn, e.g. `<|im_end|>`."""
    require_chat_template(tokenizer)
    ask, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "REPLY"}
    rest = _render(tokenizer, [ask, reply], None, False).rpartition("REPLY")[2]
    specials = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    found = sorted((rest.find(s), -len(s), s) for s in specials if s in rest)
    if not found:
        raise SystemExit(
            f"The chat template of {tokenizer.name_or_path} ends an assistant turn without a special token, so a "
            "model trained with it would never stop. Use a template that closes the turn (for example with the "
            "end-of-sequence token)."
        )
    return found[0][2]


def require_chat_template(tokenizer) -> None:
    """Exit with a sentence where messages are to be rendered and the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise SystemExit(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, but the data holds messages. Use the "
            "instruct version of the model, set tokenizer.chat_template and save it, or give plain text."
        )


def stop_token_ids(tokenizer, model=None) -> list[int]:
    """Every id that ends a completion: the tokenizer's EOS, the chat template's end of turn, the model's own list."""
    stops = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        stops.add(tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer)))
    configured = model.generation_config.eos_token_id if model is not None and model.generation_config else None
    stops.update([configured] if isinstance(configured, int) else configured or [])
    return sorted(stops)


def render_chat(
    tokenizer, messages: list[dict], tools: list | None = None, generation_prompt: bool = False
) -> Rendered:
    """Token ids of a conversation and the mask of what the assistant wrote, end-of-turn token included.

    Args:
        messages: `{"role": …, "content": …}` dicts, oldest first.
        tools: JSON schemas for templates that know tools.
        generation_prompt: end with the header of an assistant turn, ready to be continued by sampling.

    The conversation is rendered once as a whole. An assistant turn begins where the same conversation up to
    there, with a generation prompt, ends, and closes with the first end-of-turn token after that, which its
    content cannot contain because it is neutralised. This needs no `{% generation %}` in the template and
    is right for templates that drop the reasoning of earlier turns. A template that changes what stands *before* an
    assistant turn depending on what follows has no exact mask and is refused. Text is tokenised in pieces cut
    at those boundaries, so that a prompt's ids at sampling time are a prefix of the ids trained on.
    """
    require_chat_template(tokenizer)
    safe = []
    for message in messages:
        # An assistant may write added tokens that are no control tokens, such as <think> or <tool_call>.
        special_only = message.get("role") == "assistant"
        content = message.get("content")
        if isinstance(content, str):
            message = {**message, "content": _neutralise(tokenizer, content, special_only)}
        safe.append(message)
    text = _render(tokenizer, safe, tools, generation_prompt)
    closing = end_of_turn(tokenizer) if any(m.get("role") == "assistant" for m in safe) else ""
    ids: list[int] = []
    mask: list[bool] = []

    def append(piece: str, is_assistant: bool) -> None:
        tokens = _encode(tokenizer, piece)
        ids.extend(tokens)
        mask.extend([is_assistant] * len(tokens))

    done = 0  # characters of `text` encoded so far
    for i, message in enumerate(safe):
        if message.get("role") != "assistant":
            continue
        before = _render(tokenizer, safe[:i], tools, True)
        end = text.find(closing, len(before))
        if not text.startswith(before) or end < 0:
            raise SystemExit(
                f"The chat template of {tokenizer.name_or_path} rewrites earlier turns: up to message {i} the "
                "conversation is not rendered as it is at the end of the whole, so the tokens the assistant wrote "
                "cannot be told apart. Give one assistant turn per row, or use a template that only appends."
            )
        end += len(closing)
        append(text[done : len(before)], False)
        append(text[len(before) : end], True)
        done = end
    append(text[done:], False)
    return Rendered(ids, mask)


def as_messages(value: str | list[dict], role: str) -> list[dict]:
    """A text becomes one message of `role`; a list of messages stays what it is."""
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def encode_prompt(tokenizer, prompt: str | list[dict], tools: list | None = None) -> list[int]:
    """Ids to continue by sampling. Plain text becomes a user's turn where the tokenizer has a chat template."""
    if isinstance(prompt, str) and not tokenizer.chat_template:
        return encode_text(tokenizer, prompt)
    return render_chat(tokenizer, as_messages(prompt, "user"), tools, generation_prompt=True).ids


def knows_tools(tokenizer) -> bool:
    """Whether the chat template tells the model which tools there are."""
    require_chat_template(tokenizer)
    probe = {"name": "probe_of_tools", "description": "", "parameters": {"type": "object", "properties": {}}}
    try:
        text = _render(tokenizer, as_messages("a", "user"), [{"type": "function", "function": probe}], True)
    except Exception:  # whatever a template that does something else with `tools` may raise
        return False
    return "probe_of_tools" in text


def encode_between_turns(tokenizer, messages: list[dict]) -> list[int]:
    """Ids that the template puts between a turn of the assistant and its next one, with `messages` in between.

    What an agent has sampled is never rendered again, so what it reads in between is tokenised by itself: rendered
    behind a dummy exchange, and taken from behind the assistant's end-of-turn token up to the header of its next turn.
    """
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "REPLY"}]
    safe = [
        {key: value if key == "role" else _neutralise(tokenizer, value, special_only=False) for key, value in m.items()}
        for m in messages
    ]
    text = _render(tokenizer, [*exchange, *safe], None, True)
    # The first of either: what stands before them is the template's own, what comes after may be anything.
    return _encode(tokenizer, text.partition("REPLY")[2].partition(end_of_turn(tokenizer))[2])


def require_kept_history(tokenizer, opening: list[dict], observation: list[dict], tools: list | None = None) -> None:
    """Exit with a sentence where the template renders what was before otherwise once `observation` has followed it.

    White space is left out of account: templates that set reasoning apart often put it on lines of its own.
    """
    reply, history = {"role": "assistant", "content": "<think>one</think>two"}, opening
    for _ in range(2):
        before = _render(tokenizer, history, tools, True) + reply["content"]
        history = [*history, reply, *observation]
        after = _render(tokenizer, history, tools, True)
        if not "".join(after.split()).startswith("".join(before.split())):
            raise SystemExit(
                f"The chat template of {tokenizer.name_or_path} rewrites earlier turns: once a tool has answered, what "
                "was read and written before is no longer rendered as it was (or it opens the assistant's turn with "
                "reasoning of its own). An agent trained on its own tokens would be served another history. Use a "
                "template that only appends."
            )


# ---------------------------------------------------------------------------------------------- padding


def pad_rows(rows: Sequence[torch.Tensor], width: int | None = None) -> torch.Tensor:
    """Tensors of different lengths as the rows of one [B, T], filled with zeros on the right up to `width`."""
    padded = pad_sequence(list(rows), batch_first=True)
    return padded if width is None else F.pad(padded, (0, width - padded.shape[1]))


def pad(sequences: list[list[int]], pad_id: int, side: str = "right"):
    """Token lists to rectangular tensors.

    Returns: `ids`, `attention_mask` and `position_ids`, each int64 [B, T]. Positions count from the first real
    token whichever side is padded, because a model given left-padded rows without them sees shifted positions.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', not {side!r}")
    lengths = torch.tensor([len(s) for s in sequences])
    width = int(lengths.max())
    column = torch.arange(width).expand(len(sequences), width)
    start = (width - lengths)[:, None] if side == "left" else torch.zeros(len(sequences), 1, dtype=torch.long)
    attention_mask = (column >= start) & (column < start + lengths[:, None])
    ids = torch.full((len(sequences), width), pad_id)
    ids[attention_mask] = torch.tensor([token for s in sequences for token in s])
    return ids, attention_mask.long(), ((column - start) * attention_mask).clamp(min=0)


# ---------------------------------------------------------------------------------------------- packing


class Segment(NamedTuple):
    """A run of tokens in a packed row: `mask` says which of them are scored, `prefix` which earlier segment
    they continue (a prompt shared by several completions), or None for a text of its own."""

    ids: list[int]
    mask: list[bool]
    prefix: int | None = None


class AttentionBlock(NamedTuple):
    """Segments of about the same length that attend in one call; indices point into the packed row."""

    queries: torch.Tensor  # [n, Tq] padded on the right with any valid index
    keys: torch.Tensor  # [n, P + Tq] the prefix's tokens, then the segment's own
    prefix_length: int  # P


@dataclass
class Packed:
    """Segments laid end to end in one row of N tokens without any padding.

    Positions restart with every segment that has no prefix and continue from the prefix otherwise; a token
    sees its prefix and its own segment up to itself, nothing else. S tokens are scored; the first token of a
    segment without prefix never is, since nothing predicts it.
    """

    ids: torch.Tensor  # [1, N]
    position_ids: torch.Tensor  # [1, N]
    sources: torch.Tensor  # [S] index of the token whose output predicts the scored token
    targets: torch.Tensor  # [S] id of the scored token
    lengths: list[int]  # scored tokens per segment that has any, in order; sums to S
    document_lengths: torch.Tensor  # [N] tokens in the text (prefix included) that the token belongs to
    blocks: list[AttentionBlock]
    unpack: torch.Tensor  # [N] where each token's output stands among the blocks' flattened outputs

    def to(self, device) -> Packed:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        blocks = [AttentionBlock(b.queries.to(device), b.keys.to(device), b.prefix_length) for b in self.blocks]
        return Packed(**{**vars(self), **moved, "blocks": blocks})


def pack(segments: list[Segment]) -> Packed:
    """Lay segments end to end. A segment's prefix must stand before it and have no prefix itself."""
    starts, positions, sources, targets, lengths, document_lengths = [], [], [], [], [], []
    total = 0
    for ids, mask, prefix in segments:
        offset = 0 if prefix is None else len(segments[prefix].ids)
        starts.append(total)
        positions += range(offset, offset + len(ids))
        document_lengths += [offset + len(ids)] * len(ids)
        # The last token of the prefix predicts the first of its continuation; a text's own first token has no source.
        before = None if prefix is None else starts[prefix] + offset - 1
        scored = [j for j, m in enumerate(mask) if m and (j > 0 or before is not None)]
        sources += [total + j - 1 if j > 0 else before for j in scored]
        targets += [ids[j] for j in scored]
        if scored:
            lengths.append(len(scored))
        total += len(ids)

    # Attention is computed block by block: segments that continue prefixes of one length, sorted by their own
    # length so that little of a block is padding.
    def shape(i: int) -> tuple[int, int]:
        prefix = segments[i].prefix
        return (0 if prefix is None else len(segments[prefix].ids)), len(segments[i].ids)

    blocks: list[AttentionBlock] = []
    unpack = torch.empty(total, dtype=torch.long)
    filled = 0
    order = sorted((i for i in range(len(segments)) if segments[i].ids), key=shape, reverse=True)
    while order:
        prefix_length, width = shape(order[0])
        members = [i for i in order if shape(i)[0] == prefix_length and shape(i)[1] >= 0.75 * width - 8]
        chosen = set(members)
        order = [i for i in order if i not in chosen]
        begin = torch.tensor([starts[i] for i in members])[:, None]
        length = torch.tensor([len(segments[i].ids) for i in members])[:, None]
        column = torch.arange(width)[None]
        queries = begin + torch.minimum(column, length - 1)  # [n, width]
        keys = queries
        if prefix_length:
            prefix_begin = torch.tensor([starts[segments[i].prefix] for i in members])[:, None]
            keys = torch.cat([prefix_begin + torch.arange(prefix_length)[None], queries], dim=1)
        real = column < length
        unpack[queries[real]] = (filled + torch.arange(len(members) * width).view(-1, width))[real]
        filled += len(members) * width
        blocks.append(AttentionBlock(queries, keys, prefix_length))
    return Packed(
        ids=torch.tensor([[t for s in segments for t in s.ids]]),
        position_ids=torch.tensor([positions]),
        sources=torch.tensor(sources, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        lengths=lengths,
        document_lengths=torch.tensor(document_lengths),
        blocks=blocks,
        unpack=unpack,
    )


def pack_completions(
    prompts: list[list[int]], completions: list[list[int]], masks: list[list[bool]] | None = None
) -> Packed:
    """Pack completions behind their prompts; all their tokens are scored, or those that `masks` names.

    A prompt that equals the one before it is laid out once and shared, so G samples of a prompt cost one prompt.
    """
    segments: list[Segment] = []
    prefix = None
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        if i == 0 or prompt != prompts[i - 1]:
            prefix = len(segments)
            segments.append(Segment(prompt, [False] * len(prompt)))
        segments.append(Segment(completion, masks[i] if masks else [True] * len(completion), prefix))
    return pack(segments)


def split_by_tokens(sequences: list[list[int]], max_tokens: int, prompts: list[list[int]] | None = None):
    """Group consecutive sequences into microbatches of at most `max_tokens` tokens, or of one that is longer.

    With `prompts`, each sequence stands behind its own, and equal neighbours in a microbatch share one.
    Returns: a list of lists of indices.
    """
    groups: list[list[int]] = []
    filled = 0
    for i, sequence in enumerate(sequences):
        prompt = len(prompts[i]) if prompts else 0
        is_shared = bool(prompts) and i > 0 and prompts[i] == prompts[i - 1]
        cost = len(sequence) + (0 if is_shared else prompt)
        if not groups or filled + cost > max_tokens:
            groups.append([])
            filled, cost = 0, len(sequence) + prompt
        groups[-1].append(i)
        filled += cost
    return groups
