"""Packing, loading and the sampler: the invariants that every script rests on."""

import gc
import weakref

import pytest
import torch
from conftest import TINY
from transformers import AutoModelForCausalLM

from common import generation, kl
from common.generation import Sampler, draw
from common.kl import token_logprobs
from common.tokenizer import Segment, pack, pack_completions, render_chat, split_by_tokens, stop_token_ids

# ---------------------------------------------------------------------------------------------- padding and packing


def logprobs_alone(model, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of ids[1:] from a plain forward of one row, without anything from common/."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].float()


def some_documents() -> list[list[int]]:
    torch.manual_seed(3)
    return [torch.randint(13, 108, (n,)).tolist() for n in (5, 40, 2, 17, 33)]


def test_t7_sft_detail_3_packing_changes_nothing(model, monkeypatch):
    documents = some_documents()
    packed = pack([Segment(d, [True] * len(d)) for d in documents])
    expected = torch.cat([logprobs_alone(model, d) for d in documents])
    for _served in (True, False):
        found, _ = token_logprobs(model, packed)
        torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(kl, "supports_layout", lambda model: False)  # then each text is padded
    monkeypatch.undo()
    assert len(packed.targets) == sum(len(d) - 1 for d in documents)  # first tokens are no targets
    other = [[20] * len(documents[0]), *documents[1:]]
    changed, _ = token_logprobs(model, pack([Segment(d, [True] * len(d)) for d in other]))
    torch.testing.assert_close(changed[4:].detach(), expected[4:], atol=1e-5, rtol=1e-5)


def test_ppo_detail_9_shared_prompts_give_the_same_gradient(model):
    torch.manual_seed(0)
    prompts, completions = [[20, 30, 40, 50]] * 3 + [[60, 61]] * 2, some_documents()
    upstream = torch.randn(sum(map(len, completions)))
    together, _ = token_logprobs(model, pack_completions(prompts, completions))
    alone = torch.cat([token_logprobs(model, pack_completions([p], [c]))[0] for p, c in zip(prompts, completions)])
    expected = torch.cat([logprobs_alone(model, p + c)[len(p) - 1 :] for p, c in zip(prompts, completions)])
    gradients = []
    for found in (together, alone):
        torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-5)
        gradients.append(torch.autograd.grad((found * upstream).sum(), list(model.parameters())))
    for shared, single in zip(*gradients):
        torch.testing.assert_close(shared, single, atol=1e-4, rtol=1e-3)


def test_samples_do_not_depend_on_earlier_calls(model, monkeypatch):
    """Not in the last bit: a resumed run has made other calls. The larger one reads prompts once for all samples."""
    monkeypatch.setattr(generation, "SHARE_FROM", 20_000)
    prompts, used, fresh = [[20, 30, 40, 50, 60]] * 3, *(Sampler(model, [0]) for _ in range(2))
    used.generate(prompts * 8, 40, 4)
    assert used.slots.shared
    groups = [sampler.generate(prompts[:1], 24, 3, seed=5) for sampler in (used, fresh)]
    assert not fresh.slots.shared
    for a, b in zip(*(group[0] for group in groups)):
        assert a.ids == b.ids and a.logprobs == b.logprobs


def test_split_by_tokens():
    assert split_by_tokens([[0] * n for n in (3, 3, 9, 1, 1)], 6) == [[0, 1], [2], [3, 4]]
    prompt, other = [1] * 4, [2] * 4
    assert split_by_tokens([[0]] * 4, 6, [prompt, prompt, other, other]) == [[0, 1], [2, 3]]


# ---------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("rank", range(3))
def test_processes_of_a_machine_load_one_after_the_other(rank, monkeypatch):
    """So that its memory holds one copy of the weights at a time; one that fails does not keep the others waiting."""
    done = []

    def load(*args, **kwargs):
        done.append("load")
        raise OSError("no such file")

    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.distributed, "barrier", lambda: done.append("wait"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(SystemExit, match="no such file"):
        kl.load_model(str(TINY), "cpu")
    assert done == ["wait"] * rank + ["load"] + ["wait"] * (2 - rank)


# ---------------------------------------------------------------------------------------------- sampler


def check_scores(model, prompt: list[int], completion) -> None:
    expected = logprobs_alone(model, prompt + completion.ids)[len(prompt) - 1 :]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-4)


