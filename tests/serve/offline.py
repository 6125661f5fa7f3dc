"""Runs in the environment of vLLM: greedy answers of models, one after the other.

    argument 1   [{"model": FOLDER, "prompts": [[ids], ...], "new_tokens": N, "options": {those of vllm.LLM}}, ...]
    argument 2   the file for [{"tokens": [[ids], ...]} or {"error": message}, ...]
"""

import gc
import json
import sys

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
        found = model.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], greedy, use_tqdm=False)
        answers.append({"tokens": [list(answer.outputs[0].token_ids) for answer in found]})
        del model
        gc.collect()
    with open(out, "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":  # vLLM's processes import this file
    main()
