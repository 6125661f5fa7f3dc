"""make gpu: all that needs a GPU, for whoever has one for an hour: the tests marked gpu, and every benchmark.

    build/gpu/results.json   what each part printed, written as soon as it is there
    build/gpu/results.md     one table of it, with the machine

The most important figures come first. A part that is there for this card, driver, code and these versions is not run
again, so after a cut the same command goes on; a part that failed is recorded with its error, and runs again. Results
of another card, code or version are renamed.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_train import artifacts

_FOLDER = Path("build/gpu")
_ERROR = re.compile(r"^(?:E  +\S|FAILED|ERROR|[\w.]*(?:Error|Exception|Failed)\b)", re.MULTILINE)
_NOT_RUN = "not yet run"


@dataclass(frozen=True)
class Figure:
    """A row of the table."""
    name: str
    read: Callable[[Any], str]
    """Of what the part printed."""
    aim: str = ""


@dataclass(frozen=True)
class Part:
    name: str
    command: tuple[str, ...]
    figures: tuple[Figure, ...]
    limit_s: int = 600
    is_json: bool = True
    """Whether it prints its result as a JSON object on one line. The result is the last line otherwise."""


def _figure_of_row(name: str, aim: str, key: str, form: str, **where: Any) -> Figure:
    def read(result: Any) -> str:
        return form.format(next(row[key] for row in result["rows"]
                                if all(row[other] == value for other, value in where.items())))

    return Figure(name, read, aim)


def _linears() -> Part:
    aims = {("bf16", 0.5): "1.5x", ("bf16", 0.6): "1.8x", ("bf16", 0.7): "2.4x", ("bf16", 0.8): "3.3x",
            ("int8", 0.75): "4x", ("int4", 0.5): "", ("int4", 0.75): ""}
    figures = [_figure_of_row(f"linears of {model}, batch 1, {precision}, {sparsity:.0%} zeros, over cuBLAS in BF16",
                              aim, "speedup", "{:.2f}x", what="linears", model=f"{model} block", precision=precision,
                              sparsity=_Near(sparsity), engine="sparse")
               for model in ("llama-8b", "mpt-7b") for (precision, sparsity), aim in aims.items()]
    figures += [_figure_of_row(f"linears of llama-8b, prompt of {num_rows} tokens, 2:4, {engine}, over cuBLAS", "",
                               "speedup", "{:.2f}x", what=f"{num_rows} rows", engine=engine)
                for num_rows in (128, 512) for engine in ("cusparselt", "sparse")]
    return Part("linears", _bench("layers", "--device", "cuda"), tuple(figures))


def _decode(shape: str) -> Part:
    figures = []
    for what in ("decode", "decode, batch 16"):
        for engine, precision, sparsity in (("torch", "bf16", 0), ("sparse", "bf16", 0.5), ("sparse", "bf16", 0.75),
                                            ("sparse", "int8", 0.75), ("sparse", "int4", 0.75)):
            where: dict[str, Any] = {"what": what, "engine": engine, "precision": precision,
                                     "sparsity": _Near(sparsity)}
            title = f"{shape}, {what}, {engine} {precision}, {sparsity:.0%} zeros"
            figures += [_figure_of_row(f"{title}: tokens/s", "", "tokens_per_second", "{:.1f}", **where),
                        _figure_of_row(f"{title}: bytes", "", "memory", "{:,}", **where)]
    return Part(f"decode {shape}", _bench("decode", "--device", "cuda", "--shape", shape, "--json"), tuple(figures))


class _Near(float):
    """Equal to what differs by less than a hundredth, as the zeros of random bits do."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float | int) and abs(self - other) < 0.01

    __hash__ = float.__hash__


