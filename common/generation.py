"""The sampler: many completions from an ordinary `transformers` model, fast, seeded, with exact log-probabilities.

What makes it faster than `model.generate` for reinforcement learning:

* a prompt is prefilled once, and on a CPU its keys and values are read once a step for all of its samples: attention
  to the prompt and attention to a sample's own tokens are computed apart and merged by their log-sum-exps;
* every row has a slot of its own in preallocated key/value memory; a row that ends gives its slot to the last
  live row or to a waiting one, so finished rows are not computed and long tails overlap with new rows;
* an agent's next turn begins where its last one ended: earlier keys and values can be kept between calls;
* a token is drawn by an inverse CDF in two levels (blocks of the vocabulary, then the block), which needs one
  pass over the logits, and the chosen logit minus logsumexp is its log-probability for free;
* on CUDA one decoding step is a captured graph per size, replayed per token, and the host looks at the
  results only every few tokens.

Randomness is one uniform number per token that depends on the seed, the index of the sample and the position,
and on nothing else: the same seed gives the same samples in whatever order, batch or process they are drawn.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
import sys
import warnings
import weakref
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import kl
from common.tokenizer import (
    first_line,
    load_rows,
    merged,
    opening_text,
    read_conversation,
    read_lines,
    read_row,
    stop_token_ids,
    tell,
    user_opening,
)


class Completion(NamedTuple):
    """One sample: token ids with the stop token if there is one, the log-probability of each under the sampling
    distribution (float32, at the sampling temperature), and whether it stopped by itself or was cut."""

    ids: list[int]
    logprobs: list[float]
    stopped: bool


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row from softmax(logits) by inverse CDF. logits float32 [R, V] is overwritten; uniform [R].

    Returns: ids [R] and their log-probabilities [R]. Blocks of about √V keep the cumulative sums short.
    """
    rows, vocabulary = logits.shape
    block = max(d for d in range(1, math.isqrt(vocabulary) + 1) if vocabulary % d == 0)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_().view(rows, -1, block)
    cumulative = weights.sum(-1).cumsum(-1)  # [R, V/block]
    total = cumulative[:, -1]
    # Kept below 1 by more than float32 rounding, a threshold always falls inside a token of positive weight.
    uniform = uniform.clamp(max=1 - 1e-6)
    threshold = (uniform * total)[:, None]
    chosen = (cumulative <= threshold).sum(-1, keepdim=True)  # [R, 1]
    inside = weights.gather(1, chosen[..., None].expand(-1, -1, block))[:, 0]  # [R, block]
    steps = inside.cumsum(-1)
    upper = cumulative.gather(1, chosen)
    fraction = 1 - (upper - threshold) / inside.sum(-1, keepdim=True)
    offset = (steps <= fraction.clamp(0, 1 - 1e-6) * steps[:, -1:]).sum(-1, keepdim=True)
    logprobs = inside.gather(1, offset).log() - total.log()[:, None]
    return (chosen * block + offset)[:, 0], logprobs[:, 0]


