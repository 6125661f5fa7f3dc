"""What each pruning method leaves of a pretrained model, in one shot: the table of docs/benchmarks.md.

    python -m tests.pruning_scores GSM8K TEXT [ROWS]
        GSM8K   a folder with train.jsonl and test.jsonl
        TEXT    a file or folder of general text, such as books
        ROWS    a JSON Lines file; rows that are in it are not measured again, and new ones are added

SmolLM2-135M-Instruct must have been fetched (python -m tests.weights smollm2-135m). The methods see questions and
answers of GSM8K. Perplexity, and KL from the dense model, are those of unseen answers of GSM8K and of TEXT, in BF16.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_train.config import EvaluateConfig, PruneConfig, TaskConfig
from sparse_train.models import as_folder, load_model, load_processor
from sparse_train.pruning import calibration_batches, prune
from sparse_train.tasks.general_text import GeneralText
from tests.layer_errors import LADDER, PATTERNS
from tests.weights import needs_weights

LEVELS = {**PATTERNS, "80%": {"sparsity": 0.8}, "60%": {"sparsity": 0.6}, "75%": {"sparsity": 0.75},
          "4:8": {"pattern": "4:8"}}
BESIDES = {"sparsegpt, owl": {"allocation": "owl"}, "sparsegpt, atp": {"allocation": "atp"},
           "sparsegpt, reconstruction": {"reconstruction": {"steps": 50}}, "obert": {"method": "obert"}}
"""What goes with any method, tried with one, and oBERT, which no layer's error concerns; at 70%."""
_NUM_EXAMPLES, _BATCH_SIZE, _MAX_LENGTH = 32, 8, 256
_SPEC = EvaluateConfig(num_texts=60, batch_size=20)


def _cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for level, pattern in LEVELS.items():
        for method, keys in LADDER.items():
            yield level, method, keys | pattern
    for method, keys in BESIDES.items():
        yield "70%", method, keys | LEVELS["70%"]


def _rows(gsm8k: str, text: str, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    folder = as_folder(str(needs_weights("smollm2-135m")))
    processor, task = load_processor(folder), TaskConfig(name="gsm8k", path=gsm8k, max_length=_MAX_LENGTH)
    texts = {"gsm8k": GeneralText(task, processor, _SPEC),
             "text": GeneralText(TaskConfig(name="text", path=text, max_length=_MAX_LENGTH), processor, _SPEC)}

    def scores(model) -> dict[str, float]:
        found = {name: each.score(model.bfloat16().eval()) for name, each in texts.items()}
        return {f"{name} {metric}": score[metric] for name, score in found.items() for metric in ("perplexity", "kl")}

    yield {"zeros": "0%", "method": "dense", "seconds": 0.0, **scores(load_model(folder))}
    for level, method, keys in _cases():
        if (level, method) not in done:
            spec = PruneConfig(**keys, num_calibration=_NUM_EXAMPLES, batch_size=_BATCH_SIZE)
            model, start = load_model(folder), time.process_time()
            prune(model, calibration_batches(spec, task, processor), spec)
            yield {"zeros": level, "method": method, "seconds": time.process_time() - start, **scores(model)}


def _line(row: dict[str, Any]) -> str:
    return (f"{row['zeros']:5}  {row['method']:25} {row['gsm8k perplexity']:10.3f} {row['gsm8k kl']:6.3f} "
            f"{row['text perplexity']:10.1f} {row['text kl']:6.3f} {row['seconds']:6.0f}")


def _main(gsm8k: str, text: str, path: str | None = None) -> None:
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path and Path(path).exists() else []
    known = [json.loads(line) for line in lines]
    print(f"{'zeros':5}  {'method':25} {'GSM8K: ppl':>10} {'KL':>6} {'text: ppl':>10} {'KL':>6} {'CPU s':>6}")
    for row in known:
        print(_line(row))
    for row in _rows(gsm8k, text, {(row["zeros"], row["method"]) for row in known}):
        if row["method"] == "dense" and known:
            continue
        print(_line(row), flush=True)
        if path:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m tests.pruning_scores GSM8K TEXT [ROWS]")
    _main(*sys.argv[1:])
