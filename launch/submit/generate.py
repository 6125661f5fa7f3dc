"""sparse-train generate: complete a prompt with a dense or sparse model folder, or answer it as a turn of a chat."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sparse_train.artifacts import read_manifest
from sparse_train.errors import UserError, printable

if TYPE_CHECKING:  # torch takes seconds to import
    from sparse_train.inference import Runtime
    from sparse_train.tasks.conversation import Message


def add_generate(commands: "argparse._SubParsersAction[Any]") -> None:
    generate = commands.add_parser("generate", help="generate text with a dense or sparse model folder")
    generate.add_argument("folder", metavar="FOLDER", help="or a name on the hub")  # a Path would drop the "./"
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, metavar="N",
                          help="default: 128, or as many as the model has positions for")
    generate.add_argument("--chat", action=argparse.BooleanOptionalAction,
                          help="put the prompt as a user's turn into the model's chat template; default: as the run "
                               "that made FOLDER was trained, elsewhere wherever there is a template")
    generate.set_defaults(command=_generate)


def _generate(options: argparse.Namespace, console: Console) -> None:
    from sparse_train import kernels
    from sparse_train.cpus import set_threads
    from sparse_train.inference import load

    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: it must be at least 1")
    set_threads()
    model = load(options.folder)
    if model.is_sparse and kernels.backend() == "portable":
        Console(stderr=True, soft_wrap=True).print(kernels.PORTABLE_NOTE, style="yellow", highlight=False)
    answer = model.complete(options.prompt, options.max_new_tokens, _history(options, model))
    console.print(printable(answer, keep="\n\t"), markup=False, highlight=False, soft_wrap=True)


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
    """`task` of the config of the run that made a model folder; empty where none did.

    The models of the stage compress are folders inside the stage's."""
    for stage in (folder, folder.parent) if folder.is_dir() else ():
        config = (read_manifest(stage) or {}).get("config")
        if isinstance(config, dict) and isinstance(config.get("task"), dict):
            return config["task"]
    return {}
