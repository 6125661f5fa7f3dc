"""A sweep: the combinations of a recipe's `sweep`, run one after the other, and one table of their scores.

    RUN/dense-KEY/dense     one dense model for all combinations that agree on how it is trained; it is their teacher
    RUN/POINT/              a run of its own per combination
    RUN/sweep.json          one row per model of every combination: its keys, loss, sparsity and metrics
"""

import math
import statistics
from typing import Any

from rich.console import Console

from launch import runner
from launch.cluster import ClusterConfig
from launch.preflight import check, numbers
from launch.stages import build_stages, stage_key
from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.tables import print_table
from sparse_train.tasks import task_class

Points = list[tuple[dict[str, Any], RunConfig]]


def run_sweep(points: Points, cluster: ClusterConfig, names: list[str], console: Console, dry_run: bool) -> int:
    """1 when a combination failed; the others are run all the same."""
    for _, config in points:
        runner.plan(config, names)  # a stage's name that does not exist is told before anything runs
    if dry_run:
        for _, config in points:
            size, remarks = check(config, dry_run=True)
            for line in [f"{config.name}:", *(f"  {line}" for line in [*remarks, *numbers(config, size)])]:
                console.print(line, highlight=False, soft_wrap=True, markup=False)
        return 0
    failures, later = [], [name for name in names if name != "dense"]
    for number, (_, config) in enumerate(points, 1):
        check(config)
        console.print(f"[bold]{config.name}[/] ({number} of {len(points)})", highlight=False)
        try:
            shared = _with_shared_dense(config, cluster, console)
            if not names or later:
                runner.run(shared, cluster, later, console)
        except runner.StageFailed as error:
            failures.append(f"{config.name}: {error}")
    table = collect(points)
    if table:
        artifacts.write_json(points[0][1].path.parent / "sweep.json", table)
        print_sweep(table, task_class(points[0][1].task.name).metric, console)
    for line in failures:
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if failures else 0


def _with_shared_dense(config: RunConfig, cluster: ClusterConfig, console: Console) -> RunConfig:
    if config.dense.path:
        return config
    dense = next(stage for stage in build_stages(config) if stage.id == "dense")
    shared = config.model_copy(update={"name": f"dense-{stage_key(dense, config)[:8]}"})
    runner.run(shared, cluster, ["dense"], console)
    path = str((shared.path / "dense").absolute())
    return config.model_copy(update={"dense": config.dense.model_copy(update={"path": path})})


def collect(points: Points) -> list[dict[str, Any]]:
    found = []
    for point, config in points:
        scores = config.path / "evaluate" / "scores.json"
        if scores.is_file():
            found += [{"point": point, **row} for row in artifacts.read_json(scores)]
    return found


def print_sweep(table: list[dict[str, Any]], metric: str, console: Console) -> None:
    """Mean and sample standard deviation over the seeds; one line per combination and sparsity, one column per loss."""
    keys = [key for key in table[0]["point"] if key not in ("seed", "prune.sparsity")]
    losses = list(dict.fromkeys(row["loss"] for row in table))
    for name in (metric, "cross_entropy"):
        cells: dict[tuple, dict[str, list[float]]] = {}
        dense: dict[tuple, list[float]] = {}
        for row in table:
            case = tuple(str(row["point"][key]) for key in keys)
            if row["loss"] == "dense":
                dense.setdefault(case, []).append(row["metrics"][name])
            else:
                losses_of = cells.setdefault((*case, f"{row['sparsity']:.2f}"), {})
                losses_of.setdefault(row["loss"], []).append(row["metrics"][name])
        rows = [[*case, *(_mean(found | {"dense": dense[case[:-1]]}, loss) for loss in losses)]
                for case, found in cells.items()]
        console.print(f"[bold]{name.replace('_', ' ')}")
        print_table(console, (*(key.rpartition(".")[2] for key in keys), "sparsity", *losses), rows, len(keys) + 1)


def _mean(found: dict[str, list[float]], loss: str) -> str:
    values = found.get(loss)
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{math.fsum(values) / len(values):.3f}{spread}"
