"""A sweep: the combinations of a recipe's `sweep`, run one after the other, and one table of their scores.

    RUN/dense-KEY/dense     one dense model for all combinations that agree on how it is trained; it is their teacher
    RUN/POINT/              a run of its own per combination
    RUN/sweep.json          one row per model of every combination: its keys, loss, sparsity and metrics
"""

import math
import statistics
from typing import Any

from rich.console import Console

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.errors import StageFailed, UserError
from sparse_train.jobs.stage import Kind
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.run.lock import locked
from sparse_train.launch.run.slurm_queue import require_idle
from sparse_train.launch.run.stages import dense_of_sweep, find_stage, is_current
from sparse_train.launch.submit import local, slurm
from sparse_train.launch.submit.validate import require_data, summarise, validate
from sparse_train.registry import TASKS
from sparse_train.tables import print_table

Points = list[tuple[dict[str, Any], RunConfig]]


def run_sweep(points: Points, cluster: ClusterConfig, names: list[str], console: Console, dry_run: bool,
              replace: bool = False) -> int:
    """1 when a combination failed; the others are run all the same."""
    for _, config in points:
        local.plan(config, names)  # a stage that does not exist is told at once
        validation = validate(config, dry_run)
        if dry_run:
            console.print(f"{config.name}:", highlight=False, soft_wrap=True, markup=False)
            for line in [*validation.remarks, *summarise(config, validation.parameters)]:
                console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
            require_data(config)
    shared = {config.name: dense_of_sweep(config) for _, config in points if not config.dense.path}
    points = [(point, _with_dense(config, shared.get(config.name))) for point, config in points]
    later = [name for name in names if name != "dense"]
    runs = [config for _, config in points] if later or not names else []
    for config in runs:
        local.require_inputs(config, later)
    dense = list({one.name: one for one in shared.values()}.values())
    for some, stages in ((dense, ["dense"]), (runs, later)):
        local.check_replaced(some, stages, replace or dry_run)
        if dry_run and (told := local.replaced(some, stages)):
            console.print(told, style="yellow", highlight=False, soft_wrap=True, markup=False)
    if cluster.executor == "slurm":
        slurm.submit_sweep(points[0][1].path.parent, dense, runs, cluster, later, console, dry_run, replace)
        return 0
    if dry_run:
        stages = [stage.id for stage, _ in local.plan(runs[0], later)] if runs else []
        for line in (f"{len(points)} combinations, {len(dense)} dense models",
                     f"each combination: {', '.join(stages) or 'nothing'}"):
            console.print(line, highlight=False, soft_wrap=True)
        return 0
    folder = points[0][1].path.parent
    require_idle(folder)
    with locked(folder):
        return _run_all(points, shared, bool(runs), later, cluster, console, replace)


def _run_all(points: Points, shared: dict[str, RunConfig], goes_on: bool, later: list[str], cluster: ClusterConfig,
             console: Console, replace: bool) -> int:
    failures = []
    for number, (_, config) in enumerate(points, 1):
        console.print(f"[bold]{config.name}[/] ({number} of {len(points)})", highlight=False)
        try:
            if dense := shared.get(config.name):
                local.run(dense, cluster, ["dense"], console, replace)
            if goes_on:
                local.run(config, cluster, later, console, replace)
        except (StageFailed, UserError) as error:
            failures.append(f"{config.name}: {error}")
    print_collected(points, console)
    for line in failures:
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if failures else 0


def _with_dense(config: RunConfig, dense: RunConfig | None) -> RunConfig:
    if dense is None:
        return config
    path = str((dense.path / "dense").absolute())
    return config.model_copy(update={"dense": config.dense.model_copy(update={"path": path})})


def print_collected(points: Points, console: Console) -> None:
    """Write SWEEP/sweep.json and print it as a table: scores of the combinations that are evaluated by now."""
    table = []
    for point, config in points:
        evaluate = find_stage(config, Kind.EVALUATE)
        if is_current(evaluate, config):
            table += [{"point": point, **row} for row in artifacts.read_json(config.path / "evaluate" / "scores.json")]
    if table:
        artifacts.write_json(points[0][1].path.parent / "sweep.json", table)
        print_sweep(table, TASKS.load(points[0][1].task.name).metric, console)


def print_sweep(table: list[dict[str, Any]], metric: str, console: Console) -> None:
    """Mean and sample standard deviation over the seeds; one line per combination and sparsity, one column per loss."""
    keys = [key for key in table[0]["point"] if key not in ("seed", "prune.sparsity")]
    losses = list(dict.fromkeys(row["loss"] for row in table))
    for name in (metric, "cross_entropy"):
        # (case, sparsity) -> loss -> seed -> value; a seed's dense model counts once, however many were pruned from it.
        cells: dict[tuple, dict[str, dict]] = {}
        dense: dict[tuple, dict] = {}
        for row in table:
            case, seed = tuple(str(row["point"][key]) for key in keys), row["point"].get("seed")
            if row["loss"] == "dense":
                dense.setdefault(case, {})[seed] = row["metrics"][name]
            else:
                losses_of = cells.setdefault((*case, f"{row['sparsity']:.2f}"), {})
                losses_of.setdefault(row["loss"], {})[seed] = row["metrics"][name]
        rows = [[*case, *(_mean(found | {"dense": dense[case[:-1]]}, loss) for loss in losses)]
                for case, found in cells.items()]
        console.print(f"[bold]{name.replace('_', ' ')}")
        print_table(console, (*(key.rpartition(".")[2] for key in keys), "sparsity", *losses), rows, len(keys) + 1)


def _mean(found: dict[str, dict[Any, float]], loss: str) -> str:
    values = [value for value in found.get(loss, {}).values() if value is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{math.fsum(values) / len(values):.3f}{spread}"