def _bench(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", "sparse_train.launch.cli", "bench", *arguments


def _tests(name: str, *arguments: str, limit_s: int = 600, before: tuple[str, ...] = ()) -> Part:
    return Part(name, (*before, sys.executable, "-m", "pytest", "-m", "gpu", *arguments),
                (Figure(name, lambda result: str(result).strip("= "), "all pass"),), limit_s, is_json=False)


PARTS = (
    _linears(),
    _tests("tests of the kernels", "tests/kernels"),
    _decode("llama-8b"),
    Part("moves", _bench("moves", "--device", "cuda"), tuple(
        _figure_of_row(f"{kernel}, {dtype}, {sparsity:.0%} zeros, over the bandwidth of a copy", "0.80",
                       "fraction_of_copy", "{:.2f}", kernel=kernel, dtype=dtype, sparsity=sparsity)
        for dtype in ("bfloat16", "float32") for kernel in ("expand", "compact") for sparsity in (0.5, 0.75, 0.9))),
    Part("training", _bench("train", "--device", "cuda", "--ranks", "1", "--d-model", "2048", "--n-layers", "24",
                            "--num-tokens", "2048", "--precision", "bf16", "--json"), (
        Figure("training step, 24 layers 2048 wide, 2048 tokens, 75% zeros, over the dense step",
               lambda result: f"{result['step_time']['ours']['median']:.2f}", "1.38"),
        Figure("the same: its state over the dense one's", lambda result: f"{result['state_bytes']['ours']:.2f}",
               "0.27"))),
    _decode("mpt-7b"),
    _tests("all other tests", "--ignore=tests/kernels", limit_s=1800),
    # In memory from CUDA itself, which has no room between tensors that a wrong access could hit unseen. No graph can
    # be captured then, and an assertion of the device counts as an error.
    *(_tests(f"{tool} over the kernels", "tests/kernels/test_triton.py", "tests/kernels/test_triton_steps.py", "-m",
             "gpu and not slow", "-k", "not graph and not assertion", limit_s=1200,
             before=("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool,
                     "--error-exitcode", "9"))
      for tool in ("memcheck", "racecheck")),
)


def run_parts(parts: Sequence[Part], machine: dict[str, str], folder: Path) -> bool:
    """Run what is not there yet, and return whether all is. `machine`: results of another one do not count, and are
    renamed to `results-DIGEST` of it."""
    folder.mkdir(parents=True, exist_ok=True)
    file, results = folder / "results.json", {"machine": machine, "parts": {}}
    if file.exists():
        earlier = artifacts.read_json(file)
        if earlier["machine"] == machine:
            results = earlier
        else:
            for old in folder.glob("results.*"):
                old.replace(folder / f"results-{artifacts.digest(earlier['machine'])[:12]}{old.suffix}")
    found = results["parts"]
    for part in parts:
        if found.get(part.name, {"error": ""})["error"] is None:
            continue
        print(f"{part.name}: {' '.join(part.command)}", flush=True)
        found[part.name] = _run(part)
        print(f"  {found[part.name]['error'] or 'done'}, {found[part.name]['seconds']:.0f} s", flush=True)
        artifacts.write_json(file, results)
        artifacts.write_text(folder / "results.md", table(parts, results))
    return all(found[part.name]["error"] is None for part in parts)


def _run(part: Part) -> dict[str, Any]:
    """{"error": None or one line, "seconds", "result": what it printed last}."""
    start, error, output = time.monotonic(), None, ""
    try:
        process = subprocess.Popen(part.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   encoding="utf-8", errors="replace", start_new_session=True)
        try:
            output, _ = process.communicate(timeout=part.limit_s)
        finally:  # with all that it started
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode:
            error = _error_line(output) or f"it ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        error = f"it took more than {part.limit_s} s"
    except OSError as failure:
        error = f"{part.command[0]}: {failure.strerror}"
    lines = output.strip().splitlines() or [""]
    result = next(filter(None, map(_json_object, reversed(lines))), None) if part.is_json else lines[-1]
    if result is None and error is None:
        error = "it printed no result"
    return {"error": error, "seconds": time.monotonic() - start, "result": result}


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        found = artifacts.parse_json(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _error_line(output: str) -> str:
    """The first that tells an error, else the last."""
    lines = output.strip().splitlines() or [""]
    return next((line for line in lines if _ERROR.match(line)), lines[-1]).strip()[:300]


def table(parts: Sequence[Part], results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"{name}: {value}  " for name, value in results["machine"].items()]
    lines += ["", "| what | figure | aim |", "|---|---|---|"]
    for part in parts:
        done = results["parts"].get(part.name)
        for figure in part.figures:
            cell = _NOT_RUN if done is None else f"failed: {done['error']}" if done["error"] else None
            if cell is None:
                try:
                    cell = figure.read(done["result"])
                except (KeyError, StopIteration, TypeError, ValueError):  # torch offers not all everywhere
                    cell = "not measured"
            lines.append("| " + " | ".join((figure.name, cell.replace("|", "/"), figure.aim)) + " |")
    return "\n".join(lines) + "\n"


def _smi(query: str, card: str) -> str:
    """What nvidia-smi tells of the card with this UUID."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id=GPU-{card}"],
                          capture_output=True, text=True, encoding="utf-8")
    return "unknown" if done.returncode else done.stdout.strip()


def describe_machine() -> dict[str, str]:
    """Card, driver, versions, and a digest of the code. Raises UserError without a GPU."""
    import torch

    from sparse_train.inference.gpu import find_gpu

    properties = torch.cuda.get_device_properties(find_gpu())
    import triton  # find_gpu tells in one line that it is missing

    card = str(properties.uuid)
    code = {str(path): artifacts.digest_file(path)["sha256"] for folder in ("sparse_train", "jobs", "launch", "tests")
            for path in sorted(Path(folder).rglob("*.py"))}
    return {"card": properties.name, "driver": _smi("driver_version", card),
            "highest clocks": _smi("clocks.max.sm,clocks.max.mem", card), "torch": torch.__version__,
            "cuda": str(torch.version.cuda), "triton": triton.__version__, "code": artifacts.digest(code)[:12]}


def main() -> int:
    from sparse_train.errors import UserError

    try:
        machine = describe_machine()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    is_complete = run_parts(PARTS, machine, _FOLDER)
    print((_FOLDER / "results.md").read_text(encoding="utf-8"))
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
