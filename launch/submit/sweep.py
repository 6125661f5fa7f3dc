"""A sweep: every combination of a recipe's `sweep` as a run, and one table of their scores.

    RUN/dense-KEY/dense     one dense model for all combinations that agree on how it is trained; it is their teacher
    RUN/POINT/              the run of one combination
    RUN/sweep.json          one row per model of every combination: its keys, loss, sparsity and metrics
"""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.errors import StageFailed, UserError
from sparse_train.jobs.stage import Kind
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.run.lock import locked
from sparse_train.launch.run.plan import check_replaced, describe_replaced, require_inputs
from sparse_train.launch.run.slurm_queue import require_idle
from sparse_train.launch.run.sources import dense_of_sweep, is_current
from sparse_train.launch.run.stages import build_stages, find_stage, select
from sparse_train.launch.submit import local
from sparse_train.launch.submit.validate import require_data, summarise, validate
from sparse_train.registry import TASKS
from sparse_train.tables import print_table

Points = list[tuple[dict[str, Any], RunConfig]]


@dataclass(frozen=True)
class _Sweep:
    points: Points
    """The combinations; each reads its shared dense model as an external one."""
    shared: dict[str, RunConfig]
    """Combination -> the run that makes its dense model."""
    runs: list[RunConfig]
    """The runs of the combinations; empty where only dense models are selected."""
    names: list[str]
    """The selected stages of `runs`; empty for all."""

    @property
    def folder(self) -> Path:
        return self.points[0][1].path.parent

    @property
    def dense(self) -> list[RunConfig]:
        return list({config.name: config for config in self.shared.values()}.values())


def run_sweep(points: Points, cluster: ClusterConfig, names: list[str], console: Console, dry_run: bool,
              replace: bool = False) -> int:
    """Run every combination, also after one has failed. Returns the exit code: 1 when one failed, else 0."""
    for _, config in points:
        _check(config, names, console, dry_run)
    sweep = _share_dense(points, names)
    _check_replaced(sweep, console, dry_run, replace)
    if cluster.executor == "slurm":
        from sparse_train.launch.submit import slurm

        slurm.submit_sweep(sweep.folder, sweep.dense, sweep.runs, cluster, sweep.names, console, dry_run, replace)
        return 0
    if dry_run:
        stages = select(build_stages(sweep.runs[0]), sweep.names) if sweep.runs else []
        for line in (f"{len(points)} combinations, {len(sweep.dense)} dense models",
                     f"each combination: {', '.join(stage.id for stage in stages) or 'nothing'}"):
            console.print(line, highlight=False, soft_wrap=True)
        return 0
    require_idle(sweep.folder)
    with locked(sweep.folder):
        return _run_all(sweep, cluster, console, replace)


def _check(config: RunConfig, names: list[str], console: Console, dry_run: bool) -> None:
    validation = validate(config, names, dry_run)
    if dry_run:
        console.print(f"{config.name}:", highlight=False, soft_wrap=True, markup=False)
        for line in [*validation.remarks, *summarise(config, validation.parameters)]:
            console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
        require_data(config)


def _share_dense(points: Points, names: list[str]) -> _Sweep:
    shared = {config.name: dense_of_sweep(config) for _, config in points if not config.dense.path}
    points = [(point, _with_dense(config, shared.get(config.name))) for point, config in points]
    later = [name for name in names if name != Kind.DENSE]
    return _Sweep(points, shared, [config for _, config in points] if later or not names else [], later)


def _check_replaced(sweep: _Sweep, console: Console, dry_run: bool, replace: bool) -> None:
    for config in sweep.runs:
        require_inputs(config, sweep.names)
    for configs, names in ((sweep.dense, [Kind.DENSE.value]), (sweep.runs, sweep.names)):
        check_replaced(configs, names, replace or dry_run)
        if dry_run and (line := describe_replaced(configs, names)):
            console.print(line, style="yellow", highlight=False, soft_wrap=True, markup=False)


def _run_all(sweep: _Sweep, cluster: ClusterConfig, console: Console, replace: bool) -> int:
    failures = []
    for number, (_, config) in enumerate(sweep.points, 1):
        console.print(f"[bold]{config.name}[/] ({number} of {len(sweep.points)})", highlight=False)
        try:
            if dense := sweep.shared.get(config.name):
                local.run(dense, cluster, [Kind.DENSE.value], console, replace)
            if sweep.runs:
                local.run(config, cluster, sweep.names, console, replace)
        except (StageFailed, UserError) as error:
            failures.append(f"{config.name}: {error}")
    print_collected(sweep.points, console)
    for line in failures:
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if failures else 0


def _with_dense(config: RunConfig, dense: RunConfig | None) -> RunConfig:
    if dense is None:
        return config
    path = str((dense.path / "dense").absolute())
    return config.model_copy(update={"dense": config.dense.model_copy(update={"path": path})})


def print_collected(points: Points, console: Console) -> None:
    """Write SWEEP/sweep.json and print it as a table: the scores of the combinations evaluated so far."""
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
    from sparse_train.tasks.general_text import in_tables  # torch takes seconds to import

    keys = [key for key in table[0]["point"] if key not in ("seed", "prune.sparsity")]
    losses = list(dict.fromkeys(row["loss"] for row in table))
    on_texts = in_tables(dict.fromkeys(name for row in table for name in row["metrics"]))
    for name in (metric, "cross_entropy", *on_texts):
        # (combination, sparsity, loss) -> seed -> value. A dense model has no sparsity here, so that a seed's counts
        # once, however many models were pruned from it.
        values: defaultdict[tuple[tuple[str, ...], str, str], dict[Any, float | None]] = defaultdict(dict)
        for row in table:
            combination, loss = tuple(str(row["point"][key]) for key in keys), row["loss"]
            sparsity = "" if loss == "dense" else f"{row['sparsity']:.2f}"
            values[combination, sparsity, loss][row["point"].get("seed")] = row["metrics"].get(name)
        lines = dict.fromkeys((combination, sparsity) for combination, sparsity, _ in values if sparsity)
        rows = [[*combination, sparsity, *(_mean(values[combination, "" if loss == "dense" else sparsity, loss])
                                           for loss in losses)] for combination, sparsity in lines]
        console.print(f"[bold]{name.replace('_', ' ').replace('/', ' ')}")
        print_table(console, (*(key.rpartition(".")[2] for key in keys), "sparsity", *losses), rows, len(keys) + 1)


def _mean(value_of_seed: dict[Any, float | None]) -> str:
    numbers = [value for value in value_of_seed.values() if value is not None]
    if not numbers:
        return "-"
    spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.3f}{spread}"
