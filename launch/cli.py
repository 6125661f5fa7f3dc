"""sparse-train: run a recipe, look at runs and models, generate.

Exit codes: 0 done; 1 a stage failed (its log is named); 2 a mistake of the user (one line); 130 stopped by Ctrl-C or
another signal.
"""

import argparse
import io
import logging
import os
import re
import sys
import warnings
from pathlib import Path

from rich.console import Console

from sparse_train import log
from sparse_train.errors import StageFailed, UserError, is_of_a_path, printable, told_of
from sparse_train.launch.monitor.cancel import add_cancel
from sparse_train.launch.monitor.logs import add_logs
from sparse_train.launch.monitor.status import add_status
from sparse_train.launch.submit.bench import add_commands as add_bench_commands


def main(arguments: list[str] | None = None) -> int:
    try:
        try:
            return _answer(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # such as | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def _answer(arguments: list[str] | None) -> int:
    """Every mistake of the user's and every path that cannot be used becomes one line here."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of ASCII, a path that is not UTF-8
    options = _parse(arguments)
    log.set_up_command_line(options.log_level)
    # Tables are as wide as they are where nobody's window cuts them.
    console = Console(width=None if sys.stdout and sys.stdout.isatty() else 160)
    complaints = Console(stderr=True, soft_wrap=True)
    try:
        return options.command(options, console) or 0
    except StageFailed as error:
        told, code = str(error), 1
    except UserError as error:
        told, code = str(error), 2
    except OSError as error:
        if not is_of_a_path(error):
            raise
        told, code = told_of(error), 2
    except KeyboardInterrupt:
        return 130
    complaints.print(f"sparse-train: {told}", style="red", markup=False, highlight=False)
    return code


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    # argparse takes key=value only right after CONFIG; users write them after options too.
    options, rest = parser.parse_known_args(arguments)
    if options.command is _run:
        options.overrides = [*options.overrides, *(text for text in rest if not text.startswith("-"))]
        rest = [text for text in rest if text.startswith("-")]
        for text in rest:
            if re.match(r"--?[a-z_]+(\.\w+)*=", text):
                parser.error(f"{text}: keys of the config have no dashes; write {text.lstrip('-')}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """A mistake is one line, not the usage."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(prog="sparse-train", description="Train LLMs to be sparse, and run them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="run a recipe: dense, prune, finetune, evaluate, compress, benchmark, report",
        description="Run the stages of a recipe. Finished stages with unchanged inputs are skipped, a stopped "
                    "training goes on from its newest checkpoint.")
    run.add_argument("config", help="a YAML recipe, or the name of one of the package's, such as demo")
    run.add_argument("overrides", nargs="*", default=[], metavar="key=value",
                     help="such as prune.sparsity=0.5, cluster.nodes=4")
    run.add_argument("--on", default="local", metavar="CLUSTER",
                     help="a file of configs/cluster, or a path: local (the default) runs here, slurm submits jobs")
    run.add_argument("--stages", default="", metavar="A,B", help="only these, such as prune,finetune")
    run.add_argument("--dry-run", action="store_true", help="check the config and print what would run")
    run.add_argument("--replace", action="store_true", help="do finished stages again whose config or inputs changed; "
                     "the old result goes when the new one stands")
    run.add_argument("--prepare", action="store_true", help="write the run folder and start nothing; for "
                     "slurm/train.sbatch")
    run.set_defaults(command=_run)

    add_status(commands)
    add_logs(commands)
    add_cancel(commands)

    inspect = commands.add_parser("inspect", help="tensors, shapes, sparsity and bytes of a checkpoint folder")
    inspect.add_argument("folder", type=Path, metavar="FOLDER")
    inspect.set_defaults(command=_inspect)

    bench = commands.add_parser("bench", help="measure kernels and training steps on this machine")
    add_bench_commands(bench)

    generate = commands.add_parser("generate", help="generate text with a dense or sparse model folder")
    generate.add_argument("folder", metavar="FOLDER", help="or a name on the hub")  # a Path would drop the "./"
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, metavar="N",
                          help="128 unless given, or as many as the model has positions for")
    generate.set_defaults(command=_generate)

    parser.set_defaults(log_level=logging.WARNING)
    for each in (parser, *commands.choices.values()):
        log.add_options(each)
    return parser


def _run(options, console: Console) -> int:
    from sparse_train.config.load import load_points
    from sparse_train.jobs.stage import Kind
    from sparse_train.launch.run.cluster import UNDER, ClusterConfig, load_cluster
    from sparse_train.launch.run.recipes import find_recipe
    from sparse_train.launch.run.slurm_queue import require_idle
    from sparse_train.launch.submit import local, slurm
    from sparse_train.launch.submit.sweep import run_sweep
    from sparse_train.launch.submit.validate import require_data, summarise, validate

    ours = [text for text in options.overrides if text.startswith(UNDER)]
    points = load_points(find_recipe(options.config), [text for text in options.overrides if text not in ours],
                         {UNDER: ClusterConfig})
    cluster = load_cluster(options.on, ours)
    if cluster.executor == "local":
        cluster.visible_gpus(cluster.ranks)  # too many are refused now
    names = [name.strip() for name in options.stages.split(",") if name.strip()]
    local.take_signals()
    if options.prepare and options.dry_run:  # slurm/pipeline.sh would submit what the dry run prints
        raise UserError("--prepare writes the run folder, and --dry-run nothing; give one of them")
    if any(point for point, _ in points):
        if options.prepare:
            raise UserError("--prepare: a sweep is many runs; leave sweep out (sweep={}), or use --on slurm without "
                            "--prepare")
        return run_sweep(points, cluster, names, console, options.dry_run, options.replace)
    [(_, config)] = points
    planned = local.plan(config, names)
    local.require_inputs(config, names)
    local.check_replaced([config], names, options.replace or options.dry_run)
    validation = validate(config, options.dry_run)
    if options.dry_run:
        for line in [*validation.remarks, *summarise(config, validation.parameters)]:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        require_data(config)
        if told := local.replaced([config], names):
            console.print(told, style="yellow", highlight=False, soft_wrap=True, markup=False)
    if options.prepare:
        slurm.prepare(config, cluster, names, options.replace)
        return 0
    if cluster.executor == "slurm":
        slurm.submit(config, cluster, names, console, options.dry_run, options.replace)
        return 0
    if options.dry_run:
        for stage, reason in planned:
            console.print(f"{stage.id:<22} {reason}", highlight=False)
        return 0
    require_idle(config.path)
    local.run(config, cluster, names, console, options.replace)
    report = config.path / "report" / "report.json"
    if planned[-1][0].kind is Kind.REPORT:
        from sparse_train.jobs.report import print_tables

        print_tables(report, console)
        console.print(f"report: {report.with_suffix('.html')}", soft_wrap=True, highlight=False)
    return 0


def _inspect(options, console: Console) -> None:
    from sparse_train.launch.monitor.inspect import print_folder

    print_folder(options.folder, console)


def _generate(options, console: Console) -> None:
    from sparse_train import kernels
    from sparse_train.cpus import set_threads
    from sparse_train.inference import load

    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: it must be at least 1")
    set_threads()
    model = load(options.folder)
    if model.is_sparse and kernels.backend() == "portable":
        Console(stderr=True, soft_wrap=True).print(kernels.PORTABLE_NOTE, style="yellow", highlight=False)
    answer = model.complete(options.prompt, options.max_new_tokens)
    console.print(printable(answer, keep="\n\t"), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
