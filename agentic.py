"""Agentic RL: the unit of optimisation moves from the answer to the trajectory.

The model writes a turn, tools answer its calls, it reads that and goes on, until a turn calls nothing: the answer. Each
trajectory of a task is judged by how much better it scored than its siblings. What tools wrote is never trained on.

    τ = (prompt, turn₁, observation₁, turn₂, …, answer),    a_t = 1 where the model wrote token t: an action
    credit trajectory:  A_i = (R(τ_i) − mean R) / std R                  over the trajectories of a task
    credit turn:        A_ik = (R_ik − mean R_·k) / std R_·k             R_ik = Σ_{j≥k} r_ij, over those with a turn k
    loss = mean over i of Σ_t a_t·[ −w_t·min(ρ_t·A, clip(ρ_t, 1−ε_low, 1+ε_high)·A) + β·k3_t ] / Σ_t a_t

Signal: whether the final answer is right. Optimizer: grpo.py's, on actions alone. Leash: KL to the start. Defence: a
program checks answers; `python` runs in a sandbox; accuracy is measured again with the tools withheld.

    python agentic.py                                              # embedded model and data, a minute on a laptop
    python agentic.py --model Qwen/Qwen2.5-1.5B-Instruct           # GSM8K with Python, on one GPU
    torchrun --nproc-per-node 8 agentic.py --model … --dataset nq.jsonl --tools search --corpus documents.jsonl

Normal: `eval/accuracy` rises with `eval/tool_use_rate`, `eval/accuracy_without_tools` stays, `agent/error_rate` falls.
Wrong: `agent/cut` (no answer) above a few per cent: a limit is too low. For all else, ρ and k3 see grpo.py.

Details that decide whether it works, marked in the code under their numbers:
 1. A group whose rewards are all equal gets advantages of exactly zero, not rounding noise over a tiny std.
 2. Ids, mask and log-probabilities grow together, turn by turn; nothing sampled is tokenised again.
 3. Logits are divided by the sampling temperature in every forward, policy's and reference's.
 4. The end-of-turn token is an action. What tools and template write enters no loss, KL, entropy or denominator.
 5. π_old is computed by the trainer; the sampler's own probabilities μ serve only in w = min(π_old/μ, cap), nearly 1.
 6. The minimum of clipped and unclipped objective bounds the gain for both signs of the advantage.
 7. Losses are divided by counts of the whole optimizer step's actions: microbatches and processes change nothing.
 8. All randomness is a function of seed, step, turn and the trajectory's number: a resumed run repeats every bit.
 9. Observations are tokenised apart, cannot forge control tokens, are cut inside their tags, or dropped over budget.
10. Whatever goes wrong in a call is an observation and a counter, never a crash; a call that hangs is given up.

Papers: Search-R1 arXiv:2503.09516, ReTool 2504.11536, GRPO 2402.03300, turn-level credit 2505.11821.
"""

import builtins  # noqa: I001 (sorted, the three lines from common.tokenizer would be twenty)
import gc
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime, timedelta
from decimal import Context, Decimal
from fractions import Fraction
from functools import partial
from multiprocessing import pool
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from common.generation import Sampler, is_right
from common.kl import clip_gradients, completion_logprobs, context_length, frozen, kl_estimate, load_model
from common.tokenizer import TINY, encode_prompt, encode_rows, encode_text, end_of_turn, first_line, first_of
from common.tokenizer import gold_answers, load_rows, load_split, load_tokenizer, microbatches, pad_rows, read_messages
from common.tokenizer import read_row, render_text, shuffled_pass, stop_token_ids


@dataclass
class Args:
    # model, data and tools
    model: str = "Qwen/Qwen2.5-1.5B-Instruct"  # folder or Hub name of a causal language model
    dataset: str = "openai/gsm8k:main"  # file, folder or Hub name[:subset[:split]]; rows hold question and answer
    eval_dataset: str | None = "openai/gsm8k:main:test"  # held-out rows; with --dataset alone, at most a tenth of it
    eval_rows: int = 100  # held-out tasks used
    eval_samples: int = 4  # trajectories of each, at --temperature, with the tools and without
    environment: Literal["questions", "code"] = "questions"  # code: functions to write, rows of MBPP or HumanEval
    instruction: str = "Use the tools where they help. End with the answer alone in <answer></answer>."  # appended
    max_prompt_tokens: int = 1024  # rows with a longer prompt, tools included, are dropped
    tools: tuple[Literal["calculator", "search", "python"], ...] = ("python",)  # what the agent may call
    corpus: str | None = None  # documents for `search`: rows with text, and title if they have one
    tool_seconds: float = 5.0  # a call is given up after about these
    unsafe_python: bool = False  # run the model's code without bubblewrap, under limits alone
    max_turns: int = 4  # turns of the model in a trajectory; calls of the last one are not made
    max_completion_tokens: int = 512  # budget of a turn
    max_observation_tokens: int = 256  # what a tool answers is cut after these
    max_trajectory_tokens: int = 2048  # budget of a trajectory behind its prompt, observations included

    # algorithm
    credit: Literal["trajectory", "turn"] = "trajectory"  # one advantage for a trajectory, or one for each turn
    call_cost: float = 0.0  # taken from the reward for every call written
    num_samples: int = 8  # trajectories per task (G)
    temperature: float = 1.0  # of sampling, and of every log-probability in training
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"  # (r − mean) / std; r − mean; r − mean of the others
    aggregation: Literal["sequence", "token", "constant"] = "sequence"  # mean per completion; of tokens; by a constant
    clip_low: float = 0.2  # ratios are clipped below 1 − clip_low
    clip_high: float = 0.2  # and above 1 + clip_high; 0.28 is DAPO's clip-higher
    beta: float = 0.001  # weight of the KL in the loss; 0 loads no reference
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # its expected gradient: none; of KL(π‖ref); of KL(ref‖π)
    importance_cap: float = 2.0  # of the weight π_old/μ, which corrects for the sampler's rounding (μ); 0: no weight
    update_epochs: int = 1  # passes over each rollout
    minibatches: int = 1  # optimizer steps per pass; clipping acts only if one of the two is above 1

    # optimisation
    steps: int = 200  # rollouts
    batch_size: int = 32  # tasks per rollout over all processes
    microbatch_tokens: int = 16384  # tokens per forward and backward: a memory knob, not a change of result
    sampler_memory_gb: float | None = None  # bound on its keys and values; None: 4 on a CPU, a fifth of a GPU's
    lora_rank: int = 0  # 0: all weights; else adapters of this rank, by default at ten times the learning rate
    learning_rate: float = 1e-6  # peak
    warmup_steps: int = 5  # rollouts of linear warm-up
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up; the last two reach 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products and saved weights; auto: bfloat16 on CUDA
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    seed: int = 1
    today: str = f"{date.today()}"  # what chat templates print as the date

    # output
    eval_every: int = 20  # steps between evaluations
    save_every: int = 20  # steps between checkpoints
    output_dir: str | None = None  # default: runs/agentic/<date>_<time>
    resume: str | None = None  # continue the run in this folder with its arguments, but for those given again
    wandb_project: str | None = None  # also log to Weights & Biases


