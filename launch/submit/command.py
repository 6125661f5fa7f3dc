"""sparse-train run: read a recipe, its overrides and options, and run its stages here, on SLURM, or as a sweep."""

import argparse

from rich.console import Console

from sparse_train.config import RunConfig
from sparse_train.errors import UserError
from sparse_train.jobs.stage import Kind
from sparse_train.launch.run.cluster import UNDER, ClusterConfig, load_cluster


def add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser(
        "run", help="run a recipe: dense, prune, finetune, evaluate, compress, benchmark, report",
        description="Run the stages of a recipe. Finished stages with unchanged inputs are skipped, a stopped "
                    "training, pruning or evaluation continues from what it saved.")
    run.add_argument("config", help="a YAML recipe, or the name of one of the package's, such as demo")
    run.add_argument("overrides", nargs="*", default=[], metavar="key=value",
                     help="such as prune.sparsity=0.5, cluster.nodes=4")
    run.add_argument("--on", default="local", metavar="CLUSTER",
                     help="a file of configs/cluster, or a path: local (the default) runs here, slurm submits jobs")
    run.add_argument("--stages", default="", metavar="A,B", help="only these, such as prune,finetune")
    run.add_argument("--dry-run", action="store_true", help="check the config and print what would run")
    run.add_argument("--replace", action="store_true", help="do finished stages again whose config or inputs changed; "
                     "the old result is deleted when the new one is complete")
    run.add_argument("--prepare", action="store_true", help="write the run folder and start nothing; for "
                     "slurm/train.sbatch")
    run.set_defaults(command=_run)


def _run(options: argparse.Namespace, console: Console) -> int:
    from sparse_train.config.load import load_points
    from sparse_train.launch.run.recipes import find_recipe
    from sparse_train.stopping import handle_signals

    cluster_overrides = [text for text in options.overrides if text.startswith(UNDER)]
    run_overrides = [text for text in options.overrides if not text.startswith(UNDER)]
    points = load_points(find_recipe(options.config), run_overrides, {UNDER: ClusterConfig})
    cluster = load_cluster(options.on, cluster_overrides)
    if cluster.executor == "local":
        cluster.visible_gpus(cluster.ranks)  # refuses too many GPUs before anything starts
    names = [name.strip() for name in options.stages.split(",") if name.strip()]
    handle_signals()
    if options.prepare and options.dry_run:  # slurm/pipeline.sh would submit what the dry run prints
        raise UserError("--prepare writes the run folder, and --dry-run nothing; give one of them")
    if any(point for point, _ in points):
        if options.prepare:
            raise UserError("--prepare: a sweep is many runs; leave sweep out (sweep={}), or use --on slurm without "
                            "--prepare")
        from sparse_train.launch.submit.sweep import run_sweep

        return run_sweep(points, cluster, names, console, options.dry_run, options.replace)
    [(_, config)] = points
    _check(config, names, options, console)
    if options.prepare or cluster.executor == "slurm":
        _submit(config, cluster, names, options, console)
    elif options.dry_run:
        _print_plan(config, names, console)
    else:
        _run_here(config, cluster, names, options.replace, console)
    return 0


def _check(config: RunConfig, names: list[str], options: argparse.Namespace, console: Console) -> None:
    """Raises UserError; a dry run prints what the run will do, in numbers."""
    from sparse_train.launch.run.plan import check_replaced, describe_replaced, require_inputs
    from sparse_train.launch.submit.validate import require_data, summarise, validate

    require_inputs(config, names)
    check_replaced([config], names, options.replace or options.dry_run)
    validation = validate(config, names, options.dry_run)
    if options.dry_run:
        for line in [*validation.remarks, *summarise(config, validation.parameters)]:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        require_data(config)
        if line := describe_replaced([config], names):
            console.print(line, style="yellow", highlight=False, soft_wrap=True, markup=False)


def _submit(config: RunConfig, cluster: ClusterConfig, names: list[str], options: argparse.Namespace,
            console: Console) -> None:
    from sparse_train.launch.submit import slurm

    if options.prepare:
        slurm.prepare(config, cluster, names, options.replace)
    else:
        slurm.submit(config, cluster, names, console, options.dry_run, options.replace)


def _print_plan(config: RunConfig, names: list[str], console: Console) -> None:
    from sparse_train.launch.run.plan import plan

    for planned in plan(config, names):
        console.print(f"{planned.stage.id:<22} {planned.reason}", highlight=False)


def _run_here(config: RunConfig, cluster: ClusterConfig, names: list[str], replace: bool, console: Console) -> None:
    from sparse_train.launch.run.slurm_queue import require_idle
    from sparse_train.launch.run.stages import build_stages, select
    from sparse_train.launch.submit import local

    require_idle(config.path)
    local.run(config, cluster, names, console, replace)
    if select(build_stages(config), names)[-1].kind is Kind.REPORT:
        from sparse_train.jobs.report import print_tables

        report = config.path / "report" / "report.json"
        print_tables(report, console)
        console.print(f"report: {report.with_suffix('.html')}", soft_wrap=True, highlight=False)
