"""Run by a Python that has transformers 4: read_by_older.py ROOT writes ROOT/older.json, type -> what it makes of
ROOT/TYPE/dense. Of this project it imports nothing.

    same        the logits of ROOT/TYPE/answer.pt
    not known   there is no such type
    ...         how it differs, or the error
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    __version__,
    logging,
)


def answer(folder: Path) -> str:
    config = AutoConfig.from_pretrained(folder / "dense")
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto = AutoModelForSpeechSeq2Seq if config.model_type == "whisper" else auto
    model, report = auto.from_pretrained(folder / "dense", output_loading_info=True, attn_implementation="eager")
    if any(report.values()):
        return f"tensors: { {key: sorted(map(str, names))[:2] for key, names in report.items() if names} }"
    wanted = torch.load(folder / "answer.pt")
    with torch.no_grad():
        logits = model.eval()(**wanted["inputs"]).logits
    if logits.shape != wanted["logits"].shape:
        return f"logits of shape {tuple(logits.shape)}"
    distance = float((logits - wanted["logits"]).abs().max() / wanted["logits"].abs().max())
    return "same" if distance < 1e-3 else f"other logits, by {distance:.3f}"


if __name__ == "__main__":
    logging.set_verbosity_error()
    assert __version__.startswith("4."), __version__
    root, found = Path(sys.argv[1]), {}
    for folder in sorted(root.iterdir()):
        if not (folder / "answer.pt").exists():
            continue
        try:
            found[folder.name] = answer(folder)
        except Exception as error:
            known = "does not recognize this architecture" not in str(error)
            found[folder.name] = f"{type(error).__name__}: {str(error)[:200]}" if known else "not known"
    for file in root.glob("*/dense/tokenizer_config.json"):
        found["tokenizer"] = AutoTokenizer.from_pretrained(file.parent)("Tom has 3 eggs")["input_ids"]
    (root / "older.json").write_text(json.dumps(found, indent=1))
