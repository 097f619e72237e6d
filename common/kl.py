"""Score tokens under a model, and measure how far it has moved from another.

Logits, log-probabilities and all that follows are float32, and full logits [N, V] are never held: the
language-model head runs over the scored positions only, in chunks, recomputed in the backward pass.

Which gradient an estimator of KL(π‖ref) gives depends on where it is used. With d = log π − log ref at
tokens drawn from π (Schulman, http://joschu.net/blog/kl-approx.html; checked against enumeration in the tests):

    estimator            differentiated in the loss        detached, subtracted from the reward
    k1 = d               zero in expectation, only noise    ∇KL(π‖ref): correct
    k2 = d²/2            ∇KL(π‖ref): correct on-policy      biased
    k3 = e^(−d) − 1 + d  ∇KL(ref‖π): the other direction    ∇KL(π‖ref) − ∇KL(ref‖π): can have the wrong sign

k1 and k3 are unbiased for the *value* of KL(π‖ref), and k3 is never negative, hence less noisy to look at.
Per token in the loss, all of them leave out what a token does to the divergence of *later* tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common.tokenizer import Packed

# ---------------------------------------------------------------------------------------------- attention


def layout_attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """Attention for `transformers` models that lets the layout of the batch decide who sees whom.

    `layout` arrives as a keyword argument of the model's forward: a `Packed` row, or the sampler's slots. Without
    one this is ordinary scaled-dot-product attention, so the model still works everywhere else.

    Shapes: query [B, H, T, D], key and value [B, H_kv, T, D]; returns [B, T, H, D] and None, as transformers wants.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    window = kwargs.get("sliding_window")
    if isinstance(layout, Packed):
        return packed_attention(layout, query, key, value, scaling, window), None
    return layout.attend(module.layer_idx, query, key, value, scaling, window), None


ALL_ATTENTION_FUNCTIONS.register("layout", layout_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("layout", sdpa_mask)


class _Probe:
    """A layout that notes what each layer brings, and attends as a short causal text does."""

    def __init__(self):
        self.asked: list[tuple] = []  # (layer, shape of its keys, shape of its values, whether it has a window)

    def attend(self, layer: int, query, key, value, scaling, window) -> torch.Tensor:
        self.asked.append((layer, tuple(key.shape), tuple(value.shape), window is not None))
        return grouped_attention(query, key, value, None, scaling).transpose(1, 2)


@torch.no_grad()
def use_layout(model) -> None:
    """Let each batch's layout decide the attention of `model`, if every layer of it is plain attention.

    That is tried, not looked up: in a text of four tokens each layer must ask once for attention, with keys and values
    of the one shape that the sampler has slots for and with the window that its configuration tells of, and the hidden
    states must be those of transformers' own attention. Others (state-space layers, soft-capped scores, sinks,
    compressed or shared keys) keep their implementation.
    """
    config, own = model.config.get_text_config(), model.config._attn_implementation
    kinds = getattr(config, "layer_types", None) or []
    can_be = model._supports_sdpa and model._supports_attention_backend and not model._is_stateful
    if not can_be or not set(kinds) <= {"full_attention", "sliding_attention"}:  # chunks show in longer texts only
        return
    ids, probe = short_text(model), _Probe()
    layout = layout_arguments(probe, ids.device) | {"position_ids": torch.arange(4, device=ids.device)[None]}
    try:
        expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        model.set_attn_implementation("layout")
        found = model.base_model(input_ids=ids, **layout).last_hidden_state
        is_same = not differ(found, expected)
    except Exception:  # models have many ways of not being like the others
        is_same = False
    is_windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    windowed = [kind == "sliding_attention" for kind in kinds] or [bool(is_windowed)] * config.num_hidden_layers
    heads, dim = heads_and_dim(config)
    shape = (1, heads, ids.shape[1], dim)
    if not is_same or probe.asked != [(i, shape, shape, has_window) for i, has_window in enumerate(windowed)]:
        model.set_attn_implementation(own)


def short_text(model) -> torch.Tensor:
    """Four token ids [1, 4] on the model's device."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.arange(4, device=next(model.parameters()).device)[None] % vocabulary


def differ(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether rows of two results [..., d] are further apart than rounding explains; False for NaN, which a loss will
    show."""
    tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps)
    return bool(((found - expected).abs().amax(-1) > tolerance * expected.abs().amax(-1)).any())


