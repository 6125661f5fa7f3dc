"""An engine in a process of its own, which waits between its turns."""

import contextlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from sparse_train.errors import UserError

_CAUSE, _LAST = re.compile(r".*(error|assert|abort|exception).*", re.IGNORECASE), re.compile(r".+\Z")
_WORKER = Path(__file__).with_name("worker.py")


class Engine:
    """A model that worker.py decodes. `num_bytes`: of the weights that a token reads; `what`: decode, another name
    where it does less than that."""

    def __init__(self, python: Path, name: str, model: Path, num_bytes: int, threads: int, capacity: int,
                 what: str = "decode"):
        """Wait until the model is loaded. Raises UserError where it cannot be."""
        self.num_bytes, self.what, self._name, self._log = num_bytes, what, name, model.with_suffix(f".{threads}.log")
        spec = {"engine": name, "model": str(model), "threads": threads, "capacity": capacity}
        with self._log.open("w", encoding="utf-8") as log:  # -P: the modules beside worker.py are not the engines
            self._process = subprocess.Popen(
                [python, "-P", _WORKER, json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        self._reply({})

    def decode(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        """Seconds until the first new token, and from there to the last."""
        reply = self._ask(prompt, new_tokens, {"tokens": list, "first_seconds": float, "later_seconds": float})
        if len(reply["tokens"]) != new_tokens:
            raise UserError(f"{self._name} gave {len(reply['tokens'])} tokens where {new_tokens} were asked for")
        return reply["first_seconds"], reply["later_seconds"]

    def logits(self, prompt: list[int]) -> torch.Tensor:
        """(V,) behind `prompt`."""
        return torch.tensor(self._ask(prompt, 0, {"logits": list})["logits"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, prompt: list[int], new_tokens: int, fields: dict[str, type]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # of a process that has ended, which the reply tells
            print(json.dumps({"prompt": prompt, "new_tokens": new_tokens}), file=self._process.stdin, flush=True)
        return self._reply(fields)

    def _reply(self, fields: dict[str, type]) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code, said = self._process.wait(), self._log.read_text(encoding="utf-8", errors="replace").strip()
            cause = _CAUSE.search(said) or _LAST.search(said)
            raise UserError(f"{self._name} ended with exit code {code}: {cause[0] if cause else 'it printed nothing'}; "
                            "leave it out of --peers")
        return parse_reply(self._name, line, fields)


def parse_reply(name: str, line: str, fields: dict[str, type]) -> dict[str, Any]:
    """A line of worker.py. Raises UserError for one without `fields` of these types."""
    try:
        reply = json.loads(line)
    except ValueError:
        reply = None
    if not isinstance(reply, dict) or any(not isinstance(reply.get(key), kind) for key, kind in fields.items()):
        raise UserError(f"{name} answered {line.strip()[:80]!r}, which is not {', '.join(fields)}; leave it out of "
                        "--peers")
    return reply