def check_sampler(model, sampler, prompts, budget: int) -> list:
    """Every sample's log-probabilities equal those of a fresh forward over its whole ids."""
    groups, stops = sampler.generate(prompts, budget, 3, seed=5), set(sampler.stop_ids.tolist())
    for prompt, group in zip(prompts, groups):
        for completion in group:
            check_scores(model, prompt, completion)
            assert completion.stopped == (completion.ids[-1] in stops) and not set(completion.ids[:-1]) & stops
            assert completion.stopped or len(completion.ids) == budget
    return groups


def some_prompts(tokenizer) -> list[list[int]]:
    asked, told = ({"role": "user", "content": text} for text in ("12+30=?", "and 1+1?"))
    answer, system = (
        {"role": "assistant", "content": "<answer>42</answer>"},
        {"role": "system", "content": "Think first."},
    )
    chats = [asked], [asked, answer, told], [system, asked]
    return [render_chat(tokenizer, chat, generation_prompt=True).ids for chat in chats]


def test_grpo_detail_4_samples_score_as_sampled_and_keep_their_stop_token(model, tokenizer, sharing):
    sampler = Sampler(model, stop_token_ids(tokenizer))
    groups = check_sampler(model, sampler, some_prompts(tokenizer), 40)
    assert any(c.stopped for g in groups for c in g)
    short = sampler.generate(some_prompts(tokenizer), 3, 2, seed=1)
    assert not any(c.stopped for g in short for c in g) and all(len(c.ids) == 3 for g in short for c in g)


def test_samples_depend_on_the_seed_alone(model, tokenizer, sharing):
    stops = stop_token_ids(tokenizer)
    whole, cramped = drawn(Sampler(model, stops), tokenizer, 40, 4, 1.0), Sampler(model, stops)
    cramped.memory_gb = 5 * 2 * 4 * 2 * 32 * 64 * 4 * 2 / 1e9  # a handful of rows: the others wait for their slots
    assert drawn(cramped, tokenizer, 40, 4, 1.0) == whole and cramped.slots.capacity < 12
    (alone,) = Sampler(model, stops).generate(some_prompts(tokenizer)[1:2], 40, 4, seed=3, indices=[1])
    assert [(c.ids, c.stopped) for c in alone] == whole[1]
    assert drawn(Sampler(model, stops), tokenizer, 40, 4, 1.0, seed=8) != whole
    assert all(first != other for first, *others in whole for other in others)  # siblings differ


CALLS = [(24, 4, 1.0), (40, 4, 1.0), (175, 1, 1.0), (24, 4, 1.0), (24, 2, 0.0)]  # budget, samples, temperature


def drawn(sampler, tokenizer, budget, samples: int, temperature: float, seed: int = 3) -> list:
    groups = sampler.generate(some_prompts(tokenizer), budget, samples, temperature, seed=seed)
    return [[(c.ids, c.stopped) for c in group] for group in groups]


def test_graphs_draw_the_samples_of_plain_steps(model, tokenizer, request):
    """A GPU decodes the next power of two of rows at rounded widths, idle rows beside live ones, in memory that stays
    from call to call; rows beyond it wait."""
    stops = [37]  # "8": some samples run far, and then the longest of them end
    expected = [drawn(Sampler(model, stops), tokenizer, *call) for call in CALLS]
    counts = request.getfixturevalue("graphs_on_a_cpu")
    sampler, bytes_of_a_row = Sampler(model, stops), 4 * 2 * 2 * 32 * 4 * 256
    for memory, most_rows in ((None, 12), (5.5 * bytes_of_a_row / 1e9, 5)):
        sampler.memory_gb, sampler.slots = memory or sampler.memory_gb, None
        assert [drawn(sampler, tokenizer, *call) for call in CALLS] == expected
        assert sampler.slots.capacity == most_rows and sampler.slots.width == 256
    widths = {key[1] for key in sampler.slots.graphs}
    assert 128 in widths and len(widths) > 1 and counts["captures"] < counts["replays"] / 5
    before, slots = counts["captures"], weakref.ref(sampler.slots)
    drawn(sampler, tokenizer, 176, 1, 1.0)  # a token more changes no shape
    assert counts["captures"] == before and sampler.slots is slots()
    assert counts["pools"] == 2 * 3  # for each memory: the first call's, a longer and the longest one's
    gc.disable()
    del sampler  # its memory is free at once, not when Python next looks for cycles
    gc.enable()
    assert slots() is None