def heads_and_dim(config) -> tuple[int, int]:
    """How many key and value heads a layer has, and the size of each."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def supports_layout(model) -> bool:
    """Whether `use_layout` has found that it can."""
    return model.config._attn_implementation == "layout"


def layout_arguments(layout, device) -> dict:
    """Keyword arguments for a model's forward under `layout_attention`. The four-dimensional mask is a placeholder
    that keeps transformers from building one, and without `use_cache=False` restarting positions are ignored."""
    return {"attention_mask": torch.empty(1, 1, 1, 1, device=device), "use_cache": False, "layout": layout}


def packed_attention(layout: Packed, query, key, value, scaling, window) -> torch.Tensor:
    """Attention inside each segment and to its prefix. query [1, H, N, D], key and value [1, H_kv, N, D].

    Returns: [1, N, H, D].
    """
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # [N, H, D]
    outputs = []
    for queries, keys, prefix in layout.blocks:
        width, visible = queries.shape[1], keys.shape[1]
        q, k, v = (
            x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
            for x, index in ((query, queries), (key, keys), (value, keys))
        )
        windowed = window is not None and window < visible
        mask = None
        if prefix or windowed:
            distance = prefix + torch.arange(width, device=q.device)[:, None] - torch.arange(visible, device=q.device)
            mask = (distance >= 0) & (distance < window) if windowed else distance >= 0
        out = grouped_attention(q, k, v, mask, scaling)  # [n, H, Tq, D]
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.unpack)[None]


def grouped_attention(query, key, value, mask, scaling) -> torch.Tensor:
    """Attention of [n, H, T, D] to [n, H_kv, W, D], causal where there is no mask. On CUDA the kernels that store no
    scores do not take both a mask and fewer key heads than query heads, so there the keys are repeated."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is not None and query.is_cuda:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=is_grouped
    )


# ---------------------------------------------------------------------------------------------- log-probabilities


