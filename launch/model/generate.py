"""sparse-train generate: complete prompts with a dense or sparse model folder, or answer them as turns of a chat."""

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sparse_train.artifacts import stage_of
from sparse_train.errors import UserError, printable

if TYPE_CHECKING:  # torch takes seconds to import
    from sparse_train.inference import Runtime
    from sparse_train.inference.streaming import Clock
    from sparse_train.tasks.conversation import Message

_LEAST_TEMPERATURE = 1e-6
"""Logits divided by less may be infinite."""


def add_generate(commands: "argparse._SubParsersAction[Any]") -> None:
    generate = commands.add_parser("generate", help="generate text with a dense or sparse model folder")
    generate.add_argument("folder", metavar="FOLDER", help="or a name on the hub")  # a Path would drop the "./"
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT")
    prompts.add_argument("--prompts", metavar="FILE",
                         help="a prompt per line, - for standard input; each answer is a line of JSON")
    generate.add_argument("--batch-size", type=int, metavar="N", default=1,
                          help="how many of FILE are answered at a time; default: 1")
    generate.add_argument("--max-new-tokens", type=int, metavar="N",
                          help="default: 128, or as many as the model has positions for")
    generate.add_argument("--kv-cache", choices=("fp32", "bf16"),
                          help="what is kept of the tokens before, on the CPU: bf16 makes long texts faster, and "
                               "rounds, so that answers may differ; default: fp32. On a GPU it is always bf16")
    generate.add_argument("--chat", action=argparse.BooleanOptionalAction,
                          help="put the prompt as a user's turn into the model's chat template; default: as the run "
                               "that made FOLDER was trained, elsewhere wherever there is a template")
    generate.add_argument("--temperature", type=float, metavar="T",
                          help="sample, from probabilities that it sharpens (below 1) or flattens; default: the most "
                               "likely token, or 1 with --top-k or --top-p")
    generate.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    generate.add_argument("--top-p", type=float, metavar="P",
                          help="sample from the most likely tokens that together have the probability P")
    generate.add_argument("--seed", type=int, metavar="N", default=0, help="of the samples; default: 0")
    generate.add_argument("--stop", metavar="TEXT", action="append", default=[],
                          help="end an answer behind this text; may be given several times")
    generate.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                          help="cuda: a GPU, which computes in BF16; default: cpu")
    generate.set_defaults(command=_generate)


def _generate(options: argparse.Namespace, console: Console) -> None:
    import torch

    from sparse_train import kernels
    from sparse_train.cpus import set_threads
    from sparse_train.inference import load
    from sparse_train.inference.streaming import Clock, Words
    from sparse_train.tasks.decoding import end_tokens

    _check(options)
    prompts = [options.prompt] if options.prompts is None else _read(options.prompts)
    set_threads()
    model = load(options.folder, device=options.device, batch_size=options.batch_size,
                 kv_cache=options.kv_cache or "fp32")
    errors = Console(stderr=True, soft_wrap=True)
    if model.is_sparse and options.device == "cpu" and kernels.backend() == "portable":
        errors.print(kernels.PORTABLE_NOTE, style="yellow", highlight=False)
    torch.manual_seed(options.seed)

    def show(text: str) -> None:
        console.out(printable(text, keep="\n\t"), end="", highlight=False)
        console.file.flush()

    clocks, history, tokenizer = [], _history(options, model), model.processor.tokenizer
    try:
        for first in range(0, len(prompts), options.batch_size):
            batch = prompts[first:first + options.batch_size]
            words = Words(tokenizer, show, options.stop) if options.prompts is None else None
            clocks.append(Clock(words))
            answers = model.complete_all(batch, options.max_new_tokens, history, settings=_sampling(options),
                                         stop=options.stop, streamer=clocks[-1])
            if words is None:
                show("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n"
                             for prompt, answer in zip(batch, answers, strict=True)))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"standard output cannot be written: {error.strerror}; send it elsewhere") from error
    count = functools.partial(Clock.num_tokens, padding=tokenizer.pad_token_id,
                              ends=end_tokens(model.model, model.processor, history is not None))
    errors.print(_speed(clocks, count), style="dim", highlight=False)


def _check(options: argparse.Namespace) -> None:
    from sparse_train.tasks import read

    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("top_k", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least {least}")
    if options.seed >= 1 << 63:
        raise UserError(f"--seed {options.seed}: it must be below 2^63")
    if options.temperature and not _LEAST_TEMPERATURE <= options.temperature < math.inf:
        raise UserError(f"--temperature {options.temperature}: it must be a number of at least {_LEAST_TEMPERATURE}, "
                        "or 0, which takes the most likely token")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p}: it must be above 0 and at most 1")
    if options.kv_cache and options.device == "cuda":
        raise UserError(f"--kv-cache {options.kv_cache}: on a GPU it is always bf16; leave it out with --device cuda")
    for text in options.stop:
        if not text:
            raise UserError("--stop: it must have at least one character")
        if not read.is_unicode(text):
            raise UserError(f"--stop {text!r}: it is not UTF-8; give it as UTF-8")


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of transformers' GenerationConfig."""
    if options.temperature == 0 or (options.temperature, options.top_k, options.top_p) == (None, None, None):
        return {}
    return {"do_sample": True, "temperature": 1.0 if options.temperature is None else options.temperature,
            "top_k": options.top_k or 0, "top_p": 1.0 if options.top_p is None else options.top_p}


def _read(file: str) -> list[str]:
    from sparse_train.tasks import read

    prompts = [line for _, line in read.rows(Path("/dev/stdin" if file == "-" else file))]
    if not prompts:
        raise UserError(f"--prompts {file}: it holds no prompt; write one per line")
    return prompts


def _speed(clocks: "list[Clock]", count: Callable[..., int]) -> str:
    later, seconds = sum(count(clock, first=1) for clock in clocks), sum(clock.later_seconds for clock in clocks)
    told = f"{sum(map(count, clocks))} tokens"
    if later:
        told += f", {later / seconds:.1f} tokens/s"
    return f"{told}, the first after {statistics.median(clock.first_seconds for clock in clocks):.3f} s"


def _history(options: argparse.Namespace, model: "Runtime") -> "tuple[Message, ...] | None":
    """What is in front of the prompt in a chat: the system message of the run's task. None: no chat."""
    task = _task(Path(options.folder))
    is_chat = options.chat
    if is_chat is None and task:
        is_chat = task.get("chat") is True or task.get("name") == "chat"
    elif is_chat is None:
        is_chat = model.processor.tokenizer.chat_template is not None
    system = task.get("system")
    return (() if system is None else (("system", str(system)),)) if is_chat else None


def _task(folder: Path) -> dict[str, Any]:
    """`task` of the config of the run that made a model folder; empty where none did."""
    _, stage = (folder.is_dir() and stage_of(folder)) or (None, {})
    config = stage.get("config")
    task = config.get("task") if isinstance(config, dict) else None
    return task if isinstance(task, dict) else {}