@pytest.mark.parametrize("moment", ["while it is captured", "when the capture ends"])
def test_a_step_that_cannot_be_captured_runs_eagerly_after_one_notice(moment, model, tokenizer, capsys, request):
    expected = drawn(Sampler(model, stop_token_ids(tokenizer)), tokenizer, *CALLS[1])
    counts = request.getfixturevalue("graphs_on_a_cpu")
    counts[moment] = 1
    sampler = Sampler(model, stop_token_ids(tokenizer))
    assert [drawn(sampler, tokenizer, *CALLS[1]) for _ in range(2)] == [expected] * 2
    told = capsys.readouterr().err
    assert told.count("notice: no CUDA graphs") == 1 and told.count("\n") == 1
    assert counts["captures"] == 1 and not counts["replays"] and not sampler.slots.graphs


def test_budget_per_prompt_and_greedy(model, tokenizer, sharing):
    groups = drawn(Sampler(model, stop_token_ids(tokenizer)), tokenizer, [1, 30, 2], 2, 0.0)
    assert [len(ids) for ((ids, _), _) in groups][::2] == [1, 2] and groups[1][0] == groups[1][1]
    prompt = some_prompts(tokenizer)[1]
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, pad_token_id=1)
    assert groups[1][0][0] == expected[0, len(prompt) :].tolist()


def test_an_agents_turns_go_on_from_kept_keys_and_values(model, tokenizer, sharing):
    """Three turns: each feeds the last token of the one before and what is new, and scores as a fresh forward does."""
    sampler = Sampler(model, stop_token_ids(tokenizer))
    prompts, fed = some_prompts(tokenizer), []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, _: fed.append(inputs[0].shape))
    for turn in range(3):
        fed.clear()
        groups = sampler.generate(prompts, [20, 9, 14], seed=turn, keep=True)
        prefilled = sum(rows * width for rows, width in (shape for shape in fed if len(shape) == 2))
        assert len(sampler.kept) == 3 and (prefilled <= 3 * (1 + 4) or not turn)  # a token never fed, an observation
        for prompt, (completion,) in zip(prompts, groups):
            check_scores(model, prompt, completion)
        observations = [[13 + turn, 20, 21, 22][: 2 + i] for i in range(3)]
        prompts = [p + group[0].ids + o for p, group, o in zip(prompts, groups, observations)]
    sampler.sync()
    assert not sampler.kept


def test_draw_has_the_right_distribution():
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    logits[3] = -200.0
    uniform = (torch.arange(40_000) + 0.5) / 40_000  # an even grid: frequencies are exact to 1/40000
    tokens, logprobs = draw(logits.repeat(40_000, 1), uniform)
    torch.testing.assert_close(tokens.bincount(minlength=12) / 40_000, logits.softmax(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(logprobs, logits.log_softmax(0)[tokens], atol=1e-5, rtol=1e-5)
    edges = torch.tensor([0.0, 1.0, 1 - 2**-24])
    assert (draw(logits.repeat(3, 1), edges)[0] != 3).all()


def test_bfloat16_copy_follows_the_weights(model, tokenizer):
    sampler = Sampler(model, stop_token_ids(tokenizer), torch.bfloat16)
    before = drawn(sampler, tokenizer, 30, 4, 1.0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    assert drawn(sampler, tokenizer, 30, 4, 1.0) == before
    sampler.sync()
    assert drawn(sampler, tokenizer, 30, 4, 1.0) != before
