"""agentic.py --environment code: rows of MBPP and HumanEval as they come, judged by tests that the model never sees."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import metrics, run

import agentic

MBPP = {"task_id": 2, "text": "Write a function to find the shared elements of two lists.", "test_setup_code": "",
        "code": "def similar_elements(a, b):\r\n  return tuple(set(a) & set(b))", "challenge_test_list": [],
        "test_list": ["assert set(similar_elements((3, 4), (5, 4))) == set((4,))"]}  # fmt: skip
SANITIZED = {"prompt": "Write a python function to find the area of a circle.", "test_imports": ["import math"],
             "test_list": ["assert math.isclose(abs(circle_area(1)), math.pi, rel_tol=0.001)"]}  # fmt: skip
HUMANEVAL = {"task_id": "HumanEval/0", "entry_point": "has_close", "canonical_solution": "    return False\n",
             "prompt": 'from typing import List\n\ndef has_close(numbers: List[float]) -> bool:\n    """Equal?"""\n',
             "test": "\ndef check(candidate):\n    assert candidate([1, 1]) and not candidate([1])\n"}  # fmt: skip
RIGHT = [
    (MBPP, "def similar_elements(a, b):\n    return [x for x in a if x in b]"),
    (SANITIZED, "def circle_area(r):\n    return 3.1416 * r * r"),
    (HUMANEVAL, "def has_close(numbers: List[float]) -> bool:\n    return len(set(numbers)) < len(numbers)"),
]


@pytest.fixture(scope="module")
def rewarded():
    if not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    args = replace(agentic.EMBEDDED, environment="code", tools=(), tool_seconds=1.0)
    environment = agentic.CodeTasks([], args, agentic.Tools(args).python)

    def rewarded(row: dict, answer: str | None) -> tuple[str, float]:
        (asked,) = environment.reset(row)
        return asked["content"], environment.reward(SimpleNamespace(answer=answer))

    return rewarded


@pytest.mark.parametrize("row,program", RIGHT)
def test_a_right_program_earns_the_reward_and_no_test_is_shown(row, program, rewarded):
    name = program.split("(")[0].removeprefix("def ")
    for answer in (program, f"Here it is:\n```python\n{program}\n```\nFor example:\n```\nprint({name})\n```"):
        asked, reward = rewarded(row, answer)
        assert reward == 1 and f"`{name}`" in asked and "assert" not in asked
    for wrong in (None, "I do not know.", program.replace("return", "return not"), f"```python\n{program}:\n```"):
        assert rewarded(row, wrong)[1] == 0


@pytest.mark.parametrize("cheat", ["import os\nos._exit(0)", "raise SystemExit", "print('passed')\nexit(0)",
                                   "while True: pass"])  # fmt: skip
def test_a_program_that_ends_before_its_tests_earns_nothing(cheat, rewarded):
    assert rewarded(MBPP, f"```python\ndef similar_elements(a, b):\n    pass\n{cheat}\n```")[1] == 0


def test_a_run_on_code(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (MBPP, SANITIZED, HUMANEVAL, {"text": "no tests"})))
    flags = ["--environment", "code", "--dataset", rows, "--eval-dataset", rows, "--tools", "python", "--steps", 1]
    flags += ["--batch-size", 2, "--num-samples", 2, "--max-completion-tokens", 16, "--max-prompt-tokens", 400]
    output = run("agentic", *flags, "--output-dir", tmp_path / "run")
    assert (
        "1 of 4 rows dropped: needs the columns test_list or test; found text" in output
        and metrics(tmp_path / "run")[-1]["reward/mean"] == 0
    )
    assert "assert" not in (tmp_path / "run" / "samples.jsonl").read_text()