EMBEDDED = Args(  # what runs where no --model is given: a minute on two cores
    model=f"{TINY}", dataset=f"{TINY}/tools_train.jsonl", eval_dataset=f"{TINY}/tools_test.jsonl", eval_rows=60,
    eval_samples=8, instruction="", tools=("calculator", "search"), corpus=f"{TINY}/corpus.jsonl", temperature=0.7,
    max_turns=3, max_completion_tokens=96, max_observation_tokens=128, max_trajectory_tokens=320, steps=30,
    batch_size=16, microbatch_tokens=4096, learning_rate=6e-4, eval_every=10,
)  # fmt: skip


# ------------------------------------------------------------------------------ the environment, its tools: edit here


class Environment:
    """Each trajectory gets an instance of its own. A subclass defines `reset(row)`, which returns the first messages,
    the same every time, and `reward(trajectory)`; it may set other `tools`: typed functions, with `Args:` described."""

    def __init__(self, tools: list, args: Args, run_python=None):
        self.tools, self.args, self.run_python = tools, args, run_python

    def turn_reward(self, calls: list["Call"]) -> float:
        return -self.args.call_cost * len(calls)


class ToolQuestions(Environment):  # questions with right answers, of which any counts
    def reset(self, row: dict) -> list[dict]:
        self.golds = gold_answers(row)
        *before, asked = read_messages(first_of(row, "prompt", "question", "problem"))
        return [*before, {**asked, "content": f"{asked['content']}\n\n{self.args.instruction}".rstrip("\n")}]

    def reward(self, trajectory: "Trajectory") -> float:
        return float(trajectory.answer is not None and is_right(trajectory.answer, self.golds))


class CodeTasks(Environment):  # functions to write; their tests, which the model never sees, must pass in the sandbox
    def reset(self, row: dict) -> list[dict]:
        tests = first_of(row, "test_list", "test")
        tests = [tests, f"check({row['entry_point']})"] if isinstance(tests, str) else tests
        self.given = row["prompt"] if "entry_point" in row else ""  # HumanEval's imports, helpers and empty function
        self.tests = "\n".join([*row.get("test_imports", []), row.get("test_setup_code", ""), *tests])
        names = re.findall(r"def (\w+)", row.get("code", "")) + re.findall(r"(?<![\w.])(\w+)\(", tests[0])
        self.name = row.get("entry_point") or next(n for n in names if n in tests[0] and not hasattr(builtins, n))
        asked = f"Complete this:\n```python\n{self.given}```" if self.given else first_of(row, "text", "prompt")
        return [{"role": "user", "content": f"{asked}\n\nWrite the whole function `{self.name}` in a Python block."}]

    def reward(self, trajectory: "Trajectory") -> float:
        blocks = re.findall(r"```(?:python|py)?\s*\n(.*?)(?:```|$)", trajectory.answer or "", re.DOTALL)
        program = next((block for block in blocks if f"def {self.name}" in block), trajectory.answer or "")
        passed = os.urandom(16).hex()  # which a program that ends early cannot print
        with suppress(TimeoutError):
            return float(self.run_python(f"{self.given}\n{program}\n{self.tests}\nprint('{passed}')").endswith(passed))
        return 0.0


