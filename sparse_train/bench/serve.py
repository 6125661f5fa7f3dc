"""Throughput of vLLM's server with dense and sparse folders, for several requests at a time."""

import contextlib
import functools
import json
import logging
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sparse_train.bench.timing import Timing, interleave
from sparse_train.cpus import available_cpus
from sparse_train.errors import UserError, printable
from sparse_train.models import is_folder, read_config

log = logging.getLogger(__name__)

_START_SECONDS = 1800
_ANSWER_SECONDS = 3600
_END_SECONDS = 30


class Server:
    """vLLM's OpenAI-compatible server of a folder, stopped except in its turns: a waiting server may spin."""

    def __init__(self, python: Path, folder: str, work: Path, positions: int, dtype: str, eager: bool):
        self.folder, self._work, self._python = folder, work, python
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self._address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(available_cpus()),
                     "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        model = Path(folder).resolve() if is_folder(folder) else folder
        with (work / "log").open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                # The command vllm of vllm-cpu 0.32 looks for a package called vllm.
                [python.absolute(), "-m", "vllm.entrypoints.openai.api_server", "--model", model,
                 "--served-model-name", "model", "--port", self._address.rpartition(":")[2], "--dtype", dtype,
                 "--max-model-len", str(positions), "--no-enable-prefix-caching", *["--enforce-eager"] * eager],
                stdout=output, stderr=subprocess.STDOUT, cwd=work, env=os.environ | variables, start_new_session=True)

    def wait(self) -> None:
        """Until it answers. Raises UserError where it does not."""
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self._address}/health", timeout=10):
                return
            time.sleep(1)
        raise UserError(f"vLLM does not start with {self.folder}: {self._last_line()}; {self._python} "
                        "needs vllm and sparse-train, and vllm serve of this folder says more")

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            self.pause()

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def answer(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        """All at a time, greedily, to their full length. Raises UserError where it fails."""
        def complete(prompt: list[int]) -> int:
            body = {"model": "model", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
            request = urllib.request.Request(f"{self._address}/v1/completions", json.dumps(body).encode(),
                                             {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
                return int(json.load(answer)["usage"]["completion_tokens"])

        with self.turn(), ThreadPoolExecutor(len(prompts)) as pool:
            try:
                given = list(pool.map(complete, prompts))
            except (OSError, KeyError, ValueError) as error:
                raise UserError(f"vLLM with {self.folder} does not answer ({error}): {self._last_line()}") from error
        if given != [new_tokens] * len(prompts):
            raise UserError(f"vLLM with {self.folder} gave {given} tokens where {new_tokens} each were asked for")

    def close(self) -> None:
        for kind, seconds in ((signal.SIGCONT, 0), (signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):  # vLLM deletes its shared memory
                self._process.wait(seconds)

    def _last_line(self) -> str:
        lines = (self._work / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return printable(lines[-1].strip()) if lines else "it printed nothing"


def serve_rows(python: Path, folders: Sequence[str], concurrent: Sequence[int], prompt_tokens: int, new_tokens: int,
               repeats: int, dtype: str = "auto", eager: bool = False) -> list[dict[str, Any]]:
    """A row per folder and number of requests at a time: `tokens_per_second` of new tokens, prompts included in the
    time, and `speedup`, the median ratio to the first folder of the same round, with quartiles. `gains`: its lower
    quartile is above 1.

    `eager`: without torch.compile. `python`: of an environment with vLLM and this package. Raises UserError where a
    server does not start or answer.
    """
    if not python.is_file():
        raise UserError(f"{python} is not there; run make serve, or give the --python of an environment with vllm and "
                        "sparse-train")
    tokens = min(read_config(folder).get_text_config(decoder=True).vocab_size for folder in folders)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(tokens, (max(concurrent), prompt_tokens), generator=generator).tolist()
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = []
        for number, folder in enumerate(folders):  # one after the other: they compile as they start
            log.info("starting vLLM with %s", folder)
            (work / str(number)).mkdir()
            servers.append(Server(python, folder, work / str(number), prompt_tokens + new_tokens, dtype,
                                  eager))
            stack.callback(servers[-1].close)
            servers[-1].wait()
            servers[-1].pause()
        log.info("measuring")
        timings = interleave({(number, together): functools.partial(server.answer, prompts[:together], new_tokens)
                              for together in concurrent for number, server in enumerate(servers)}, repeats)
    return [_row(folder, together, new_tokens, timings[number, together], timings[0, together])
            for together in concurrent for number, folder in enumerate(folders)]


def _row(folder: str, together: int, new_tokens: int, seconds: Timing, dense: Timing) -> dict[str, Any]:
    rate, ratio = together * new_tokens, dense.over(seconds)
    return {"model": folder, "concurrent": together, "tokens_per_second": rate / seconds.median,
            "low": rate / seconds.high, "high": rate / seconds.low, "speedup": ratio.median,
            "speedup_low": ratio.low, "speedup_high": ratio.high, "gains": ratio.low > 1}
