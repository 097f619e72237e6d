"""How far the verifier of rlvr_math.py agrees with recorded judgements: `python tests/grade_solutions.py FILE`.

FILE is example_model_solutions.jsonl of github.com/openai/grade-school-math: for each question of GSM8K the solutions
of four models, each with whether it is correct.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlvr_math import grade  # noqa: E402

rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
agree = [grade(judged["solution"], row["ground_truth"].rpartition("\nA: ")[2]).correct == judged["is_correct"]
         for row in rows for judged in row.values() if isinstance(judged, dict)]  # fmt: skip
print(f"{sum(agree)} of {len(agree)} judgements agree")