class Tools:  # what --tools may name
    def __init__(self, args: Args):
        self.args = args
        if "search" in args.tools:
            self.index_corpus()
        if "python" in args.tools or args.environment == "code":
            self.command = self.sandbox()
            told = self.python("print(6 * 7)") if shutil.which(self.command[0]) else "it is not installed"
            remedy = "install it, let it make namespaces (docker run --privileged), or limit alone with --unsafe-python"
            if (told := " ".join(told.split())) != "42":
                sys.exit(f"--tools python: bubblewrap cannot be used here ({told}); {remedy}.")

    def calculator(self, expression: str) -> str:
        """Compute an arithmetic expression.
        Args:
            expression: Numbers with + - * / // % ** and parentheses, such as 12*(3+4).
        """
        text = expression.strip().translate({ord("×"): "*", ord("÷"): "/", ord("−"): "-", ord("^"): "**"})
        if "(" not in text:  # within parentheses a comma may separate two numbers
            text = re.sub(r"(?<![\d.,])[1-9]\d{0,2}(,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
        number = r"(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3}(?!\d))?"
        is_large = len(text) > 200 or re.search(r"\*\*(?! *-? *\d{1,3}(?![\d.eE]| *\*\*))|\*\*.*\*\*.*\*\*", text)
        if is_large or not re.fullmatch(r"[-+*/%() ]*", re.sub(number, "", text)):  # nothing else reaches eval
            raise ValueError("give numbers and + - * / // % ( ) and ** with whole exponents below 1000, in one line")
        value = Fraction(eval(re.sub(number, r"Fraction('\g<0>')", text), {"Fraction": Fraction, "__builtins__": {}}))
        return str(value if value.denominator == 1 else Context(15).divide(*map(Decimal, value.as_integer_ratio())))

    def index_corpus(self) -> None:  # in a file, with SQLite's FTS5
        assert self.args.corpus, "--tools search looks through documents: name them with --corpus"
        rows, self.folder = map(read_row, load_rows(self.args.corpus)), tempfile.TemporaryDirectory()
        documents = [(row.get("title", ""), row["text"]) for row in rows if "text" in row]
        documents = dict.fromkeys(text if text.startswith(title) else f"{title}: {text}" for title, text in documents)
        assert documents, f"--corpus {self.args.corpus}: its rows have no text"
        with sqlite3.connect(f"{self.folder.name}/index") as index:
            index.execute("CREATE VIRTUAL TABLE documents USING fts5(text, tokenize='porter unicode61')")
            index.executemany("INSERT INTO documents VALUES (?)", [[text] for text in documents])

    def search(self, query: str) -> str:
        """Search the documents.
        Args:
            query: The words to look for.
        """
        words = [f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", query))][:32]  # quoted, none is an operator
        asked = "SELECT text FROM documents WHERE documents MATCH ? ORDER BY rank, rowid LIMIT 3"
        found = sqlite3.connect(f"{self.folder.name}/index").execute(asked, [" OR ".join(words)]) if words else []
        return "\n".join(text for (text,) in found) or "nothing found"

    def sandbox(self) -> list[str]:
        """The command that runs code in bubblewrap: no network, no other process, nothing to see but this Python, the
        system's libraries and an empty folder of 16 MB, under limits. RLIMIT_NPROC does not bind root, so root becomes
        user 65534, who cannot read /root, so Python is mounted at /python. Left out: /proc, which shows the environment
        of bwrap, and /dev/shm, unlimited memory. Memory outside of any address space is bounded by time alone."""
        python, is_root = Path(sys.executable).resolve(), os.getuid() == 0 and not self.args.unsafe_python
        limits = f"CPU={math.ceil(self.args.tool_seconds) + 1}, AS=2**29, FSIZE=2**22, NPROC=0, NOFILE=32, CORE=0"
        prelude = f"""import os, resource, sys
{"os.setgroups([]), os.setgid(65534), os.setuid(65534)" if is_root else ""}
for name, value in dict({limits}).items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
exec(compile(sys.stdin.read(), "main.py", "exec"), {{"__name__": "__main__"}})"""
        code = ["-ISu", "-X", "utf8", "-c", prelude]
        spaces = "--unshare-ipc --unshare-pid --unshare-net --cap-drop ALL --cap-add CAP_SETUID --cap-add CAP_SETGID"
        folders = "".join(f" --perms 0755 --dir {folder}" for folder in ("/dev", "/usr", "/python", "/python/bin"))
        command = f"bwrap --die-with-parent --new-session {spaces if is_root else '--unshare-all'}{folders}".split()
        seen = {path: path for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64")} | {python: "/python/bin/python"}
        seen |= {python.parents[1] / name: f"/python/{name}" for name in ("lib", "lib64")}
        command += [part for here, there in seen.items() for part in ("--ro-bind-try", here, there)]
        command += "--dev-bind /dev/null /dev/null --size 16777216 --perms 0777 --tmpfs /scratch".split()
        command += "--chdir /scratch --setenv LD_LIBRARY_PATH /python/lib --remount-ro / /python/bin/python".split()
        return [python, *code] if self.args.unsafe_python else command + code

    def python(self, code: str) -> str:
        """Run Python code, which has the standard library and nothing else, and read what it prints.
        Args:
            code: A program that prints its result.
        """
        with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as scratch:
            pipes = {"stdin": subprocess.PIPE, "stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(self.command, **pipes, env={}, cwd=scratch, start_new_session=True)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(code.encode("utf-8", "replace"), timeout=self.args.tool_seconds)
            status = process.poll()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.seek(0)
            text = output.read(64_000).decode("utf-8", "replace").rstrip("\n")
        if status is None:
            raise TimeoutError(f"it took longer than {self.args.tool_seconds:g} seconds; it printed {text[:200]!r}")
        return "\n".join(filter(None, [text, status and f"[exit status {status}]"])) or "(it printed nothing)"


# ------------------------------------------------------------------------------------------------ trajectories


@dataclass
class Call:  # as the model wrote it, and what came of it
    name: str
    arguments: dict
    observation: str | None = None  # None: not made yet
    error: str | None = None  # unreadable, refused (no such tool), failed, timed_out


def parse_calls(text: str) -> list[Call]:
    """Calls in the format of Hermes, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, outside of reasoning."""
    text, calls, at = text.rpartition("</think>")[2], [], 0
    reasoning = text.find("<think>") % (len(text) + 1)  # where unclosed reasoning begins
    while (found := re.compile(r"<tool_call>\s*").search(text, at)) and found.start() < reasoning:
        at = found.end()
        try:  # an object ends at the brace that closes it, whatever its strings hold
            value, at = json.JSONDecoder(strict=False).raw_decode(text, at)
            assert isinstance(value["name"], str) and text[at:].lstrip().startswith("</tool_call>"), "or not closed"
            calls.append(Call(value["name"], value["arguments"]))
        except (ValueError, LookupError, TypeError, AssertionError, RecursionError) as error:
            told = f'error: a call must be {{"name": ..., "arguments": {{...}}}} ({first_line(error)})'
            calls.append(Call("", {}, told, "unreadable"))
    return calls


class Trajectory:  # every token that the model has read or written of a task
    def __init__(self, number: int, prompt: list[int], environment: Environment):
        self.number, self.environment, self.prompt_length = number, environment, len(prompt)
        self.ids, self.action_mask, self.logprobs = list(prompt), [False] * len(prompt), [0.0] * len(prompt)
        self.turns, self.lengths, self.is_over, self.answer = [], [], False, None  # of each turn: its calls, its length

    def append(self, ids: list[int], logprobs: list[float] | None = None) -> None:  # None: what the model only reads
        self.ids += ids  # detail 2
        self.action_mask += [logprobs is not None] * len(ids)  # detail 4
        self.logprobs += logprobs or [0.0] * len(ids)


class Dialogue:
    """How tools and their results are put into a chat. Where the template knows tools and has them called in the format
    of `parse_calls`: as schemas and `tool` messages. Elsewhere as text, in the first message and in `user` messages."""

    def __init__(self, tokenizer, max_observation_tokens: int):
        self.tokenizer, self.limit, self.closing = tokenizer, max_observation_tokens, end_of_turn(tokenizer)
        template, vocabulary = tokenizer.get_chat_template(), tokenizer.get_vocab()
        self.is_native = "tools" in template and "<function=" not in template and self.keeps_history(True)
        self.is_native &= "<tool_call>" in template or "<tool_call>" in vocabulary
        told = "rewrites earlier turns once a tool has answered: the model would train on another history than it saw"
        if not self.is_native and not self.keeps_history(False):
            sys.exit(f"The chat template of {tokenizer.name_or_path} {told}. Use one that only appends.")

    def keeps_history(self, is_native: bool) -> bool:
        """Set is_native; whether tools' results show up, and earlier text stays as it was, but for white space."""
        self.is_native, reply = is_native, {"role": "assistant", "content": "<think>one</think>two"}
        with suppress(Exception):  # templates raise what they like
            more = [reply, *self.messages([Call("probe", {}, "OBSERVED")])]
            chats = [[{"role": "user", "content": "a"}, *more * n] for n in range(3)]
            texts = ["".join(render_text(self.tokenizer, chat, None, True)[0].split()) for chat in chats]
            return all("OBSERVED" in b and b.startswith(a + reply["content"]) for a, b in zip(texts, texts[1:]))
        return False

    def prompt(self, messages: list[dict], tools: list) -> list[int]:
        from transformers.utils import get_json_schema

        schemas = [get_json_schema(tool) for tool in tools] or None
        if self.is_native or not schemas:
            return encode_prompt(self.tokenizer, messages, schemas)
        lines = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in schemas)
        told = f"You can call these tools:\n<tools>\n{lines}\n</tools>\nTo call one, write its name and arguments as a "
        told += 'JSON object between tags, like this:\n<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        told += "Then end your turn. The result comes back in <tool_response> tags, and you go on from it.\n\n"
        system, *rest = messages if messages[0]["role"] == "system" else [{"content": ""}, *messages]
        told = (told + system["content"]).strip()
        with suppress(Exception):  # templates without a system role raise
            return encode_prompt(self.tokenizer, [{"role": "system", "content": told}, *rest])
        return encode_prompt(self.tokenizer, [{**rest[0], "content": f"{told}\n\n{rest[0]['content']}"}, *rest[1:]])

    def messages(self, calls: list[Call]) -> list[dict]:
        """Results of a turn's calls, each cut to `limit` tokens before the template puts it inside of its tags."""
        texts = [call.observation[: 100 * self.limit] for call in calls]  # no tokenizer is to chew on megabytes
        for i, ids in enumerate([encode_text(self.tokenizer, text, begins=False) for text in texts]):
            if len(ids) > self.limit:
                texts[i] = self.tokenizer.decode(ids[: self.limit]).rstrip("\ufffd") + "..."  # detail 9
        if self.is_native:
            return [{"role": "tool", "name": call.name, "content": text} for call, text in zip(calls, texts)]
        return [{"role": "user", "content": "\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in texts)}]

    def observation(self, calls: list[Call]) -> list[int]:
        """Ids between a turn's last token and the next one's first. What was sampled is never rendered again."""
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "REPLY"}]
        text = render_text(self.tokenizer, [*exchange, *self.messages(calls)], None, True)[0]
        text = text.partition("REPLY")[2].partition(self.closing)[2]
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


class Player:  # lets the model sample, makes its calls, shows it what they answered
    def __init__(self, sampler: Sampler, dialogue: Dialogue, begin: partial, args: Args):
        self.sampler, self.dialogue, self.begin, self.args = sampler, dialogue, begin, args
        self.threads = pool.ThreadPool()  # daemons: one that hangs does not keep the process from its end

    def play(self, tasks, places: list[int], num_samples: int, temperature: float, seed: int, withheld: bool = False):
        """`num_samples` trajectories of each task; `places` are the tasks' numbers among those of all processes."""
        args, tokenizer, live, turn = self.args, self.dialogue.tokenizer, [], 0
        for place, task in zip(places, tasks):
            for number in range(place * num_samples, (place + 1) * num_samples):
                live.append(Trajectory(number, task["bare_ids" if withheld else "ids"], self.begin()))
                live[-1].environment.reset(json.loads(task["row"]))
        groups = [live[i : i + num_samples] for i in range(0, len(live), num_samples)]
        while live:
            # The model writes the next turn of each live trajectory; any stop token but the end of turn ends it.
            share = 1 if turn else num_samples  # in its first turn a task's trajectories share a prompt
            asked, sampling = live[::share], (share, temperature, seed * 64 + turn)  # detail 8
            room = [args.max_trajectory_tokens - len(t.ids) + t.prompt_length for t in asked]
            budgets, numbers = [min(args.max_completion_tokens, n) for n in room], [t.number // share for t in asked]
            drawn = self.sampler.generate([t.ids for t in asked], budgets, *sampling, numbers, keep=True)
            turn += 1
            for t, (ids, logprobs, stopped) in zip(live, [completion for group in drawn for completion in group]):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                calls = parse_calls(text) if stopped else []
                t.append(ids, logprobs)
                t.turns.append(calls)
                t.lengths.append(len(ids))
                t.answer = text if stopped and not calls else None
                t.is_over = not calls or turn == args.max_turns or tokenizer.decode(ids[-1:]) != self.dialogue.closing

            # The tools answer, and each trajectory reads what its own calls have brought.
            going = [t for t in live if not t.is_over]
            self.make_calls(going, withheld)
            for t in going:
                ids = self.dialogue.observation(t.turns[-1])
                t.is_over = len(t.ids) + len(ids) - t.prompt_length >= args.max_trajectory_tokens
                t.append([] if t.is_over else ids)
            live = [t for t in going if not t.is_over]
        self.threads.map(lambda t: setattr(t, "reward", t.environment.reward(t)), sum(groups, []))
        return groups

    def make_calls(self, trajectories: list[Trajectory], withheld: bool) -> None:
        """Make the calls of all last turns side by side, those of one turn one after the other."""

        def make(t: Trajectory) -> None:
            tools = {} if withheld else {tool.__name__: tool for tool in t.environment.tools}
            for call in [call for call in t.turns[-1] if not call.error]:
                try:
                    assert call.name in tools, f"there is no such tool; the tools are {', '.join(tools) or 'none'}"
                    call.observation = str(tools[call.name](**call.arguments))
                except (Exception, SystemExit) as error:  # detail 10
                    why = "timed_out" if isinstance(error, TimeoutError) else "failed"
                    call.error = why if call.name in tools else "refused"
                    call.observation = f"error: {type(error).__name__}: {first_line(error)}"

        made, calls = self.threads.imap_unordered(make, trajectories), [t.turns[-1] for t in trajectories]
        try:
            for _ in trajectories:
                made.next(1 + self.args.tool_seconds * max(map(len, calls)))
        except pool.TimeoutError:  # none has ended for so long: those that run hang
            self.threads = pool.ThreadPool()
            for call in [call for some in calls for call in some if call.observation is None]:
                call.observation, call.error = "error: it took too long", "timed_out"


def encode_task(dialogue: Dialogue, begin: partial, row: dict, max_tokens: int, cache_key: str = "") -> dict:
    messages = read_messages((environment := begin()).reset(row))
    ids, bare_ids = dialogue.prompt(messages, environment.tools), dialogue.prompt(messages, [])
    assert len(ids) <= max_tokens, f"a prompt of more than {max_tokens} tokens with its tools (--max-prompt-tokens)"
    return {"ids": ids, "bare_ids": bare_ids, "row": json.dumps(row, default=str), "prompt": repr(messages)}


def evaluate_agent(player: Player, tasks, run: "Run", rank: int, world: int, step: int) -> tuple[dict, list[dict]]:
    """Held-out accuracy, greedy, sampled, and with the tools withheld; a sample of each task. Writes transcripts."""
    args, tokenizer, means, places = player.args, player.dialogue.tokenizer, Means(), range(rank, len(tasks), world)
    sampling, mine, samples = (args.eval_samples, args.temperature, args.seed), [tasks[i] for i in places], []
    kinds = {"accuracy_without_tools": (*sampling, True), "accuracy_greedy": (1, 0.0, args.seed), "accuracy": sampling}
    player.sampler.sync()
    for name, how in kinds.items():  # the last of these is what the rest describes
        groups = player.play(mine, list(places), *how)
        played = [t for group in groups for t in group]
        means.add(f"eval/{name}", [t.reward for t in played])
    means.add("eval/tool_use_rate", [any(not call.error for calls in t.turns for call in calls) for t in played])
    means.add("eval/completion_length", [sum(t.lengths) for t in played])
    for task, (t, *_) in zip(mine, groups):
        about = {"reward": t.reward, "gold": json.loads(task["row"]).get("answer")}
        about |= {"prompt": tokenizer.decode(task["ids"]), "completion": tokenizer.decode(t.ids[t.prompt_length :])}
        samples.append(about)
    if rank == 0:
        texts = ["{prompt}{completion}\n── reward {reward:.2f}, gold {gold}\n".format(**one) for one in samples]
        (run.folder / f"transcripts-{step:06d}.txt").write_text("\n".join(texts), encoding="utf-8")
        run.bar.write(texts[0])
    return means.over_processes(player.sampler.device), samples


# ------------------------------------------------------------------------------------------------ the mathematics


def group_advantages(rewards: torch.Tensor, kind: str) -> torch.Tensor:
    """How much better each completion is than its siblings. rewards [P, G] of P prompts; returns [P, G]."""
    advantages = rewards - rewards.mean(1, keepdim=True)
    if kind == "grpo":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    elif kind == "rloo":
        advantages = advantages * rewards.shape[1] / (rewards.shape[1] - 1)
    all_equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return advantages.masked_fill(all_equal, 0.0)  # detail 1


def clipped_loss(logprobs, old_logprobs, advantages, mask, clip_low: float, clip_high: float):
    """Losses and ratios of actions [B, A]. All but the bounds are [B, A]."""
    ratio = ((logprobs - old_logprobs) * mask).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio.detach()  # detail 6


def aggregate(losses, mask, how: str, sequences: int, tokens: float, max_tokens: int) -> torch.Tensor:
    """One number from token losses [B, T]; `sequences` and `tokens` count the whole optimizer step."""  # detail 7
    if how == "sequence":
        return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences
    return (losses * mask).sum() / (tokens if how == "token" else sequences * max_tokens)


def assign_credit(rewards: torch.Tensor, credit: str, kind: str) -> torch.Tensor:
    """Advantages [P, G, K] of K turns from their rewards [P, G, K], NaN where there is no such turn. A turn is credited
    with its trajectory's total, or with what it and later turns earned, against its siblings' turns k."""
    if credit == "trajectory":
        return group_advantages(rewards.nansum(-1), kind)[..., None].expand_as(rewards)
    returns, advantages = rewards.nan_to_num().flip(-1).cumsum(-1).flip(-1), torch.zeros_like(rewards)
    for p, k in ((~rewards.isnan()).sum(1) > 1).nonzero().tolist():
        members = ~rewards[p, :, k].isnan()
        advantages[p, members, k] = group_advantages(returns[p, members, k][None], kind)[0]
    return advantages


# ------------------------------------------------------------------------------------------------ main


def main(args: Args, environment: type[Environment] | None = None) -> dict:
    device, rank, world = start_processes(args.device)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    assert args.batch_size % (args.minibatches * world) == 0, "--batch-size: a multiple of minibatches × processes"
    assert args.num_samples > 1, "--num-samples: a trajectory is compared with its siblings, so at least 2"

    tokenizer, budget = load_tokenizer(args.model, args.today), args.max_trajectory_tokens
    dialogue, tools = Dialogue(tokenizer, args.max_observation_tokens), Tools(args)
    environment = environment or {"questions": ToolQuestions, "code": CodeTasks}[args.environment]
    begin = partial(environment, [getattr(tools, name) for name in args.tools], args, tools.python)
    longest = min(args.max_prompt_tokens, context_length(args.model) - budget)
    key = repr(args) + Path(sys.modules[environment.__module__].__file__).read_text()  # of the cached tasks
    encode = partial(encode_task, dialogue, begin, max_tokens=longest, cache_key=key)
    encode = partial(encode_rows, tokenizer, encode=encode, columns={"bare_ids": "ints", "row": "string"})
    tasks, held_out = load_split(encode, args.dataset, args.eval_dataset, args.eval_rows, args.seed)
    policy = load_model(args.model, device, world, args.gradient_checkpointing, args.lora_rank, bfloat16)
    reference = frozen(policy, device, world) if args.beta else None
    stops = stop_token_ids(tokenizer, policy)
    sampler = Sampler(policy, stops, torch.bfloat16 if bfloat16 else torch.float32, args.sampler_memory_gb)
    player = Player(sampler, dialogue, begin, args)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)

    shown = {"reward/mean": "reward", "agent/calls": "calls", "agent/error_rate": "errors"}
    run = Run(args, rank, {**shown, "eval/accuracy": "accuracy", "eval/accuracy_without_tools": "without tools"})
    evaluate = partial(evaluate_agent, player, held_out, run, rank, world)
    finished = run.load(policy, optimizer) if args.resume else 0  # steps
    if not finished:
        run.log(0, *evaluate(0))

    for step in range(finished + 1, args.steps + 1):
        began, means, seed = time.perf_counter(), Means(), args.seed * 1_000_003 + step

        # Play G trajectories of each of this process's tasks.
        sampler.sync()
        batch = shuffled_pass(tasks, step, args.batch_size, args.seed)
        places = list(range(rank, args.batch_size, world))  # of this process's tasks in the batch
        groups = player.play([batch[p] for p in places], places, args.num_samples, args.temperature, seed)
        sampled = time.perf_counter()

        # Score them, and compare each with its siblings.
        rewards = torch.full((len(groups), args.num_samples, args.max_turns), math.nan)  # [P, G, K] of K turns
        trajectories = [t for group in groups for t in group]
        for t, row in zip(trajectories, rewards.flatten(0, 1)):
            row[: len(t.turns)] = torch.tensor([t.environment.turn_reward(calls) for calls in t.turns])
            row[len(t.turns) - 1] += t.reward
        credit = assign_credit(rewards, args.credit, args.advantage).flatten(0, 1)  # [B, K]

        # The rollout as rows: B = tasks × G trajectories, each with its prompt. Columns are actions alone, at most A.
        prompts, ids = zip(*[(t.ids[: t.prompt_length], t.ids[t.prompt_length :]) for t in trajectories])
        masks = [t.action_mask[t.prompt_length :] for t in trajectories]
        sampler_logprobs = pad_rows([torch.tensor(t.logprobs)[t.action_mask] for t in trajectories]).to(device)
        lengths = [torch.tensor(t.lengths) for t in trajectories]
        mask = pad_rows([torch.ones(n.sum()) for n in lengths]).to(device)  # [B, A]
        advantages = pad_rows([row[: len(n)].repeat_interleave(n) for row, n in zip(credit, lengths)]).to(device)
        split = partial(microbatches, ids, prompts, args.microbatch_tokens)

        # Every epoch deals the tasks of the whole batch into minibatches; these are this process's rows of each.
        minibatches = []
        for epoch in range(args.update_epochs):
            order = torch.randperm(args.batch_size, generator=torch.Generator().manual_seed(seed + epoch))
            for chosen in order.view(args.minibatches, -1).tolist():
                minibatches.append([i for i in range(len(ids)) if places[i // args.num_samples] in chosen])

        rollout = {"prompts": prompts, "completions": ids, "temperature": args.temperature, "bfloat16": bfloat16}
        logprobs_of = partial(completion_logprobs, **rollout, masks=masks)  # and entropies [b, A], detail 3
        ref_logprobs, old_logprobs = torch.zeros_like(mask), torch.zeros_like(mask)
        with torch.no_grad():
            for update, rows in enumerate(minibatches[: args.minibatches]):  # the first epoch's: every row once
                for part, _ in split(rows):
                    if reference is not None:
                        ref_logprobs[part] = logprobs_of(reference, part)[0]
                    if update:  # the first update runs at π_old itself, and stores what it finds
                        old_logprobs[part] = logprobs_of(policy, part)[0]

        # Update.
        rate, clip = learning_rate(step, args), (args.clip_low, args.clip_high)
        for update, rows in enumerate(minibatches):
            tokens, sequences = total(mask[rows].sum(), device), args.batch_size // args.minibatches * args.num_samples
            for part, weight in split(rows):  # weight: 0 for a copy that only keeps step with other processes, else 1
                logprobs, entropy = logprobs_of(policy, part)  # [b, A]
                if not update:
                    old_logprobs[part] = logprobs.detach()
                old, acted = old_logprobs[part], mask[part] * weight  # detail 5
                gap = old - sampler_logprobs[part]
                losses, ratio = clipped_loss(logprobs, old, advantages[part], acted, *clip)
                if args.importance_cap:
                    losses = losses * gap.exp().clamp(max=args.importance_cap)
                means.add("loss/policy", losses, acted)
                if reference is not None:
                    kl = kl_estimate(logprobs, ref_logprobs[part], args.kl_estimator)
                    losses = losses + args.beta * kl
                    means.add("policy/kl", kl, acted)
                loss = aggregate(losses, acted, args.aggregation, sequences, tokens, budget)
                (loss * world).backward()  # gradients are averaged over processes, the loss is a sum over them
                means.add("policy/entropy", entropy, acted)
                means.add("policy/sampler_gap", gap.abs(), acted)
                means.add("policy/clip_fraction", (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high), acted)
            optimizer.param_groups[0] |= {"lr": rate, "weight_decay": args.weight_decay}
            means.add("optim/grad_norm", clip_gradients(policy, args.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()

        # Log, evaluate, save.
        done, earned = time.perf_counter(), rewards.nansum(-1)
        errors = [call.error for t in trajectories for calls in t.turns for call in calls]
        means.add("reward/mean", earned)
        means.add("groups/all_equal", (earned == earned[:, :1]).all(1))
        means.add("agent/calls", [sum(map(len, t.turns)) for t in trajectories])
        means.add("agent/cut", [t.answer is None for t in trajectories])
        means.add("agent/error_rate", [error is not None for error in errors])
        for kind in ("unreadable", "refused", "failed", "timed_out"):
            means.add(f"agent/{kind}", [error == kind for error in errors])
        metrics, samples = means.over_processes(device), []
        metrics |= {"optim/learning_rate": rate, "time/sample": sampled - began, "time/train": done - sampled}
        if due(step, args.eval_every, args.steps):
            scores, samples = evaluate(step)
            metrics |= scores
        run.log(step, metrics, samples)
        if due(step, args.save_every, args.steps):
            run.save(step, policy, optimizer)

    return run.finish(policy, tokenizer, stops, bfloat16)


# ================================================================ plumbing: the same in every script, not the algorithm


def start_processes(device: str) -> tuple[torch.device, int, int]:
    """The device of this process, its rank and the number of processes: more than one under torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if chosen.type == "cuda" and world > 1:
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # from saving in a single process
    if world > 1:  # all wait for the one that samples longest: ten minutes would be too few
        dist.init_process_group(timeout=timedelta(days=1))
    return chosen, rank, world


def total(value, device) -> float:
    """A number summed over all processes."""
    value = torch.as_tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item()


class Means:
    """Weighted means by name over microbatches and processes. Sums stay on the device until `over_processes`."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values, weights=1.0) -> None:
        values = torch.as_tensor(values).detach().double()
        weights = torch.ones_like(values) * weights
        pair = torch.stack([(values * weights).sum(), weights.sum()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def over_processes(self, device) -> dict[str, float]:
        sums = torch.stack([pair.to(device) for pair in self.sums.values()])
        if dist.is_initialized():
            dist.all_reduce(sums)
        return {name: value / max(weight, 1e-9) for name, (value, weight) in zip(self.sums, sums.tolist())}


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then constant, or a linear or cosine decay that reaches zero after the last step."""
    left = min(1.0, (args.steps - step + 1) / max(1, args.steps - args.warmup_steps))
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return args.learning_rate * min(1.0, step / max(1, args.warmup_steps)) * shape[args.lr_schedule]


def due(step: int, every: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


class Run:
    """The folder of a run: args.json, metrics.jsonl, samples.jsonl, tensorboard/, curves.png, checkpoints/, model/."""

    def __init__(self, args, rank: int, shown: dict[str, str]):
        self.rank, self.shown, self.history = rank, shown, []  # shown: metric → title, in the terminal and curves.png
        stamp = [f"{datetime.now():%Y-%m-%d_%H%M%S_%f}"]
        if dist.is_initialized():
            dist.broadcast_object_list(stamp)
        self.folder = Path(args.resume or args.output_dir or f"runs/{Path(__file__).stem}/{stamp[0]}")
        gc.freeze()  # what is loaded by now lives to the end: no collection need look through it again
        if rank:
            return
        if (self.folder / "args.json").exists() and not args.resume:
            sys.exit(f"{self.folder} already holds a run: continue it with --resume, or choose another --output-dir.")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "args.json").write_text(json.dumps(asdict(args), indent=2))
        if not args.resume and not args.output_dir:
            link = self.folder.with_name(f".latest-{os.getpid()}")
            link.symlink_to(self.folder.name)
            link.replace(link.with_name("latest"))
        if args.wandb_project:
            import wandb

            wandb.init(project=args.wandb_project, config=asdict(args), sync_tensorboard=True)
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.folder / "tensorboard")
        self.bar = tqdm(total=args.steps, unit="step", disable=None, leave=False)
        self.bar.write("  step " + "".join(f"{title:>14}" for title in shown.values()))

    def log(self, step: int, metrics: dict, samples: list[dict] = ()) -> None:
        """Write to the log files, each tenth step and evaluation to the terminal too; evaluations redraw curves.png."""
        self.history.append({"step": step, **metrics})
        if self.rank:
            return
        for name, rows in (("metrics", [metrics]), ("samples", samples)):
            with open(self.folder / f"{name}.jsonl", "a") as file:
                file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.bar.update(step - self.bar.n)
        is_evaluated = any(name.startswith("eval/") for name in metrics)
        if step % 10 == 0 or is_evaluated:
            cells = [f"{metrics[name]:14.4g}" if name in metrics else " " * 14 for name in self.shown]
            self.bar.write(f"{step:6d} " + "".join(cells))
        for sample in samples[:: max(1, len(samples) // 3)][:3]:
            asked, said = sample["prompt"][-60:], sample["completion"][:160]
            self.bar.write(f"        reward {sample['reward']:.2f}  {asked!r} → {said!r}")
        if step and is_evaluated:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(3.6 * len(self.shown), 2.8), layout="tight")
            for axis, (name, title) in zip(figure.subplots(1, len(self.shown)), self.shown.items()):
                points = [(row["step"], row[name]) for row in self.history if name in row] or [(0, 0)]
                axis.plot(*zip(*points), marker=".")
                axis.set(title=title, xlabel="step")
            figure.savefig(self.folder / "curves.png", dpi=110)

    def save(self, step: int, model, optimizer) -> None:
        """Write a checkpoint under another name, then rename it: a kill leaves none broken. The newest two are kept."""
        from torch.distributed.checkpoint import save, state_dict

        final = self.folder / "checkpoints" / f"step-{step:06d}"
        own = state_dict.StateDictOptions(ignore_frozen_params=True)
        weights, moments = state_dict.get_state_dict(model, optimizer, options=own)
        part = final.with_suffix(".writing")
        save({"model": weights, "optimizer": moments}, checkpoint_id=part)
        if self.rank == 0:
            part.rename(final)
            for old in sorted(final.parent.glob("step-??????"))[:-2]:
                shutil.rmtree(old)

    def load(self, model, optimizer) -> int:
        """Restore the newest checkpoint, drop what was logged after it, and return its step, or 0 if there is none."""
        from torch.distributed.checkpoint import DefaultLoadPlanner, load, state_dict

        newest = max((self.folder / "checkpoints").glob("step-??????"), default=None)
        step = int(newest.name.removeprefix("step-")) if newest else -1
        for path in filter(Path.exists, map(self.folder.joinpath, ("metrics.jsonl", "samples.jsonl"))):
            rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]  # a kill may truncate the last one
            rows = [row for row in rows if row["step"] <= step]
            self.history = rows if path.name == "metrics.jsonl" else self.history
            if self.rank == 0:
                path.with_suffix(".writing").write_text("".join(json.dumps(row) + "\n" for row in rows))
                path.with_suffix(".writing").replace(path)
        if newest:
            own = state_dict.StateDictOptions(ignore_frozen_params=True, strict=False)
            weights, moments = state_dict.get_state_dict(model, optimizer, options=own)
            planner = DefaultLoadPlanner(allow_partial_load=True)  # unused weights have no moments
            load({"model": weights, "optimizer": moments}, checkpoint_id=newest, planner=planner)
            state_dict.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=own)
        return max(step, 0)

    def finish(self, model, tokenizer, stops: list[int], bfloat16: bool) -> dict:
        """Save model/ for from_pretrained, vLLM and the next stage, with its stop tokens; return the last metrics."""
        from common.kl import save_model

        last = {name: value for row in self.history for name, value in row.items()}
        part = self.folder / "model.writing"
        if stops:
            model.generation_config.eos_token_id = stops
        save_model(model, part, bfloat16, self.folder / "adapter")
        if self.rank == 0:
            tokenizer.save_pretrained(part)
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            part.rename(self.folder / "model")
            self.bar.close()
            self.writer.close()
            for name in [name for name in self.history[0] if name.startswith("eval/")]:
                print(f"  {name:26} {self.history[0][name]:8.4g} → {last[name]:.4g}")
            print(f"  model in {self.folder}/model, curves in {self.folder}/curves.png")
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        return last


def parse_args(args_type, embedded):
    """Read the flags. Defaults: `args_type`'s with --model, `embedded` without, a resumed run's own with --resume."""
    flags = [part for flag in sys.argv[1:] for part in (flag.split("=", 1) if flag[:2] == "--" else [flag])]
    given = {flag.replace("_", "-"): value for flag, value in zip(flags, flags[1:])}
    default = args_type() if "--model" in given else embedded
    if "--dataset" in given:
        default = replace(default, eval_dataset=None)
    if given.get("--lora-rank", "0") != "0":  # adapters want a higher rate (https://thinkingmachines.ai/blog/lora)
        default = replace(default, learning_rate=10 * default.learning_rate)
    if "--resume" in given:
        default = args_type(**json.loads(Path(given["--resume"], "args.json").read_text()))
    return tyro.cli(args_type, default=default, args=flags, description=__doc__)


if __name__ == "__main__":
    main(parse_args(Args, EMBEDDED))
