"""The sampler: many completions from an ordinary `transformers` model, fast, seeded, with exact log-probabilities.

What makes it faster than `model.generate` for reinforcement learning:

* a prompt is prefilled once and its keys and values copied to each of its samples;
* every row has a slot of its own in preallocated key/value memory; a row that ends gives its slot to the last
  live row or to a waiting one, so finished rows are not computed and long tails overlap with new rows;
* a token is drawn by an inverse CDF in two levels (blocks of the vocabulary, then the block), which needs one
  pass over the logits, and the chosen logit minus logsumexp is its log-probability for free;
* on CUDA one decoding step is a captured graph per size, replayed per token, and the host looks at the
  results only every few tokens.

Randomness is one uniform number per token that depends on the seed, the index of the sample and the position,
and on nothing else: the same seed gives the same samples in whatever order, batch or process they are drawn.
"""

from __future__ import annotations

import copy
import math
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from common.kl import layout_arguments, supports_layout
from common.tokenizer import pad


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
            when its weights are sharded over processes, from a copy that `sync` brings up to date.
        stop_ids: token ids that end a completion.
        dtype: of the matrix products and of keys and values; the head is float32 always.
        memory_gb: bound on keys and values; rows beyond it wait. Default: 4 on a CPU, half of what is free on CUDA.
    """

    def __init__(self, model, stop_ids: list[int], dtype: torch.dtype = torch.float32, memory_gb: float | None = None):
        self.source, self.dtype, self.memory_gb = model, dtype, memory_gb
        self.device = next(model.parameters()).device
        self.stop_ids = torch.tensor(stop_ids, device=self.device)
        self.served = supports_layout(model)
        if not self.served:
            name = type(model).__name__
            print(f"notice: the fast sampler does not serve {name}; using model.generate instead.", file=sys.stderr)
        is_sharded = any(isinstance(p, DTensor) for p in model.parameters())
        self.is_copy = is_sharded or next(model.parameters()).dtype != dtype
        self.model = _empty_copy(model, dtype) if self.is_copy else model
        self.slots: _Slots | None = None
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Bring the copy up to date. All processes must call it together when weights are sharded."""
        if self.is_copy:
            for target, source in zip(self.model.parameters(), self.source.parameters()):
                target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
        head = self.model.get_output_embeddings()
        if self.is_copy and self.slots is not None:  # in place: captured graphs hold this memory
            self.head_weight.copy_(head.weight)
        else:
            self.head_weight = head.weight.float()
        self.head_bias = None if head.bias is None else head.bias.float()

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int | list[int],
        num_samples: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        indices: list[int] | None = None,
        progress=None,
    ) -> list[list[Completion]]:
        """`num_samples` completions of each prompt, as a list per prompt.

        Args:
            prompts: token ids; they may be anything, a whole conversation so far included.
            max_tokens: budget of new tokens, one for all or one per prompt.
            temperature: 0 takes the most likely token, and reports log-probabilities at temperature 1.
            indices: the number of each prompt among those of all processes, by which its samples are seeded.
            progress: called with the number of completions that have ended since the last call.
        """
        budgets = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        if any(not p for p in prompts) or any(b < 1 for b in budgets):
            raise ValueError("every prompt needs at least one token and a budget of at least one new token")
        indices = list(range(len(prompts))) if indices is None else indices
        numbers = [i * num_samples + k for i in indices for k in range(num_samples)]
        progress = progress or (lambda count: None)
        was_training = self.model.training
        self.model.eval()
        if self.served:
            flat = self._generate(prompts, budgets, num_samples, temperature, seed, numbers, progress)
        else:
            flat = self._fall_back(prompts, budgets, num_samples, temperature, seed, numbers, progress)
        self.model.train(was_training)
        return [flat[i * num_samples : (i + 1) * num_samples] for i in range(len(prompts))]

    def _generate(self, prompts, budgets, num_samples, temperature, seed, numbers, progress) -> list[Completion]:
        total = len(prompts) * num_samples
        longest, columns = max(len(p) + b for p, b in zip(prompts, budgets)), max(budgets)
        if self.slots is None or not self.slots.fits(total, longest, columns):
            self.slots = _Slots(self, total, longest, columns)
        slots = self.slots
        slots.begin(_uniforms(numbers, columns, seed), temperature)
        # Longest prompts first: neighbours are prefilled together, and what may take longest starts soonest.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        waiting = [i * num_samples + k for i in order for k in range(num_samples)]
        while waiting or slots.rows:
            free = slots.capacity - slots.rows
            if waiting and free >= min(num_samples, len(waiting)):
                admitted, waiting = waiting[:free], waiting[free:]
                slots.admit(admitted, [prompts[s // num_samples] for s in admitted],
                            [budgets[s // num_samples] for s in admitted])  # fmt: skip
            else:
                slots.decode()
            progress(slots.release())
        return slots.completions(total)

    def _fall_back(self, prompts, budgets, num_samples, temperature, seed, numbers, progress) -> list[Completion]:
        """The same result from `model.generate`, prompt by prompt, for models whose layers have no key/value slots."""
        results = []
        stops = self.stop_ids.tolist()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for i, (prompt, budget) in enumerate(zip(prompts, budgets)):
                torch.manual_seed((seed * 1_000_003 + numbers[i * num_samples]) % 2**63)
                ids = torch.tensor([prompt], device=self.device)
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
                out = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=budget, num_return_sequences=num_samples,
                    eos_token_id=stops, pad_token_id=stops[0], return_dict_in_generate=True, output_logits=True,
                    **(sampling if temperature > 0 else {"do_sample": False}),
                )  # fmt: skip
                logprobs = torch.stack(out.logits, dim=1).float().div(temperature or 1).log_softmax(-1)
                for row, scores in zip(out.sequences[:, len(prompt) :].tolist(), logprobs):
                    end = next((j + 1 for j, token in enumerate(row) if token in stops), len(row))
                    values = scores[range(end), row[:end]].tolist()
                    results.append(Completion(row[:end], values, row[end - 1] in stops))
                progress(num_samples)
        return results


def _empty_copy(model, dtype: torch.dtype):
    """A model of the same kind on the same device whose weights are still to be copied in."""
    device = next(model.parameters()).device
    with torch.device(device):
        replica = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    replica.set_attn_implementation(model.config._attn_implementation)
    return replica.requires_grad_(False)


def _uniforms(numbers: list[int], columns: int, seed: int) -> torch.Tensor:
    """[rows, columns] in [0, 1): a row depends on the seed and on the number of its sample alone."""
    generator = torch.Generator()
    return torch.stack([
        torch.rand(columns, generator=generator.manual_seed((seed * 1_000_003 + number * 7919) % 2**63))
        for number in numbers
    ])  # fmt: skip


class _Slots:
    """Key/value memory and the state of the rows being decoded; it is the `layout` of the sampler's forwards.

    Rows 0 … rows−1 are live. Everything a decoding step reads or writes is a tensor of fixed shape on the device, so
    that a CUDA graph can replay it: `token` is fed next, `length` counts the keys already stored, `sequence` says
    which sample the row draws, `count` how many tokens it has drawn, `done` whether it has ended.
    """

    def __init__(self, sampler: Sampler, total: int, longest: int, columns: int):
        self.sampler, self.device = sampler, sampler.device
        config = sampler.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = config.num_hidden_layers
        self.width, self.columns = -(-longest // 64) * 64, columns
        row_bytes = 2 * layers * heads * dim * self.width * sampler.dtype.itemsize
        memory = 4e9 if self.device.type == "cpu" else 0.5 * torch.cuda.mem_get_info(self.device)[0]
        if sampler.memory_gb is not None:
            memory = sampler.memory_gb * 1e9
        self.capacity = max(1, min(total, int(memory // row_bytes)))
        self.total = total
        shape = (layers, self.capacity, heads, self.width, dim)
        self.keys = torch.zeros(shape, dtype=sampler.dtype, device=self.device)
        self.values = torch.zeros(shape, dtype=sampler.dtype, device=self.device)
        integers = {"dtype": torch.long, "device": self.device}
        self.token, self.length, self.sequence, self.count = torch.zeros(4, self.capacity, **integers).unbind()
        self.done = torch.ones(self.capacity, dtype=torch.bool, device=self.device)
        self.budget = torch.zeros(total, **integers)
        self.stopped = torch.zeros(total, dtype=torch.bool, device=self.device)
        # One column more than any budget takes what a row draws between its end and its release.
        self.ids = torch.zeros(total, columns + 1, **integers)
        self.logprobs = torch.zeros(total, columns + 1, device=self.device)
        self.uniforms = torch.zeros(total, columns, device=self.device)
        self.index = torch.arange(self.capacity, device=self.device)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.rows = 0
        self.prefill: tuple[torch.Tensor, torch.Tensor] | None = None  # rows and, for each, which prompt fills it

    def fits(self, total: int, longest: int, columns: int) -> bool:
        return total <= self.total and longest <= self.width and columns <= self.columns

    def begin(self, uniforms: torch.Tensor, temperature: float) -> None:
        self.uniforms[: uniforms.shape[0], : uniforms.shape[1]] = uniforms.to(self.device)
        self.drawn = torch.zeros(uniforms.shape[0], dtype=torch.long)
        self.temperature, self.rows, self.longest = temperature, 0, 0
        self.done.fill_(True)

    # ------------------------------------------------------------------ attention

    def attend(self, layer: int, query, key, value, scaling, window) -> torch.Tensor:
        """Store the new keys and values and attend to all of each row's. query [R, H, T, D]; returns [R, T, H, D]."""
        if self.prefill is not None:
            rows, prompts = self.prefill
            self.keys[layer, rows, :, : key.shape[2]] = key[prompts]
            self.values[layer, rows, :, : key.shape[2]] = value[prompts]
            mask = None
            if window is not None and window < key.shape[2]:
                position = torch.arange(key.shape[2], device=self.device)
                distance = position[:, None] - position
                mask = (distance >= 0) & (distance < window)
            grouped = query.shape[1] != key.shape[1]
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
            return out.transpose(1, 2)
        rows = query.shape[0]
        length = self.length[:rows]
        self.keys[layer, self.index[:rows], :, length] = key[:, :, 0]
        self.values[layer, self.index[:rows], :, length] = value[:, :, 0]
        # The queries that share a key/value head stand side by side as its queries: no key is repeated.
        grouped = query.reshape(rows, key.shape[1], -1, query.shape[-1])
        outputs = []
        for start, stop, width, mask in self.blocks:
            if window is not None and window < width:
                column, last = torch.arange(width, device=self.device), length[start:stop, None]
                mask = self._additive((column <= last) & (column > last - window))
            keys, values = self.keys[layer, start:stop, :, :width], self.values[layer, start:stop, :, :width]
            outputs.append(
                F.scaled_dot_product_attention(grouped[start:stop], keys, values, attn_mask=mask, scale=scaling)
            )
        return torch.cat(outputs).reshape(rows, 1, query.shape[1], -1)

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        """A mask [n, 1, 1, width] to add to scores, from one that says which keys [n, width] are seen."""
        mask = torch.zeros(visible.shape, dtype=self.keys.dtype, device=self.device)
        return mask.masked_fill_(~visible, -math.inf)[:, None, None]

    # ------------------------------------------------------------------ rows come, advance and go

    def admit(self, sequences: list[int], prompts: list[list[int]], budgets: list[int], tokens: int = 16384) -> None:
        """Give each sample a slot, prefill every distinct prompt once, and draw the first tokens."""
        begin = 0
        while begin < len(sequences):
            distinct: list[list[int]] = []
            which: list[int] = []
            for prompt in prompts[begin:]:
                if not distinct or prompt != distinct[-1]:
                    if distinct and (len(distinct) + 1) * len(distinct[0]) > tokens:
                        break
                    distinct.append(prompt)
                which.append(len(distinct) - 1)
            rows = slice(self.rows, self.rows + len(which))
            self.rows += len(which)
            group = torch.tensor(which, device=self.device)
            chosen = sequences[begin : begin + len(which)]
            self.sequence[rows] = torch.tensor(chosen, device=self.device)
            self.budget[self.sequence[rows]] = torch.tensor(budgets[begin : begin + len(which)], device=self.device)
            self.length[rows] = torch.tensor([len(p) for p in distinct], device=self.device)[group]
            self.count[rows], self.done[rows] = 0, False
            ids, _, positions = pad(distinct, 0)
            self.prefill = (self.index[rows], group)
            hidden = self._forward(ids.to(self.device), positions.to(self.device))
            self.prefill = None
            last = hidden[self.index[: len(distinct)], self.length[rows].new_tensor([len(p) - 1 for p in distinct])]
            self._draw(last[group], rows)
            begin += len(which)
            self.longest = max(self.longest, max(map(len, distinct)))

    def decode(self) -> None:
        """One token for every live row; on CUDA eight before the host looks again."""
        if self.device.type == "cpu":
            self._advance(self.rows)
            return
        rows = min(self.capacity, 1 << (self.rows - 1).bit_length())  # free slots are decoded idly, as done rows
        for _ in range(8):
            self._replay(rows)

    def _advance(self, rows: int) -> None:
        length = self.length[:rows]
        # On a CPU a block of rows reads no further than its own longest; rows arrive sorted, so blocks are even.
        size = 32 if self.device.type == "cpu" else rows
        self.blocks = []
        for start in range(0, rows, size):
            part = length[start : start + size]
            width = int(part.max()) + 1 if self.device.type == "cpu" else self.visible
            even = self.device.type == "cpu" and int(part.min()) == width - 1
            column = torch.arange(width, device=self.device)
            mask = None if even else self._additive(column <= part[:, None])
            self.blocks.append((start, start + len(part), width, mask))
        hidden = self._forward(self.token[:rows, None], length[:, None])
        self.length[:rows] += (~self.done[:rows]).long()
        self._draw(hidden[:, 0], slice(0, rows))

    def _replay(self, rows: int) -> None:
        """One decoding step as a CUDA graph, captured once per number of rows, width and temperature."""
        self.longest += 1
        self.visible = min(self.width, max(128, 1 << self.longest.bit_length()))
        key = (rows, self.visible, self.temperature)
        if key not in self.graphs:
            state = (self.token, self.length, self.count, self.done, self.ids, self.logprobs, self.stopped)
            before = [t.clone() for t in state]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a first pass off the graph: libraries set up their workspaces in it
                self._advance(rows)
            torch.cuda.current_stream().wait_stream(stream)
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key]):
                self._advance(rows)
            for tensor, value in zip(state, before):
                tensor.copy_(value)
        self.graphs[key].replay()

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        model = self.sampler.model.base_model
        return model(input_ids=ids, position_ids=positions, **layout_arguments(self, self.device)).last_hidden_state

    def _draw(self, hidden: torch.Tensor, rows: slice) -> None:
        logits = F.linear(hidden.float(), self.sampler.head_weight, self.sampler.head_bias)
        sequence, count, done = self.sequence[rows], self.count[rows], self.done[rows]
        if self.temperature == 0:
            token = logits.argmax(-1)
            logprobs = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        else:
            uniform = self.uniforms[sequence, count.clamp(max=self.columns - 1)]
            token, logprobs = draw(logits.div_(self.temperature), uniform)
        column = count.masked_fill(done, self.columns)
        self.ids[sequence, column] = token
        self.logprobs[sequence, column] = logprobs
        stopped = torch.isin(token, self.sampler.stop_ids) & ~done
        self.stopped[sequence] |= stopped
        self.token[rows] = token
        self.count[rows] += (~done).long()
        self.done[rows] = done | stopped | (self.count[rows] >= self.budget[sequence])

    def release(self) -> int:
        """Move live rows into the slots of finished ones. Returns how many samples have ended since the last call.

        Moving a row costs about as much as computing a finished one for a while, so it waits for an eighth of them.
        """
        done = self.done[: self.rows].tolist()
        ended = sum(done)
        if ended < max(1, self.rows // 8):
            return 0
        finished = [i for i in range(self.rows) if done[i]]
        sequences = self.sequence[: self.rows].cpu()
        self.drawn[sequences[finished]] = self.count[: self.rows].cpu()[finished]
        live = self.rows - ended
        holes = [i for i in finished if i < live]
        movers = [i for i in range(live, self.rows) if not done[i]]
        if holes:
            to, source = (torch.tensor(x, device=self.device) for x in (holes, movers))
            used = int(self.length[source].max())
            for cache in (self.keys, self.values):
                for layer in cache:
                    layer[to, :, :used] = layer[source, :, :used]
            for state in (self.token, self.length, self.sequence, self.count):
                state[to] = state[source]
        self.done[:live] = False
        self.done[live : self.rows] = True
        self.rows = live
        return ended

    def completions(self, total: int) -> list[Completion]:
        counts, stopped = self.drawn.tolist(), self.stopped[:total].tolist()
        ids, logprobs = self.ids[:total].tolist(), self.logprobs[:total].tolist()
        self.stopped.fill_(False)
        return [Completion(ids[i][:n], logprobs[i][:n], stopped[i]) for i, n in enumerate(counts)]
