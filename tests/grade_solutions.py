"""How far the verifier of rlvr_math.py agrees with recorded judgements: `python tests/grade_solutions.py FILE`.

FILE is example_model_solutions.jsonl of github.com/openai/grade-school-math: for each question of GSM8K the solutions
of four models, each with whether it is correct.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlvr_math import WORKERS, grade  # noqa: E402


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    kinds = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    golds = [row["ground_truth"].rpartition("\nA: ")[2] for row in rows for _ in kinds]
    solutions = [row[kind] for row in rows for kind in kinds]
    began = time.process_time()
    grades = list(WORKERS.map(grade, [s["solution"] for s in solutions], golds))
    rate = len(grades) / (time.process_time() - began)
    agreed = sum(g.correct == s["is_correct"] for g, s in zip(grades, solutions))
    right = sum(s["is_correct"] for s in solutions)
    print(f"{agreed} of {len(grades)} judgements agree ({right} right), {rate:,.0f} gradings a second")


if __name__ == "__main__":
    main()