class Sampler:
    """Draws completions from `model`; call `sync` after its weights have changed.

    Args:
        model: the trained causal language model. It is sampled from directly where it can be; in another `dtype` or
            when its weights are sharded or have adapters, from a copy that `sync` brings up to date.
        stop_ids: token ids that end a completion.
        dtype: of the matrix products and of keys and values; logits are float32 always.
        memory_gb: bound on keys and values, kept ones included; rows beyond it wait. Default: 4 on a CPU, else a fifth
            of the card, which leaves room for gradients, moments and activations.
    """

    def __init__(self, model, stop_ids: list[int], dtype: torch.dtype = torch.float32, memory_gb: float | None = None):
        self.source, self.model, self.dtype = model, model, dtype
        self.device = next(model.parameters()).device
        self.stop_ids = torch.tensor(stop_ids, device=self.device)
        self.is_served, name = kl.supports_layout(model), type(model).__name__
        self.uses_graphs = self.can_capture = self.device.type == "cuda"
        if not self.is_served:
            print(f"notice: the fast sampler does not serve {name}; using model.generate instead.", file=sys.stderr)
        memory = torch.cuda.get_device_properties(self.device).total_memory / 5 if self.uses_graphs else 4e9
        self.memory_gb = memory_gb or memory / 1e9
        is_other = any(hasattr(p, "full_tensor") or p.dtype != dtype for p in model.parameters())
        self.is_copy = is_other or hasattr(model, "peft_config")
        if self.is_copy:
            with self.device:
                self.model = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype).requires_grad_(False)
            self.model.set_attn_implementation(model.config._attn_implementation)
        self.slots: _Slots | None = None
        self.kept: dict[tuple[int, ...], torch.Tensor] = {}  # ids to keys and values [W, 2, layers, H_kv, D]
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Bring the copy up to date. All processes must call it together when weights are sharded."""
        self.kept.clear()
        if self.is_copy:
            targets = dict([*self.model.named_parameters(), *self.model.named_buffers()])
            for name, weight in kl.plain_weights(self.source):
                targets[name].copy_(weight)
        head = self.model.get_output_embeddings()
        self.head_bias, self.logit_shape = head.bias, kl.logit_shape(self.model)
        # A CPU multiplies in float32, where bfloat16 factors are exact; CUDA graphs hold the module's own memory.
        self.head_weight = head.weight.float() if self.device.type == "cpu" else head.weight

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int | list[int],
        num_samples: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        indices: list[int] | None = None,
        keep: bool = False,
        progress=None,
    ) -> list[list[Completion]]:
        """`num_samples` completions of each prompt, as a list per prompt.

        Args:
            prompts: token ids; they may be anything, a whole conversation so far included.
            max_tokens: budget of new tokens, one for all or one per prompt.
            temperature: 0 takes the most likely token, and reports log-probabilities at temperature 1.
            indices: the number of each prompt among those of all processes, by which its samples are seeded.
            keep: hold on to the keys and values of these samples until the next `sync`: a later prompt that continues
                one of them, as an agent's next turn does, is prefilled from there on.
            progress: called with the number of completions that have ended since the last call.
        """
        budgets = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        if not all(prompts) or min(budgets, default=1) < 1:
            raise ValueError("every prompt needs at least one token and a budget of at least one new token")
        if not prompts:
            return []
        indices = range(len(prompts)) if indices is None else indices
        numbers = [i * num_samples + k for i in indices for k in range(num_samples)]
        progress = progress or (lambda count: None)
        was_training = self.model.training
        self.model.eval()
        if self.is_served:
            uniforms = _uniforms(numbers, max(budgets), seed)
            longest, can_share = max(len(p) + b for p, b in zip(prompts, budgets)), num_samples > 1 and not keep
            slots = self._lay_out(len(numbers), longest, max(budgets), can_share)
            flat = slots.run(prompts, budgets, num_samples, temperature, uniforms, keep, progress)
        else:
            flat = self._fall_back(prompts, budgets, num_samples, temperature, seed, numbers, progress)
        self.model.train(was_training)
        return [flat[i * num_samples : (i + 1) * num_samples] for i in range(len(prompts))]

    def _lay_out(self, total: int, longest: int, columns: int, can_share: bool) -> _Slots:
        """Slots for `total` samples, texts of up to `longest` tokens and budgets of up to `columns`.

        Those of graphs must stay, and only grow. Others are each call's own, so that no sample depends, not even in the
        last bit of its log-probability, on the calls before: a resumed run has not made them.
        """
        held = (0, 0, 0)
        if self.uses_graphs:
            longest, columns = (-(-n // 64) * 64 for n in (longest, columns))
            held = self.slots.sizes if self.slots else held
        sizes = tuple(map(max, (total, longest, columns), held))
        if sizes != held:
            self.slots = None  # gone before the next is there
            self.slots = _Slots(self, *sizes, can_share)
        return self.slots

    def room(self) -> float:
        """How many bytes of memory are left beside what is kept."""
        return self.memory_gb * 1e9 - sum(kept.nbytes for kept in self.kept.values())

    def longest_kept(self, prompt: list[int]) -> tuple[int, ...]:
        """The longest kept text that `prompt` continues, or ()."""
        lengths = sorted({len(ids) for ids in self.kept if len(ids) < len(prompt)}, reverse=True)
        return next((ids for n in lengths if (ids := tuple(prompt[:n])) in self.kept), ())

    def _fall_back(self, prompts, budgets, num_samples, temperature, seed, numbers, progress) -> list[Completion]:
        """The same from `model.generate`, scored by one forward, for models whose layers have no key/value slots."""
        from transformers import GenerationConfig

        results, stops = [], self.stop_ids.tolist()
        options = {"eos_token_id": stops, "pad_token_id": stops[0], "num_return_sequences": num_samples}
        options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()  # no penalties, no min_p
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for i, (prompt, budget) in enumerate(zip(prompts, budgets)):
                torch.manual_seed((seed * 1_000_003 + numbers[i * num_samples]) % 2**63)
                ids = torch.tensor([prompt], device=self.device)
                drawn = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=budget, **options)
                drawn = drawn[:, len(prompt) :].tolist()
                ends = [next((j + 1 for j, token in enumerate(row) if token in stops), len(row)) for row in drawn]
                drawn, group = [row[:end] for row, end in zip(drawn, ends)], range(num_samples)
                scores, _ = kl.completion_logprobs(self.model, group, [prompt] * num_samples, drawn, temperature or 1.0)
                for row, logprobs in zip(drawn, scores.tolist()):
                    results.append(Completion(row, logprobs[: len(row)], row[-1] in stops))
                progress(num_samples)
        self.model.generation_config = own
        return results


def _uniforms(numbers: list[int], columns: int, seed: int) -> torch.Tensor:
    """[rows, columns] in [0, 1): a row depends on the seed and on the number of its sample alone."""
    seeds, generator = [(seed * 1_000_003 + number * 7919) % 2**63 for number in numbers], torch.Generator()
    return torch.stack([torch.rand(columns, generator=generator.manual_seed(one)) for one in seeds])


SHARE_FROM = 2**21  # bytes of keys and values per layer, over all samples, from which prompts are read once only
_LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")  # model types that `_decode_llama` computes


@dataclass
class _Prompts:
    """P prompts of about the same length, the longest of W tokens; the `layout` of their prefill, and what that leaves.

    A column is the place of a token in its prompt. What stands behind a shorter prompt, no query of it sees.
    """

    numbers: list[int]  # which prompt of the call each is
    width: int
    position: torch.Tensor  # [P, T] of the tokens that are fed
    past: torch.Tensor | None = None  # [2, layers, P, H_kv, …, D] kept keys and values before them, and room for theirs
    keys: list[torch.Tensor] = field(default_factory=list)  # of each layer [P, H_kv, D, W]
    values: list[torch.Tensor] = field(default_factory=list)  # [P, H_kv, W, D]
    mask: torch.Tensor | None = None  # [P, W] to add to the scores of any later query, None for nothing

    def attend(self, layer: int, query, key, value, scaling, window) -> torch.Tensor:
        """What `layout_attention` asks of a layout. query [P, H, T, D]; returns [P, T, H, D]."""
        if self.past is not None:
            place = self.position[:, None, :, None].expand_as(key)
            key, value = (past[layer].scatter(2, place, new) for past, new in zip(self.past, (key, value)))
            key, value = key[:, :, : self.width], value[:, :, : self.width]
        self.keys.append(key.mT.contiguous())
        self.values.append(value)
        mask, is_windowed = None, window is not None and window < self.width
        if self.past is not None or is_windowed:
            distance = self.position[..., None] - torch.arange(self.width, device=key.device)  # [P, T, W]
            mask = ((distance >= 0) & (distance < window) if is_windowed else distance >= 0)[:, None]
        return kl.grouped_attention(query, key, value, mask, scaling).transpose(1, 2)


class _Slots:
    """Key/value memory and the state of the rows being decoded; it is the `layout` of the sampler's forwards.

    Rows 0 … rows−1 are live. What a decoding step reads and writes are tensors of fixed shape on the device, so that
    a CUDA graph can replay it: of a row, `token` is fed next, `length` counts the keys of its text, `sequence` says
    which sample it draws, or `total` once that has ended; of a sample, `count` says how many tokens it has. A row's
    slot holds the keys and values of its text from place `offset` on: all of it, or its own tokens only where prompts
    are `shared`.
    """

    def __init__(self, sampler: Sampler, total: int, longest: int, columns: int, can_share: bool):
        self.sampler = weakref.proxy(sampler)  # whose memory is free as soon as it is gone
        self.device, self.total, self.sizes = sampler.device, total, (total, longest, columns)
        config = sampler.model.config.get_text_config()
        layers, (heads, dim) = config.num_hidden_layers, kl.heads_and_dim(config)
        token_bytes = 2 * heads * dim * sampler.dtype.itemsize  # of a layer
        # A window shows each sample another part of the prompt, a CUDA graph wants one shape for all, and the calls
        # that merge two parts cost more than reading a short prompt once for each sample.
        can_share = can_share and not sampler.uses_graphs and not getattr(config, "sliding_window", None)
        self.shared = can_share and total * (longest - columns) * token_bytes >= SHARE_FROM
        self.width = -(-(columns if self.shared else longest) // 64) * 64
        self.capacity = max(1, min(total, int(sampler.room() // (layers * token_bytes * self.width))))
        memory = {"dtype": sampler.dtype, "device": self.device}
        self.keys = torch.zeros(layers, self.capacity, heads, dim, self.width, **memory)
        self.values = torch.zeros(layers, self.capacity, heads, self.width, dim, **memory)
        integers = {"dtype": torch.long, "device": self.device}
        self.token, self.length, self.offset, self.sequence = torch.zeros(4, self.capacity, **integers)
        # One sample more, with a budget of 0, takes what idle rows draw.
        self.budget, self.count, self.stopped = torch.zeros(3, total + 1, **integers)
        self.ids = torch.zeros(total + 1, columns, **integers)
        self.logprobs, self.uniforms = torch.zeros(2, total + 1, columns, device=self.device)
        self.index = torch.arange(self.capacity, device=self.device)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}

    def run(self, prompts, budgets, num_samples, temperature, uniforms, keep, progress) -> list[Completion]:
        """The samples of all prompts by number: prompt i has the samples i·G … i·G + G − 1."""
        total = len(uniforms)
        self.prompts, self.group, self.temperature, self.keep = prompts, num_samples, temperature, keep
        self.uniforms[:total, : uniforms.shape[1]] = uniforms
        self.budget[:total] = torch.tensor(budgets).repeat_interleave(num_samples)
        self.count.fill_(0)
        self.sequence.fill_(self.total)
        self.rows = 0
        self.samples: list[int] = []  # the sample that each live row draws
        self.blocks: list[_Prompts] = []
        # Longest first: neighbours are prefilled together, and what may take longest starts soonest.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        waiting = [i * num_samples + k for i in order for k in range(num_samples)]
        while waiting or self.rows:
            free = self.capacity - self.rows
            if waiting and free >= min(num_samples, len(waiting), self.capacity):
                self.admit(waiting[:free])
                waiting = waiting[free:]
            else:
                self.decode()
            progress(self.release())
        drawn = self.count, self.stopped, self.ids, self.logprobs
        counts, stopped, ids, logprobs = (state[:total].tolist() for state in drawn)
        return [Completion(ids[i][:n], logprobs[i][:n], bool(stopped[i])) for i, n in enumerate(counts)]

    # ------------------------------------------------------------------ attention

    def attend(self, layer: int, query, key, value, scaling, window) -> torch.Tensor:
        """What `layout_attention` asks of a layout. query [R, H, 1, D]; returns [R, 1, H, D]."""
        return self.attend_one(layer, *(x[:, :, 0] for x in (query, key, value)), scaling, window)[:, None]

    def attend_one(self, layer: int, query, key, value, scaling, window) -> torch.Tensor:
        """Store one token's key and value [R, H_kv, D] in each row and attend to all of its text; query [R, H, D]."""
        rows = query.shape[0]
        self.keys[layer, self.index[:rows], :, :, self.place] = key
        self.values[layer, self.index[:rows], :, self.place] = value
        # The queries that share a key/value head stand side by side as its queries: no key is repeated.
        grouped = (query * scaling).view(rows, key.shape[1], -1, query.shape[-1])  # [R, H_kv, H/H_kv, D]
        keys, values = self.keys[layer, :rows, ..., : self.visible], self.values[layer, :rows, :, : self.visible]
        mask = self.mask
        if window is not None and window < self.visible:
            behind = self.place[:, None] - torch.arange(self.visible, device=self.device)
            mask = torch.where((behind >= 0) & (behind < window), 0.0, -math.inf)
        out, lse = _attention(grouped, keys, values, mask)
        if self.shared:
            out = self._merge_prompts(layer, grouped, out, lse)
        return out.view(query.shape)

    def _merge_prompts(self, layer: int, grouped, own, own_lse) -> torch.Tensor:
        """Attention to a row's own tokens merged with that to its prompt, which is read once for all its samples."""
        outs, lses = [], []
        for block, asked in zip(self.blocks, grouped[self.grid].split(self.sizes_of_blocks)):
            _, heads, queries, dim = asked.shape
            prompts = len(block.numbers)
            asked = asked.view(prompts, -1, heads, queries, dim).transpose(1, 2)  # [P, H_kv, g, H/H_kv, D]
            out, lse = _attention(asked.flatten(2, 3), block.keys[layer], block.values[layer], block.mask)
            outs.append(out.view(asked.shape).transpose(1, 2).flatten(0, 1))
            lses.append(lse.view(asked.shape[:-1]).transpose(1, 2).flatten(0, 1))
        prompt, prompt_lse = torch.cat(outs)[self.back], torch.cat(lses)[self.back]
        return prompt.lerp(own, (own_lse - prompt_lse).sigmoid().to(own.dtype)[..., None])

    # ------------------------------------------------------------------ rows come, advance and go

    def admit(self, samples: list[int]) -> None:
        """Give each sample a slot, prefill the prompts they continue, and draw their first tokens."""
        numbers = list(dict.fromkeys(sample // self.group for sample in samples))  # longest first
        while numbers:
            longest = len(self.prompts[numbers[0]])
            together = numbers[: max(1, 16384 // longest)]  # bounds the tokens of a forward
            together = [n for n in together if len(self.prompts[n]) >= 0.75 * longest - 8]
            numbers = numbers[len(together) :]
            block, hidden = self.prefill(together)
            chosen = [sample for sample in samples if sample // self.group in together]
            which = torch.tensor([together.index(sample // self.group) for sample in chosen], device=self.device)
            rows = slice(self.rows, self.rows + len(chosen))
            self.rows += len(chosen)
            self.samples += chosen
            self.sequence[rows] = torch.tensor(chosen)
            self.length[rows] = torch.tensor([len(self.prompts[sample // self.group]) for sample in chosen])
            self.offset[rows] = self.length[rows] * self.shared
            if self.shared:
                self.blocks.append(block)
            else:
                for layer, (keys, values) in enumerate(zip(block.keys, block.values)):
                    self.keys[layer, rows, ..., :longest] = keys[which]
                    self.values[layer, rows, :, :longest] = values[which]
            self._draw(hidden[which], rows)
        self._arrange()

    def prefill(self, numbers: list[int]) -> tuple[_Prompts, torch.Tensor]:
        """Keys and values of some prompts, and the hidden state [P, d] of the last token of each."""
        prompts, kept = [self.prompts[n] for n in numbers], self.sampler.kept
        pasts = [self.sampler.longest_kept(prompt) for prompt in prompts]
        lengths, known = (torch.tensor(list(map(len, some)), device=self.device) for some in (prompts, pasts))
        ids = [torch.tensor(prompt[len(past) :]) for prompt, past in zip(prompts, pasts)]
        ids = pad_sequence(ids, batch_first=True).to(self.device)  # [P, T]
        position = known[:, None] + torch.arange(ids.shape[1], device=self.device)
        block = _Prompts(numbers, max(map(len, prompts)), position)
        if any(pasts):
            layers, _, heads, dim, _ = self.keys.shape
            nothing = self.keys.new_zeros(0, 2, layers, heads, dim)
            found = pad_sequence([kept.get(past, nothing) for past in pasts])  # [W, P, 2, layers, H_kv, D]
            block.past = F.pad(found.permute(2, 3, 1, 4, 0, 5), (0, 0, 0, ids.shape[1]))
            for past in pasts:
                kept.pop(past, None)
        hidden = self._forward(ids, position.clamp(max=block.width - 1), block)
        block.past = None
        if lengths.min() < block.width:
            column = torch.arange(block.width, device=self.device)
            block.mask = torch.where(column < lengths[:, None], 0.0, -math.inf)
        return block, hidden[torch.arange(len(prompts), device=self.device), lengths - known - 1]

    def decode(self) -> None:
        """One token for every live row; where steps are graphs, eight before the host looks again."""
        longest = int((self.length - self.offset)[: self.rows].max()) + 1
        if not self.sampler.uses_graphs:
            self.visible = longest
            self._advance(self.rows)
            return
        rows = min(self.capacity, 1 << (self.rows - 1).bit_length())  # free slots are decoded idly
        for ahead in range(8):
            self.visible = min(self.width, max(128, 1 << (longest + ahead - 1).bit_length()))
            self._replay(rows)

    def _advance(self, rows: int) -> None:
        self.place = (self.length - self.offset)[:rows]
        is_even = not self.sampler.uses_graphs and int(self.place.min()) == self.visible - 1
        column = torch.arange(self.visible, device=self.device)
        self.mask = None if is_even else torch.where(column <= self.place[:, None], 0.0, -math.inf)
        token, position = self.token[:rows], self.length[:rows]
        if self.sampler.model.config.model_type in _LLAMA_FAMILY:
            hidden = _decode_llama(self.sampler.model.base_model, token, position, self.attend_one)
        else:
            hidden = self._forward(token[:, None], position[:, None], self)[:, 0]
        self.length[:rows] += self.sequence[:rows] < self.total
        self._draw(hidden, slice(0, rows))

    def _replay(self, rows: int) -> None:
        """One decoding step as a CUDA graph, captured once per number of rows, width and temperature. All share a pool
        of memory: one is replayed after the other, and what lasts lies outside of it."""
        key = (rows, self.visible, self.temperature)
        if key in self.graphs:
            return self.graphs[key].replay()
        if not self.sampler.can_capture:
            return self._advance(rows)
        graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        capture = torch.cuda.graph(graph, pool=next((other.pool() for other in self.graphs.values()), None))
        capture.capture_stream.wait_stream(outside)  # one for all: libraries have a workspace for each
        with torch.cuda.stream(capture.capture_stream):  # this step off the graph: they set it up in it
            self._advance(rows)
        outside.wait_stream(capture.capture_stream)
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        try:
            with capture:  # what is captured does not run
                torch.cuda.set_sync_debug_mode("error")  # raises before a wait breaks the capture
                self._advance(rows)
            self.graphs[key] = graph
        except RuntimeError as error:  # dynamic rotations and some experts wait for numbers from the device
            self.sampler.can_capture = False
            torch.cuda.set_stream(outside)  # which a broken capture has not left
            print(f"notice: no CUDA graphs for this model, sampling is slower ({first_line(error)}).", file=sys.stderr)
        torch.cuda.set_sync_debug_mode("default")

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, layout: _Prompts | _Slots) -> torch.Tensor:
        model, arguments = self.sampler.model.base_model, kl.layout_arguments(layout, self.device)
        return model(input_ids=ids, position_ids=positions, **arguments).last_hidden_state

    def _draw(self, hidden: torch.Tensor, rows: slice) -> None:
        sampler = self.sampler
        logits = kl.head_logits(hidden, sampler.head_weight, sampler.head_bias, sampler.dtype, sampler.logit_shape)
        sequence = self.sequence[rows]
        count, budget = self.count[sequence], self.budget[sequence]
        if self.temperature == 0:
            token = logits.argmax(-1)
            logprobs = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        else:
            token, logprobs = draw(logits.div_(self.temperature), self.uniforms[sequence, count])
        stopped = torch.isin(token, sampler.stop_ids)
        self.token[rows] = token
        self.ids[sequence, count] = token
        self.logprobs[sequence, count] = logprobs
        self.stopped[sequence] = stopped.long()
        self.count[sequence] = torch.minimum(count + 1, budget)  # 0 for rows that idle
        self.sequence[rows] = sequence.masked_fill(stopped | (count + 1 >= budget), self.total)

    def release(self) -> int:
        """Move live rows into the slots of finished ones. Returns how many samples have ended since the last call.

        Moving a row costs about as much as computing a finished one for a while, so it waits for an eighth of them.
        """
        done = (self.sequence[: self.rows] == self.total).tolist()
        finished = [row for row, is_done in enumerate(done) if is_done]
        if len(finished) < max(1, self.rows // 8):
            return 0
        for row in finished if self.keep else []:
            self._keep(row)
        live = self.rows - len(finished)
        holes = [row for row in finished if row < live]
        movers = [row for row in range(live, self.rows) if not done[row]]
        if holes:
            to, source = (torch.tensor(x, device=self.device) for x in (holes, movers))
            used = int((self.length - self.offset)[source].max())
            for keys, values in zip(self.keys, self.values):
                keys[to, ..., :used] = keys[source, ..., :used]
                values[to, :, :used] = values[source, :, :used]
            for state in (self.token, self.length, self.offset, self.sequence):
                state[to] = state[source]
            for hole, mover in zip(holes, movers):
                self.samples[hole] = self.samples[mover]
        self.sequence[live : self.rows] = self.total
        self.rows, self.samples = live, self.samples[:live]
        self._arrange()
        return len(finished)

    def _arrange(self) -> None:
        """Find the rows of each shared prompt anew, and let go of the prompts that have none left."""
        rows_of: dict[int, list[int]] = {}
        for row, sample in enumerate(self.samples):
            rows_of.setdefault(sample // self.group, []).append(row)
        grid: list[int] = []
        self.sizes_of_blocks = []
        self.blocks = [block for block in self.blocks if not rows_of.keys().isdisjoint(block.numbers)]
        for block in self.blocks:
            alive = [p for p, number in enumerate(block.numbers) if number in rows_of]
            if len(alive) < len(block.numbers):
                block.numbers = [block.numbers[p] for p in alive]
                block.keys, block.values = ([x[alive] for x in layers] for layers in (block.keys, block.values))
                block.mask = None if block.mask is None else block.mask[alive]
            rows = [rows_of[number] for number in block.numbers]
            widest = max(map(len, rows))
            for some in rows:
                grid += some + some[:1] * (widest - len(some))
            self.sizes_of_blocks.append(widest * len(rows))
        where = {row: i for i, row in enumerate(grid)}
        self.grid = torch.tensor(grid, dtype=torch.long)
        self.back = torch.tensor([where[row] for row in range(len(where))], dtype=torch.long)

    def _keep(self, row: int) -> None:
        """Hold on to the keys and values of a finished row's text; its last token, never fed, has none."""
        sample = self.samples[row]
        text = self.prompts[sample // self.group] + self.ids[sample, : int(self.count[sample]) - 1].tolist()
        # [layers, H_kv, W, D]
        keys, values = self.keys[:, row, ..., : len(text)].mT, self.values[:, row, :, : len(text)]
        kept = self.sampler.kept
        kept[tuple(text)] = torch.stack([keys, values]).permute(3, 0, 1, 2, 4).contiguous()
        while kept and self.sampler.room() < self.keys.nbytes + self.values.nbytes:
            kept.pop(next(iter(kept)))  # the oldest


def _attention(query, keys, values, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few queries a row, with the log-sum-exp of their scores, by which two parts can be merged.

    Keys lie transposed: plain products over them beat every fused kernel where queries are so few. query [n, H, T, D],
    scaled, keys [n, H, D, W], values [n, H, W, D], mask [n, W] or None. Returns: [n, H, T, D] and [n, H, T] in float32.
    """
    # A GPU returns the sums as float32; in bfloat16, as on a CPU, scores near 100 are half a nat apart.
    as_float32 = {"out_dtype": torch.float32} if query.is_cuda and query.dtype == torch.bfloat16 else {}
    scores = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1), **as_float32).view(*query.shape[:-1], -1).float()
    if mask is not None:
        scores += mask[:, None, None]
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights.to(values.dtype).flatten(0, 1), values.flatten(0, 1), **as_float32).view(query.shape)
    return (out / total).to(query.dtype), (highest + total.log())[..., 0]


def _decode_llama(model, ids: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
    """The forward of Llama's family for one token a row, ids and positions [R]; returns the last hidden states [R, d].

    It computes what the modules compute, without what they cost on small tensors: calls, masks, unfused norms.
    """

    def normalise(norm, x):
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    def project(linear, x):
        return F.linear(x, linear.weight, linear.bias)

    hidden = model.embed_tokens(ids)
    cos, sin = model.rotary_emb(hidden[:, None], positions[:, None])  # [R, 1, D]
    for i, layer in enumerate(model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        x = normalise(layer.input_layernorm, hidden)
        heads = (len(ids), -1, attention.head_dim)
        query, key, value = (project(p, x).view(heads) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):
            query, key = normalise(attention.q_norm, query), normalise(attention.k_norm, key)
        both = torch.cat([query, key], dim=1)
        first, second = both.chunk(2, dim=-1)
        both = torch.addcmul(both * cos, torch.cat([-second, first], dim=-1), sin)
        query, key = both.split([query.shape[1], key.shape[1]], dim=1)
        window = getattr(attention, "sliding_window", getattr(model.config, "sliding_window", None))
        out = attend(i, query, key, value, attention.scaling, window)
        hidden = hidden + project(attention.o_proj, out.flatten(1))
        x = normalise(layer.post_attention_layernorm, hidden)
        hidden = hidden + project(mlp.down_proj, mlp.act_fn(project(mlp.gate_proj, x)) * project(mlp.up_proj, x))
    return normalise(model.norm, hidden)


# ---------------------------------------------------------------------------------------------- answers


def final_answer(text: str) -> str | None:
    """The answer that a text states after its reasoning, or None if that is never closed.

    The first of these: the last \\boxed{} (inside the last <answer> tag, if there is one); that tag; the last number
    that stands behind ####; words behind "the answer is"; the last number; the last line. Where the last line holds a
    ####, the last three look only behind it.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    tags = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    text = tags[-1] if tags else text
    if boxed := _last_box(text):
        return boxed
    if tags:
        return text
    lines = [line.strip() for line in re.split(r"####", text)[1:]]
    for line in reversed(lines):
        if _number(line.partition("\n")[0].rpartition("=")[2]):
            return line.partition("\n")[0]
    last = text.rstrip().rpartition("\n")[2]
    if lines and "####" in last:  # any other is a heading
        text = lines[-1]
    *_, said = [None, *re.finditer(r"answer(?: is|:)\s*(.+?)(?:\.\s|\n|$)", text, re.IGNORECASE)]
    if said and not re.search(r"\d", text[said.start() :]) and _words(said[1]):
        return said[1]
    numbers = re.findall(NUMBER, _plain(text))
    return numbers[-1] if numbers else text.strip().rpartition("\n")[2]


def _last_box(text: str) -> str | None:
    """What stands in the last \\boxed, with braces that match or without any."""
    *before, rest = re.split(r"\\(?:boxed|fbox)\s*", text)
    if not before:
        return None
    if not rest.startswith("{"):
        return re.match(r"[^\s$]*", rest)[0] or None
    depths = accumulate((character == "{") - (character == "}") for character in rest)
    end = next((i for i, depth in enumerate(depths) if depth == 0), 0)
    return rest[1:end] if end else None


# A sign stands behind no digit or letter; thousands come in threes; a fraction is no date.
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\d))?|\.\d+"
NUMBER = rf"(?:(?<![\w.)])[+-])?(?<![\d/])(?:\d+ (?=\d+/))?(?:{DIGITS})(?:/\d+(?![\d/]))?%?"
TYPOGRAPHY = {0x2212: "-", 0x2013: "-", 0xFF0D: "-", 0x00A0: " ", 0x202F: None, 0x2009: None}


def _plain(text: str) -> str:
    """Text without what is only typography: currency, emphasis, LaTeX's spaces, texts and fractions."""
    if re.fullmatch(r"[A-Za-z0-9 .,=/%-]*", text):
        return " ".join(text.split())

    def fraction(match: re.Match) -> str:
        return "/".join(part if re.fullmatch(r"[\w.]*", part) else f"({part})" for part in match.groups())

    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text.translate(TYPOGRAPHY))
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", fraction, text)
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r"\1/\2", text)
    text = re.sub(r"\\left|\\right|\\[()\[\]]|\^?\\circ|\\[,!;: ]|\\(?=[$%])|[$€£¥`]", "", text.replace("{,}", ","))
    return " ".join(re.sub(r"\*\*|(?<![\w)])\*|\*(?![\w(])", "", text).split())


def _number(answer: str) -> tuple[set[Fraction], str] | None:
    """The exact values that an answer may have as a number, two for a percentage, and its unit; None if it is none."""
    plain = _plain(answer).rstrip(".!")
    unit = r"%|°.*| (?!or\b|not\b)[^\W\d_][^\d=]*|(?!st\b|nd\b|rd\b|th\b)[^\W\d_]{2}[^\d=]*|"
    match = re.fullmatch(rf"([+-]?) ?(\d+ (?=\d+/))?({DIGITS})(?: ?/ ?(\d+))? ?({unit})", plain)
    if not match:
        return None
    sign, whole, digits, below, unit = match.groups()
    try:
        value = Fraction(digits.replace(",", "")) / int(below or 1) + int(whole or 0)
    except (ValueError, ZeroDivisionError):  # more digits than Python reads
        return None
    value = -value if sign == "-" else value
    return ({value, value / 100} if unit == "%" else {value}), _words(unit)


def _words(answer: str) -> str:
    """An answer as text, without case, an article in front, quotes and brackets around it, and periods."""
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", _plain(answer).casefold()).strip("\"'“”‘’,:;!? ")
    text = re.sub(r"^[(\[{]([^,()\[\]{}]*)[)\]}]$", r"\1", text)
    return re.sub(r"^(?:the|an?) (?=.)", "", text)


def _is_same(answer: str, gold: str) -> bool:
    """Whether two answers are equal: as exact numbers, whose units must agree where both have one, or as text."""
    answer = answer if "=" in gold else answer.rpartition("=")[2]
    given, right = _number(answer), _number(gold)
    if given and right and len(right[1].split()) < 3:  # longer ones are names: 1 World Trade Center
        return bool(given[0] & right[0]) and (given[1] == right[1] or "" in (given[1], right[1]))
    return _words(answer) == _words(gold)


def is_correct(text: str, gold: str | list[str]) -> bool:
    """Whether the final answer of `text` is `gold`, or one of several."""
    answer = final_answer(text)
    golds = [gold] if isinstance(gold, str) else gold
    golds = [(final_answer(g) or "") if "####" in g or "\\boxed" in g else g for g in golds]
    return answer is not None and any(_is_same(answer, g) for g in golds)


def is_right(text: str, golds: list[str]) -> bool:
    """Whether the final answer of `text` is one of `golds`: as a number where it is one, else as SQuAD compares texts,
    without case, emphasis, punctuation and articles. Signs with a meaning (C++, 2*3, -) and letters of choices stay."""

    def plain(answer: str) -> str:
        text = re.sub(r"(?<!\w)(\*{1,2})(\S.*?)\1(?!\w)", r"\2", answer.casefold())
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|[.,:](?!\d)|[!?;\"'`´‘’“”„…&$€£]", "", text)
        brackets = r"|[()\[\]{}]|(?<=[^\W\d]{2})-(?=[^\W\d]{2})" * (not re.search(r"\d", text))
        text = re.sub(r"\bthe\s+(?=\S)|\ban?\s+(?=[^\W\d]{2})" + brackets, "", text)  # `A` is a choice, `A B` are two
        return " ".join(re.sub(r"\s*([-+*/=<>^])\s*", r"\1", text).split()) or answer.strip()

    answers, said = [final_answer(text)], text.rpartition("</think>")[2]
    if not re.search(r"</answer>|\\boxed", said):  # then a sentence may say it, in full
        answers += re.findall(r"(?i)\banswer\b(?:[^.:\n]*?\b(?:is|be)\b:?|:)\s*(.+)", said)[-1:]
    golds = [final_answer(gold) if "####" in gold or "\\boxed" in gold else gold for gold in golds]
    is_number = is_correct(text, [gold for gold in golds if re.search(r"\d", gold)])
    return is_number or answers[0] is not None and not {*map(plain, golds)}.isdisjoint(map(plain, answers))


def sample_answers(sampler, tokenizer, questions, sampling: tuple, rank: int, world: int, greedy: bool = False) -> dict:
    """Completions of this process's share of the questions: by the question's index, its row, completions and texts, a
    greedy one last if wanted. `sampling`: budget in tokens, samples a question, temperature, seed."""
    budget, num_samples, temperature, seed = sampling
    places = list(range(rank, len(questions), world))
    mine = [questions[i] for i in places]
    prompts = [question["ids"] for question in mine]
    with tqdm(total=len(mine) * (num_samples + greedy), desc="sampling", leave=False, disable=None) as bar:
        groups = sampler.generate(prompts, budget, num_samples, temperature, seed, places, False, bar.update)
        if greedy:
            best = sampler.generate(prompts, budget, temperature=0.0, indices=places, progress=bar.update)
            groups = [group + one for group, one in zip(groups, best)]
    answered = {}
    for place, question, group in zip(places, mine, groups):
        texts = [question["prefill"] + tokenizer.decode(c.ids, skip_special_tokens=True) for c in group]
        answered[place] = question, group, texts
    return answered


def evaluate_answers(
    sampler, tokenizer, questions, max_tokens: int, num_samples: int, temperature: float, seed: int, rank, world
) -> tuple[dict, list[dict]]:
    """`answer_metrics` of held-out questions, each answered `num_samples` times at `temperature` and once greedily; the
    processes share them."""
    sampler.sync()
    sampling = (max_tokens, num_samples, temperature, seed)
    answered = sample_answers(sampler, tokenizer, questions, sampling, rank, world, greedy=True)
    return answer_metrics(answered, tokenizer, sampler.device)


def answer_metrics(answered: dict, tokenizer, device) -> tuple[dict, list[dict]]:
    """What this process's share of `sample_answers`, each with a greedy completion last, and the other shares tell.

    Returns: `eval/completion_length` and `eval/truncated_fraction` of the samples, and, if any question has an answer,
    `eval/accuracy` and `eval/accuracy_greedy`, over all processes; and for the log one sample of each of this process's
    questions, whose `reward` is whether it is right. Both use `is_correct`, also for completions that were cut.
    """
    sums, samples = torch.zeros(6, dtype=torch.float64, device=device), []
    for question, group, texts in answered.values():
        gold, group = question["row"].get("answer"), group[:-1]
        *right, right_greedy = [gold is not None and is_correct(text, gold) for text in texts]
        lengths, cut = sum(len(c.ids) for c in group), sum(not c.stopped for c in group)
        count, known = len(group), gold is not None
        sums += torch.tensor([1, sum(right) / count, right_greedy, known, lengths / count, cut / count]).to(sums)
        prompt = tokenizer.decode(question["ids"], skip_special_tokens=True)
        samples.append({"prompt": prompt, "completion": texts[0], "reward": float(right[0]), "gold": gold})
    if dist.is_initialized():
        dist.all_reduce(sums)
    count, right, right_greedy, known, length, cut = sums.tolist()
    metrics = {"eval/completion_length": length / count, "eval/truncated_fraction": cut / count}
    if known:
        metrics = {"eval/accuracy": right / known, "eval/accuracy_greedy": right_greedy / known, **metrics}
    return metrics, samples


# ---------------------------------------------------------------------------------------------- rows a model makes

UNFIT = {  # the paper's filters: what a question is that begins like this
    "of 3 words or fewer or over 150": r"(\S+\s+){0,2}\S+$|(\S+\s+){150}\S",
    "for more than text": r"(?is).*\b((image|picture|graph|chart|diagram|map|file|video)s?|draw|plot|audio|music)\b",
    "for a program": r"Write a program",
    "opened by no letter or digit": r"[^A-Za-z0-9]",
}
CRITIQUE = "Criticise your last answer by this principle: {principle} Say in which points it falls short."
REVISION = "Rewrite that answer so that it follows your criticism. Reply with the rewritten answer alone."


class Speaker:
    """The model at `path`, which takes turns of at most `budget` tokens in chats."""

    def __init__(self, path: str, tokenizer, device, bfloat16: bool, budget: int, seed: int):
        model, dtype = kl.load_model(path, device), torch.bfloat16 if bfloat16 else torch.float32
        self.sampler, self.tokenizer = Sampler(model, stop_token_ids(tokenizer, model), dtype), tokenizer
        self.budget, self.context, self.seed, self.calls = budget, kl.context_length(path), seed, 0

    def __call__(self, chats: dict[int, list[dict]], role: str) -> dict[int, list[dict]]:
        """The chats, by number, with a further turn of `role`; without those whose turn has no room, is empty, or did
        not end by itself. The processes share the work, and all get all."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        is_user, asked, said, self.calls = role == "user", {}, {}, self.calls + 1
        for number in [*chats][rank::world]:
            with suppress(Exception):  # templates refuse what they like
                opening, other = (user_opening if is_user else opening_text)(self.tokenizer, chats[number])
                ids = self.tokenizer.backend_tokenizer.encode(opening, add_special_tokens=False).ids
                asked |= {number: (ids, other)} if len(ids) < self.context else {}
        prompts = [ids for ids, _ in asked.values()]
        budgets = [min(self.budget, self.context - len(ids)) for ids in prompts]
        with tqdm(total=len(asked), desc="making rows", leave=False, disable=None) as bar:
            options = {"seed": self.seed * 1009 + self.calls, "indices": [*asked], "progress": bar.update}
            options |= {"temperature": 0.7, "keep": True}  # as in Self-Instruct; the next turn goes on from here
            drawn = self.sampler.generate(prompts, budgets, **options)
        for (number, (_, other)), (completion,) in zip(asked.items(), drawn):
            text = self.tokenizer.decode(completion.ids, skip_special_tokens=not is_user)
            text, *rest = re.split(other, text, maxsplit=1) if is_user else [other + text]
            if text.strip() and (completion.stopped or rest):
                said[number] = number, [*chats[number], {"role": role, "content": text.strip()}]
        return dict(merged(said))


def self_instruct(path: Path, sources, speak: Speaker, wanted: int, examples: int) -> None:
    """Write to `path` up to `wanted` rows that the model invents: it continues chats of `examples` rows by a question
    and its answer. Of at most 8 candidates a row, those are kept that are not `UNFIT`, by filters that most seeds pass,
    and whose question has a ROUGE-L of at most 0.7 with every other (Self-Instruct, arXiv:2212.10560)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError:
        sys.exit("--self-instruct needs rouge-score: pip install rouge-score.")
    rng, scorer, split = random.Random(speak.seed), RougeScorer(["rougeL"]), DefaultTokenizer().tokenize
    pool, rows, dropped, tried = [], [], Counter(), 0
    for said in _conversations(sources, ""):
        pairs = [pair for pair in zip(said, said[1:]) if [turn["role"] for turn in pair] == ["user", "assistant"]]
        pool += pairs[:1]
    known = {asked["content"]: Counter(split(asked["content"])) for asked, _ in pool}
    filters = [what for what, rule in UNFIT.items() if 2 * sum(bool(re.match(rule, q)) for q in known) < len(known)]
    while pool and len(rows) < wanted and tried < 8 * wanted:
        numbers = range(tried, min(tried + wanted - len(rows), 8 * wanted))
        chats = {i: [*chain(*rng.sample(pool, min(examples, len(pool))))] for i in numbers}
        chats, tried = speak(speak(chats, "user"), "assistant"), numbers.stop
        dropped["cut or empty"] += len(numbers) - len(chats)
        for *_, asked, answer in chats.values():
            question, words = asked["content"], Counter(split(asked["content"]))
            faults = [what for what in filters if re.match(UNFIT[what], question)]
            for other, theirs in known.items():  # words in common bound the longest common subsequence
                if not faults and 2 * (words & theirs).total() > 0.7 * (words.total() + theirs.total()):
                    faults += ["not new"] * (scorer.score(other, question)["rougeL"].fmeasure > 0.7)
            dropped.update(faults[:1])
            if not faults:
                known[question] = words
                pool.append((asked, answer))
                rows.append({"prompt": question, "completion": answer["content"]})
    _write_rows(path, rows, f"{wanted} rows, from {tried} candidates", dropped)


def revise(path: Path, sources, speak: Speaker, principles: str) -> None:
    """Write to `path`, for every prompt, the model's `draft` of an answer, its `critique` of that by a `principle`, a
    line of a file, and its revision as `completion` (Constitutional AI, arXiv:2212.08073, section 3)."""
    rng, lines = random.Random(speak.seed), read_lines(principles, "--revise")
    prompts = [said[:-1] if said[-1]["role"] == "assistant" else said for said in _conversations(sources, "-")]
    drawn, rows = [rng.choice(lines) for _ in prompts], []
    chats = speak(dict(enumerate(prompts)), "assistant")
    for request in (CRITIQUE, REVISION):
        asked = {i: {"role": "user", "content": request.format(principle=drawn[i])} for i in chats}
        chats = speak({i: [*chat, asked[i]] for i, chat in chats.items()}, "assistant")
    for i, chat in chats.items():
        draft, critique, revision = (message["content"] for message in chat[-5::2])
        row = {"prompt": prompts[i], "draft": draft, "principle": drawn[i], "critique": critique}
        rows.append(row | {"completion": revision})
    _write_rows(path, rows, f"{len(prompts)} prompts", Counter({"cut or empty": len(prompts) - len(rows)}))


def _conversations(sources, answer: str) -> list[list[dict]]:
    """What the rows that can be read demonstrate, with `answer` where they have none."""
    read = []
    for row in chain(*map(load_rows, sources)):
        with suppress(Exception):  # whatever a row may be
            said = read_conversation({"answer": answer} | read_row(row))
            read += [said] if isinstance(said, list) else []
    return read


def _write_rows(path: Path, rows: list[dict], of: str, dropped: Counter) -> None:
    """Write rows that all processes have, under another name at first: a killed run leaves no broken file."""
    reasons = ", ".join(f"{count} {why}" for why, count in dropped.most_common() if count) or "none"
    tell(f"{path.name}: {len(rows)} of {of}; dropped: {reasons}.")
    if not rows:
        sys.exit("There is nothing to train on.")
    if not dist.is_initialized() or dist.get_rank() == 0:
        path.with_suffix(".writing").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path.with_suffix(".writing").rename(path)
    if dist.is_initialized():
        dist.barrier()
