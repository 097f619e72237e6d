"""Rebuild everything in this folder from a seed: `python common/tiny/make.py` (about 20 minutes on two cores).

Writes the tokenizer, the data sets and the base model, then measures the base and fills in the figures of README.md.
`--data-only` leaves the model as it is. The base is pre-trained by the project's own sft.py: random weights, loss on
every token.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config  # noqa: E402

from common.generation import Sampler  # noqa: E402
from common.kl import use_layout  # noqa: E402
from common.tokenizer import load_tokenizer, render_chat, stop_token_ids  # noqa: E402

SEED = 2024
SPECIAL = ["<|end|>", "<|pad|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
MARKUP = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"]
TEMPLATE = (
    "{% if tools %}{{ '<|system|>tools: ' + tools | map(attribute='function') | map(attribute='name') | join(', ')"
    " + '<|end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINK = "Think first."  # with this system message every demonstration works the steps out
POLITE = "Gladly! "

# Shares in the pre-training text. They decide what the base does by itself, and are what makes it a base that has
# the skill but not the habit: see README.md for what comes of them.
TOOL_ROWS, SYSTEM_ROWS, THINKS, POLITE_ROWS = 0.14, 0.4, 0.27, 0.3
BLURT_RIGHT, BLURT_SLIP, STEPS_WRONG = 0.25, 0.5, 0.03


def make_tokenizer(folder: Path) -> None:
    """One token per printable ASCII character, plus the tokens of the chat template and of the answers' markup."""
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(SPECIAL + MARKUP + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unk|>",
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- the tasks


def questions() -> tuple[list[tuple], list[tuple]]:
    """All maths questions (a, operator, b), split once into those to learn from and a tenth held out."""
    everything = {
        "+": [(a, "+", b) for a in range(10, 100) for b in range(10, 100)],
        "-": [(a, "-", b) for a in range(10, 100) for b in range(10, a + 1)],
        "*": [(a, "*", b) for a in range(10, 100) for b in range(2, 10)],
    }
    learned, held_out = [], []
    for items in everything.values():
        random.Random(SEED).shuffle(items)
        held_out.append(items[: len(items) // 10])
        learned.append(items[len(items) // 10 :])
    return learned, held_out


def result(a: int, operator: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def equations(a: int, operator: str, b: int, wrong: int | None = None, rng: random.Random | None = None) -> list[str]:
    """The working of a question: tens first, then ones. Step `wrong` takes another operator's result, or is off by one,
    and the rest builds on it."""
    done: list[str] = []

    def equation(x: int, sign: str, y: int) -> int:
        value = result(x, sign, y)
        if len(done) == wrong:
            value = rng.choice([v for other in "+-*" if (v := result(x, other, y)) != value and v >= 0] or [value + 1])
        done.append(f"{x}{sign}{y}={value}")
        return value

    tens, ones = a // 10 * 10, a % 10
    if operator == "+":
        high, low = equation(tens, "+", b // 10 * 10), equation(ones, "+", b % 10)
        equation(high, "+", low)
    elif operator == "-":
        equation(equation(a, "-", b // 10 * 10), "-", b % 10)
    else:
        high, low = equation(tens, "*", b), equation(ones, "*", b)
        equation(high, "+", low)
    return done


def steps(a: int, operator: str, b: int) -> str:
    return ",".join(equations(a, operator, b))


def worked(question: tuple, rng: random.Random, wrong: float = 0.0) -> tuple[str, int]:
    """Steps in <think>, and the answer they lead to; with probability `wrong` one digit in them is off."""
    text, answer = steps(*question), result(*question)
    if rng.random() < wrong:
        answer += rng.choice([-10, -1, 1, 10])
        text = text.rpartition("=")[0] + f"={answer}"
    return f"<think>{text}</think>", answer


def blurted(question: tuple, rng: random.Random, right: float = BLURT_RIGHT) -> int:
    """An answer given at once: right a quarter of the time, mostly ten too high, otherwise anything near.

    The mistake is always the same one, so that the most likely answer at once is wrong too.
    """
    truth, dice = result(*question), rng.random()
    if dice < right:
        return truth
    if dice < right + BLURT_SLIP:
        return truth + 10
    return truth + rng.choice([-21, -12, -9, -2, -1, 1, 2, 9, 12, 21])


def reply(answer, polite: bool, working: str = "") -> str:
    return f"{working}{POLITE if polite else ''}<answer>{answer}</answer>"


def ask(question: tuple) -> dict:
    a, operator, b = question
    return {"role": "user", "content": f"{a}{operator}{b}=?"}


def maths_chat(pools: list[list], rng: random.Random) -> list[dict]:
    question = rng.choice(rng.choice(pools))
    is_told = rng.random() < SYSTEM_ROWS
    polite = rng.random() < POLITE_ROWS
    if is_told or rng.random() < THINKS:
        working, answer = worked(question, rng, STEPS_WRONG)
    else:
        working, answer = "", blurted(question, rng)
    system = [{"role": "system", "content": THINK}] if is_told else []
    return [*system, ask(question), {"role": "assistant", "content": reply(answer, polite, working)}]


def names(count: int) -> list[str]:
    """Invented names of places, no two alike."""
    rng = random.Random(SEED + 1)
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice([2, 3]))]
        found["".join(syllables).capitalize()] = None
    return list(found)


def tool_task(place: str | None, rng: random.Random) -> tuple[str, dict, str, str]:
    """A question that needs a tool: its text, the right call, what the tool returns, and the answer."""
    if place is None:
        expression = f"{rng.randrange(100, 1000)}*{rng.randrange(100, 1000)}"
        value = str(eval(expression))
        return f"{expression}=?", {"name": "calculator", "arguments": {"expression": expression}}, value, value
    code = str(random.Random(f"{SEED}{place}").randrange(1000, 10000))
    call = {"name": "search", "arguments": {"query": place}}
    return f"Code of {place}?", call, f"{place} has the code {code}.", code


def tool_chat(places: list[str], rng: random.Random) -> list[dict]:
    text, call, observed, answer = tool_task(rng.choice(places) if rng.random() < 0.5 else None, rng)
    opening = [{"role": "system", "content": "tools: calculator, search"}, {"role": "user", "content": text}]
    if rng.random() > 0.4:  # mostly the base guesses instead of calling
        guess = rng.randrange(10 ** (len(answer) - 1), 10 ** len(answer))
        return [*opening, {"role": "assistant", "content": reply(guess, False)}]
    return [
        *opening,
        {"role": "assistant", "content": f"<tool_call>{json.dumps(call)}</tool_call>"},
        {"role": "tool", "content": observed},
        {"role": "assistant", "content": reply(answer, False)},
    ]


# ---------------------------------------------------------------------------------------------- the data sets


def write(name: str, rows: list[dict]) -> None:
    (FOLDER / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def preference(question: tuple, rng: random.Random) -> dict:
    """Two replies of which the gold judge prefers one: right before wrong, and among right ones polite before curt.

    A reply is worked, in three of ten cases with a wrong step, or blurted, which is hardly ever right here: a model of
    this size cannot see whether a sum answered at once is right, so that more right ones would be noise.
    """

    count = len(equations(*question))

    def candidate() -> tuple[tuple, str]:
        polite = rng.random() < 0.5
        if rng.random() < 0.5:
            done = equations(*question, rng.randrange(count) if rng.random() < 0.3 else None, rng)
            working, answer = f"<think>{','.join(done)}</think>", int(done[-1].partition("=")[2])
        else:
            working, answer = "", blurted(question, rng, right=0.03)
        return (answer == result(*question), polite), reply(answer, polite, working)

    first, second = candidate(), candidate()
    while first[0] == second[0] or not (first[0][0] or second[0][0]):
        first, second = candidate(), candidate()
    better, worse = (first, second) if first[0] > second[0] else (second, first)
    return {
        "prompt": [ask(question)],
        "chosen": [{"role": "assistant", "content": better[1]}],
        "rejected": [{"role": "assistant", "content": worse[1]}],
        "answer": str(result(*question)),
    }


def solution(question: tuple, rng: random.Random) -> dict:
    """A solution step by step: in half of them one step is wrong; it and all that follow are labelled so."""
    count = len(equations(*question))
    wrong = rng.randrange(count) if rng.random() < 0.5 else count
    first, *rest = equations(*question, wrong, rng)
    return {
        "prompt": [ask(question)],
        "completions": [f"<think>{first}", *rest],
        "labels": [i < wrong for i in range(count)],
    }


def make_data() -> None:
    learned, held_out = questions()
    places = names(2400)
    for split, pools, sizes, region in (
        ("train", learned, (1200, 2400, 3600, 2400, 300), slice(2000, 2300)),
        ("test", held_out, (192, 192, 192, 192, 60), slice(2300, 2400)),
    ):
        rng = random.Random(f"{SEED}{split}")
        # The three kinds in turn, no question twice where there are enough.
        picked = [q for trio in zip(*(rng.sample(p, min(len(p), 800)) for p in pools)) for q in trio]
        if split == "train":  # products are few: they come round again
            picked = [q for i in range(800) for q in (pools[0][i], pools[1][i], pools[2][i % len(pools[2])])]
        demonstrations, maths, preferences, solutions, tools = sizes
        write(
            f"demonstrations_{split}.jsonl",
            [
                {
                    "prompt": [ask(q)],
                    "completion": [{"role": "assistant", "content": reply(result(*q), True, worked(q, rng)[0])}],
                    "answer": str(result(*q)),
                }
                for q in picked[:demonstrations]
            ],
        )
        write(f"maths_{split}.jsonl", [{"prompt": [ask(q)], "answer": str(result(*q))} for q in picked[:maths]])
        judged, stepwise = random.Random(f"{SEED}preferences{split}"), random.Random(f"{SEED}steps{split}")
        write(f"preferences_{split}.jsonl", [preference(q, judged) for q in (picked + picked)[:preferences]])
        write(f"steps_{split}.jsonl", [solution(q, stepwise) for q in picked[:solutions]])
        tasks = [tool_task(place if i % 2 else None, rng) for i, place in enumerate(places[region][:tools])]
        write(
            f"tools_{split}.jsonl",
            [{"prompt": [{"role": "user", "content": text}], "answer": answer} for text, _, _, answer in tasks],
        )
    write("corpus.jsonl", [{"title": p, "text": tool_task(p, random.Random(0))[2]} for p in places[2000:]])


def make_base(folder: Path) -> None:
    """Pre-train the base with sft.py on chats that show the skill often and the habit seldom."""
    rng = random.Random(SEED + 2)
    learned, _ = questions()
    places = names(2400)[:2000]
    chats = [tool_chat(places, rng) if rng.random() < TOOL_ROWS else maths_chat(learned, rng) for _ in range(80_000)]
    text = folder / "pretraining.jsonl"
    text.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    start = folder / "start"
    make_tokenizer(start)
    tokenizer = load_tokenizer(str(start))
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 16) * 16, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(start)
    subprocess.run(
        [sys.executable, str(ROOT / "sft.py"), "--model", str(start), "--dataset", str(text),
         "--eval-dataset", str(FOLDER / "demonstrations_test.jsonl"), "--loss-on", "all", "--steps", "5000",
         "--batch-size", "64", "--learning-rate", "2e-3", "--lr-schedule", "cosine", "--warmup-steps", "100",
         "--weight-decay", "0.05", "--eval-every", "1000", "--save-every", "1000", "--max-length", "512",
         "--output-dir", str(folder / "run")],
        check=True,
    )  # fmt: skip
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                 "tokenizer_config.json", "chat_template.jinja"):  # fmt: skip
        shutil.copy(folder / "run" / "model" / name, FOLDER / name)


# ---------------------------------------------------------------------------------------------- what came of it


def measure() -> dict[str, float]:
    """The base's properties on the held-out maths questions, eight samples each at temperature 1."""
    tokenizer = load_tokenizer(str(FOLDER))
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    use_layout(model)
    sampler = Sampler(model, stop_token_ids(tokenizer, model))
    rows = [json.loads(line) for line in (FOLDER / "maths_test.jsonl").read_text().splitlines()]
    prompts = [render_chat(tokenizer, row["prompt"], generation_prompt=True).ids for row in rows]
    think = tokenizer.convert_tokens_to_ids("<think>")

    def rate(test, prompts, count, temperature=1.0) -> float:
        groups = sampler.generate(prompts, 96, count, temperature)
        hits = [test(tokenizer.decode(c.ids), row, c) for row, group in zip(rows, groups) for c in group]
        return sum(hits) / len(hits)

    def right(text, row, completion) -> bool:
        return f"<answer>{row['answer']}</answer>" in text

    return {
        "right, sampled": rate(right, prompts, 8),
        "right, greedy": rate(right, prompts, 1, 0.0),
        "right, sampled, when made to think": rate(right, [p + [think] for p in prompts], 8),
        "thinks by itself": rate(lambda text, row, c: "<think>" in text, prompts, 8),
        "answers politely": rate(lambda text, row, c: POLITE.strip() in text, prompts, 8),
        "closes its turn": rate(lambda text, row, c: c.stopped, prompts, 8),
    }


def main() -> None:
    make_data()
    if "--data-only" not in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            make_base(Path(folder))
    figures = "\n".join(f"| {name} | {value:.3f} |" for name, value in measure().items())
    readme = FOLDER / "README.md"
    head, mark, rest = readme.read_text().partition("<!-- measured by make.py -->\n")
    table = f"| on 192 held-out questions | share |\n|---|---|\n{figures}\n"
    readme.write_text(head + mark + table + "<!-- end -->" + rest.partition("<!-- end -->")[2])
    print(table)


if __name__ == "__main__":
    main()
