"""Score tokens under a model, and measure how far it has moved from another.

Everything that touches a log-probability is float32, and full logits [N, V] are never held: the
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

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
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


def supports_layout(model) -> bool:
    """Whether every layer of `model` is plain attention that `layout_attention` can serve: no state-space or
    linear layers, no soft-capped or sink attention. `load_model` of each script sets the implementation."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    special = getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss"
    is_plain = kinds <= {"full_attention", "sliding_attention"} and not special and not model._is_stateful
    return is_plain and model.config._attn_implementation == "layout"


def layout_arguments(layout, device) -> dict:
    """Keyword arguments for a model's forward under `layout_attention`. The four-dimensional mask is a placeholder
    that keeps transformers from building one, and without `use_cache=False` restarting positions are ignored."""
    return {"attention_mask": torch.empty(1, 1, 1, 1, device=device), "use_cache": False, "layout": layout}


def packed_attention(layout: Packed, query, key, value, scaling, window) -> torch.Tensor:
    """Attention inside each segment and to its prefix. query [1, H, N, D], key and value [1, H_kv, N, D].

    Returns: [1, N, H, D].
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, D]
    outputs = []
    for queries, keys, prefix in layout.blocks:
        q, k, v = query[queries].transpose(1, 2), key[keys].transpose(1, 2), value[keys].transpose(1, 2)
        width, visible = queries.shape[1], keys.shape[1]
        windowed = window is not None and window < visible
        mask = None
        if prefix or windowed:
            distance = prefix + torch.arange(width, device=q.device)[:, None] - torch.arange(visible, device=q.device)
            mask = (distance >= 0) & (distance < window) if windowed else distance >= 0
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )  # [n, H, Tq, D]
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[layout.unpack][None]


# ---------------------------------------------------------------------------------------------- log-probabilities


def token_logprobs(
    model, batch: Packed, temperature: float = 1.0, packing: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every scored token of a packed row, and the entropy of the distribution it came from.

    Args:
        model: a causal language model loaded with `attn_implementation="layout"`.
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
    return head_logprobs(model.get_output_embeddings(), hidden, batch.targets, temperature)


def hidden_states(model, batch: Packed, packing: bool = True) -> torch.Tensor:
    """Last hidden states [N, d] of a packed row. Models that `layout_attention` cannot serve are given each text by
    itself, padded on the right, where a causal model never sees the padding."""
    if packing and supports_layout(model):
        layout = layout_arguments(batch, batch.ids.device)
        return model.base_model(input_ids=batch.ids, position_ids=batch.position_ids, **layout).last_hidden_state[0]
    outputs = [
        model.base_model(input_ids=batch.ids[0, b.keys], use_cache=False).last_hidden_state[:, b.prefix_length :]
        for b in batch.blocks
    ]
    return torch.cat([out.flatten(0, 1) for out in outputs])[batch.unpack]


def head_logprobs(head, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0):
    """Apply the language-model head to `hidden` [S, d] chunk by chunk and score `targets` [S].

    A chunk's float32 logits stay under 16 MB on a CPU, where larger blocks of memory are returned to the system
    and paged in again for every chunk, and under 512 MB on a GPU, where fewer and larger launches win.
    """
    budget = 2**22 if hidden.device.type == "cpu" else 2**27
    rows = max(1, budget // head.weight.shape[0])
    chunks = [
        checkpoint(_score_chunk, head.weight, head.bias, h, t, temperature, use_reentrant=False)
        for h, t in zip(hidden.split(rows), targets.split(rows))
    ]
    if not chunks:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    logprobs, entropy = zip(*chunks)
    return torch.cat(logprobs), torch.cat(entropy)


def _score_chunk(weight, bias, hidden, targets, temperature):
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float()) / temperature
    logsumexp = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - logsumexp
    with torch.no_grad():  # H = logsumexp(z) − Σ p·z
        probabilities = (logits - logsumexp[:, None]).exp_()
        entropy = logsumexp - torch.linalg.vecdot(probabilities, logits)
    return logprobs, entropy


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


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Scale masked values to mean 0 and population variance 1, and zero the rest.

    With `shift_mean=False` the mean is added back: rewards keep their sign, only their scale is set.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
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
        self.coefficient *= 1 + error * episodes / self.horizon
        return self.coefficient
