"""Two steps of sft.py and grpo.py for every real tokenizer: `python tests/families.py FOLDER`.

FOLDER holds a folder with tokenizer.json and tokenizer_config.json for each family. A tiny random model of its
architecture (by the folder's name, else Llama) is made for it, with its whole vocabulary.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}  # fmt: skip
KINDS = {"qwen3": ("Qwen3Config", "Qwen3ForCausalLM"), "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}
SHORT = ["--steps", "2", "--batch-size", "4", "--eval-rows", "2", "--eval-samples", "1", "--warmup-steps", "1"]
FLAGS = {
    "sft": ["--max-length", "96"],
    "grpo": ["--num-samples", "2", "--max-completion-tokens", "12", "--max-prompt-tokens", "128"],
}


def main(folder: Path) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    failures = 0
    for place in sorted(path for path in folder.iterdir() if (path / "tokenizer.json").exists()):
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            config, model = KINDS.get(place.name, ("LlamaConfig", "LlamaForCausalLM"))
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
            torch.manual_seed(0)
            config = getattr(transformers, config)(vocab_size=len(tokenizer), **SIZES, **ids)
            getattr(transformers, model)(config).save_pretrained(f"{scratch}/model")
            tokenizer.save_pretrained(f"{scratch}/model")
            rows = [{"question": f"What is {n}+1?\n\nThink  first.", "answer": f"It is {n + 1}."} for n in range(40)]
            Path(scratch, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            for script, flags in FLAGS.items():
                command = [sys.executable, f"{script}.py", "--model", f"{scratch}/model", *SHORT, *flags]
                command += ["--dataset", f"{scratch}/rows.jsonl", "--output-dir", f"{scratch}/{script}"]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                told = "failed: " + done.stderr[-1500:]
                if not done.returncode:
                    rows = [json.loads(line) for line in open(f"{scratch}/{script}/metrics.jsonl")]
                    told = ", ".join(
                        f"{name} {rows[-1][name]:.3g}" for name in rows[-1] if name.split("/")[0] != "time"
                    )
                failures += done.returncode != 0
                print(f"{place.name}, {script}.py: {told}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
