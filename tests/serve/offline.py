"""Runs in the environment of vLLM: greedy answers of models, one after the other.

    argument 1   [{"model": FOLDER, "prompts": [[ids], ...], "new_tokens": N, "options": {those of vllm.LLM}}, ...],
                 with "sound" for Whisper: a .npy file of 16 kHz, which each prompt is about
    argument 2   the file for [{"tokens": [[ids], ...]} or {"error": message}, ...]
"""

import gc
import json
import sys
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams


def main() -> None:
    requests, out = json.loads(sys.argv[1]), sys.argv[2]
    answers = []
    for request in requests:
        try:
            model = LLM(request["model"], **{"dtype": "float32", "enforce_eager": True} | request.get("options", {}))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
            continue
        greedy = SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True)
        prompts: list[dict[str, Any]] = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        if "sound" in request:
            sound = {"multi_modal_data": {"audio": (np.load(request["sound"]), 16_000)}}
            prompts = [prompt | sound for prompt in prompts]
        found = model.generate(prompts, greedy, use_tqdm=False)
        answers.append({"tokens": [list(answer.outputs[0].token_ids) for answer in found]})
        del model
        gc.collect()
    with open(out, "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":  # vLLM's processes import this file
    main()
