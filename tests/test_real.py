"""On a real pretrained model and data that nobody here made: REAL_MODEL=<folder or Hub name> pytest -m real."""

import json
import os
import random
from functools import partial
from itertools import groupby

import pytest
import torch
from conftest import jsonl, metrics, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import agentic
from common.generation import Sampler
from common.kl import load_model, token_logprobs
from common.tokenizer import load_tokenizer, pack_completions, render_chat, stop_token_ids

pytestmark = pytest.mark.real
MODEL = os.environ.get("REAL_MODEL", "")


@pytest.fixture(scope="module")
def loaded():
    tokenizer, model = load_tokenizer(MODEL), load_model(MODEL, torch.device("cpu"))
    return tokenizer, model, Sampler(model, stop_token_ids(tokenizer, model))


def test_grpo_raises_the_reward_on_sums_and_the_model_answers_through_generate(tmp_path):
    rng = random.Random(0)
    pairs = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(400)]
    data = jsonl(tmp_path / "sums.jsonl", *[{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in pairs])
    run("grpo", "--model", MODEL, "--dataset", data, "--steps", 18, "--batch-size", 8, "--num-samples", 8,
        "--max-completion-tokens", 16, "--learning-rate", "3e-5", "--eval-every", 0, "--eval-rows", 4, "--beta", "0",
        "--eval-samples", 1, "--dtype", "bfloat16", "--warmup-steps", 5, "--output-dir", tmp_path / "run")  # fmt: skip
    rewards = [r["reward/mean"] for r in metrics(tmp_path / "run")[1:]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15, rewards
    folder = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat, how = [{"role": "user", "content": "What is 12 + 30?"}], {"return_tensors": "pt", "return_dict": True}
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, **how)
    ids = model.generate(**asked, max_new_tokens=24, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert any(c.isdigit() for c in tokenizer.decode(ids))


def test_samples_score_as_sampled(loaded):
    tokenizer, model, sampler = loaded
    texts = ("Say <|im_end|> twice.", "What is 7 + 5?", "Name a river.")
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [render_chat(tokenizer, chat, generation_prompt=True).ids for chat in chats]
    rows = [(p, c) for p, group in zip(prompts, sampler.generate(prompts, 24, 4, seed=1)) for c in group]
    with torch.no_grad():
        found, _ = token_logprobs(model, pack_completions([p for p, _ in rows], [c.ids for _, c in rows]))
    sampled = torch.tensor([x for _, c in rows for x in c.logprobs])
    torch.testing.assert_close(found, sampled, atol=1e-4, rtol=1e-4)


def test_an_agent_calls_its_tools_and_every_stored_token_is_exact(loaded):
    """A template that knows no tools; two shots of an example in the prompt, for the model has never seen a call."""
    tokenizer, model, sampler = loaded
    limits = {"max_completion_tokens": 48, "max_trajectory_tokens": 160}
    args = agentic.Args(model=MODEL, tools=("calculator",), instruction="", **limits)
    dialogue, tools = agentic.Dialogue(tokenizer, args.max_observation_tokens), agentic.Tools(args)
    begin = partial(agentic.ToolQuestions, [tools.calculator], args)
    shots = []
    for a, b in ((31, 17), (58, 12)):
        call = {"name": "calculator", "arguments": {"expression": f"{a}*{b}"}}
        said = f"<tool_call>\n{json.dumps(call)}\n</tool_call>", f"<answer>{a * b}</answer>"
        shots += [{"role": "user", "content": f"What is {a} * {b}?"}, {"role": "assistant", "content": said[0]}]
        shots += dialogue.messages([agentic.Call("calculator", {}, str(a * b))])
        shots.append({"role": "assistant", "content": said[1]})
    rows = [([*shots, {"role": "user", "content": f"What is {n} * 23?"}], str(23 * n)) for n in (19, 47)]
    tasks = [agentic.encode_task(dialogue, begin, {"prompt": prompt, "answer": n}, 900) for prompt, n in rows]
    trajectories = sum(agentic.Player(sampler, dialogue, begin, args).play(tasks, [0, 1], 4, 0.7, 1), [])
    assert any(len(t.turns) > 1 and t.turns[0][0].error is None for t in trajectories)
    for t in trajectories:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([t.ids])).logits[0].float() / 0.7
        fresh = logits[:-1].log_softmax(-1).gather(1, torch.tensor(t.ids[1:])[:, None])[:, 0].tolist()
        assert max(abs(fresh[i - 1] - t.logprobs[i]) for i, mine in enumerate(t.action_mask) if mine) < 1e-4
        for mine, places in groupby(range(t.prompt_length, len(t.ids)), t.action_mask.__getitem__):
            text = tokenizer.decode([t.ids[i] for i in places])
            assert mine or text.startswith("\n<|im_start|>user\n<tool_response>\n") and text.endswith("assistant\n")