def token_logprobs(
    model, batch: Packed, temperature: float = 1.0, packing: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every scored token of a packed row, and the entropy of the distribution it came from.

    Args:
        model: a causal language model that has been through `use_layout`.
        temperature: logits are divided by it, as they were in sampling; 1 for likelihood training.
        packing: run the row as it is; otherwise one padded row per text, which gives the same numbers.

    Returns: `logprobs` [S] with gradient, `entropy` [S] in nats without, both float32.
    """
    if hasattr(model, "sharded_token_logprobs"):  # FSDP gathers weights only around methods registered with it
        return model.sharded_token_logprobs(batch, temperature, packing)
    return local_token_logprobs(model, batch, temperature, packing)


def local_token_logprobs(model, batch: Packed, temperature: float, packing: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs` of a model whose weights this process holds, or has gathered."""
    hidden = hidden_states(model, batch, packing)[batch.sources]
    return head_logprobs(model.get_output_embeddings(), hidden, batch.targets, temperature, logit_shape(model))


def hidden_states(model, batch: Packed, packing: bool = True) -> torch.Tensor:
    """Last hidden states [N, d] of a packed row. Models that `layout_attention` cannot serve are given each text by
    itself, padded on the right, where a causal model never sees the padding."""
    if packing and supports_layout(model):
        layout = layout_arguments(batch, batch.ids.device)
        return model.base_model(input_ids=batch.ids, position_ids=batch.position_ids, **layout).last_hidden_state[0]
    if isinstance(model, FSDPModule):  # each forward gathers weights: processes must make equally many
        raise SystemExit(
            f"Several processes train packed rows only, and those of this {model.config.model_type} model are padded. "
            "Take one process."
        )
    outputs = [
        model.base_model(input_ids=batch.ids[0, b.keys], use_cache=False).last_hidden_state[:, b.prefix_length :]
        for b in batch.blocks
    ]
    return torch.cat([out.flatten(0, 1) for out in outputs])[batch.unpack]


class LogitShape(NamedTuple):
    """What a model does with its head's products x: logits = scale·x, or cap·tanh(scale·x/cap) where there is a cap."""

    scale: float = 1.0
    cap: float | None = None


PLAIN = LogitShape()


def logit_shape(model) -> LogitShape:
    """The form of a model's logits: Cohere's are multiplied by a number, Granite's divided by one, Gemma's capped."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale = scale / divisor
    return LogitShape(scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def has_known_logits(model) -> bool:
    """Whether the model's own logits are those which `head_logits` gives, tried on one short text."""
    ids, head = short_text(model), model.get_output_embeddings()
    if head is None:
        return False
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = head_logits(hidden, head.weight, head.bias, hidden.dtype, logit_shape(model))
    theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    return ours.shape == theirs.shape and not differ(ours, theirs)


def head_logprobs(
    head, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0, shape: LogitShape = PLAIN
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the language-model head to `hidden` [S, d] chunk by chunk and score `targets` [S].

    Returns: log-probabilities [S] with gradient and entropies [S] without, float32. Under autocast the factors of
    the head's products may be rounded to bfloat16; their sums, the logits and all that follows stay float32.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _HeadLogprobs.apply(hidden, head.weight, head.bias, targets, temperature, shape, dtype)


class _HeadLogprobs(torch.autograd.Function):
    """softmax(head(hidden)/τ) at the targets: logits live for one chunk at a time, and the backward pass makes them
    again instead of keeping them, adding each chunk's share of the head's gradient in place."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, shape, dtype):
        logprobs, entropy, logsumexp = hidden.new_empty(3, len(targets), dtype=torch.float32).unbind()
        factor = weight.to(dtype) if weight.is_cuda else weight  # once for all chunks; a CPU rounds as it multiplies
        for rows in _chunks(hidden, weight):
            logits = head_logits(hidden[rows], factor, bias, dtype, shape).div_(temperature)  # [c, V]
            highest = logits.amax(-1)
            weights = (logits - highest[:, None]).exp_()
            total = weights.sum(-1)
            logsumexp[rows] = highest + total.log()
            logprobs[rows] = logits.gather(-1, targets[rows, None])[:, 0] - logsumexp[rows]
            entropy[rows] = logsumexp[rows] - weights.mul_(logits).sum(-1) / total  # H = logsumexp(z) − Σ p·z
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp)
        ctx.temperature, ctx.shape, ctx.dtype = temperature, shape, dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        grad = grad * (ctx.shape.scale / ctx.temperature)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        factor = weight.to(ctx.dtype) if weight.is_cuda else weight
        for rows in _chunks(hidden, weight):
            logits = head_logits(hidden[rows], factor, bias, ctx.dtype, ctx.shape)
            slope = None if ctx.shape.cap is None else 1 - (logits / ctx.shape.cap).square()  # of the tanh
            logits.div_(ctx.temperature)
            grad_logits = logits.sub_(logsumexp[rows, None]).exp_().mul_(-grad[rows, None])  # (1[target] − p)·grad
            grad_logits.scatter_add_(-1, targets[rows, None], grad[rows, None])
            if slope is not None:
                grad_logits.mul_(slope)
            grad_hidden[rows] = matrix_product(grad_logits, factor, ctx.dtype).to(hidden.dtype)
            if grad_weight is not None:
                matrix_product(grad_logits.T, hidden[rows], ctx.dtype, onto=grad_weight)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    """Rows whose float32 logits stay under 16 MB on a CPU, where larger blocks of memory are returned to the system
    and paged in again for every chunk, and under 512 MB on a GPU, where fewer and larger launches win."""
    size = max(1, (2**22 if hidden.device.type == "cpu" else 2**27) // weight.shape[0])
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, shape: LogitShape
) -> torch.Tensor:
    """Logits [n, V] in float32 of `hidden` [n, d], their products taken in `dtype`."""
    logits = matrix_product(hidden, weight.T, dtype)
    if bias is not None:
        logits.add_(bias)
    if shape.scale != 1:
        logits.mul_(shape.scale)
    return logits if shape.cap is None else logits.div_(shape.cap).tanh_().mul_(shape.cap)


def matrix_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, onto: torch.Tensor | None = None):
    """a @ b, or that added to `onto` in place, accumulated and returned in float32.

    With `dtype` bfloat16 the hardware may round the factors to it, which leaves factors that are bfloat16 already
    as they are: twice to four times as fast as float32 on CPUs and more on GPUs, with none of the rounding of logits
    that a product returned in bfloat16 has.
    """
    with torch.autocast(a.device.type, enabled=False):  # which would return bfloat16
        if dtype == torch.float32 or a.device.type != "cuda":
            matmul = torch.backends.mkldnn.matmul
            before, matmul.fp32_precision = matmul.fp32_precision, "ieee" if dtype == torch.float32 else "bf16"
            try:
                return a.float() @ b.float() if onto is None else onto.addmm_(a.float(), b.float())
            finally:
                matmul.fp32_precision = before
        product = torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
        return product if onto is None else onto.add_(product)


# ---------------------------------------------------------------------------------------------- KL and statistics


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str = "k3") -> torch.Tensor:
    """Per-token estimate of KL(π‖ref) from the log-probabilities of tokens drawn from π; any shape.

    `estimator` is k1, k2 or k3; the module's docstring says what the gradient of each means.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"estimator must be k1, k2 or k3, not {estimator!r}")


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `mask` is true; 0 where it is nowhere true."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True, add_up=lambda sums: sums) -> torch.Tensor:
    """Scale masked values to mean 0 and population variance 1, and zero the rest.

    With `shift_mean=False` the mean is added back: rewards keep their sign, only their scale is set. `add_up` sums a
    list of numbers over whatever else is to be whitened together, such as the other processes' values.
    """
    total, count = add_up([float((values * mask).sum()), float(mask.sum())])
    mean = total / max(count, 1)
    (squares,) = add_up([float(((values - mean).square() * mask).sum())])
    variance = values.new_tensor(squares / max(count, 1))
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


class AdaptiveKLController:
    """Raise or lower the KL coefficient in proportion to how far the measured KL is from its target.

    Ziegler et al. 2019 (arXiv:1909.08593), with the step scaled by n/horizon as in OpenAI's released code.
    """

    def __init__(self, coefficient: float, target: float, horizon: int = 10_000):
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, episodes: int) -> float:
        """`kl`: mean over the batch of the KL *summed* over each sequence; `episodes`: sequences in the batch."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * min(1, episodes / self.horizon)  # a short horizon must not turn its sign
        return self.coefficient
