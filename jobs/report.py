"""report: one page on accuracy, size and speed, from what the other stages measured.

    report.json   {"scores": [{model, loss, sparsity, metric, value}],
                   "speed": [{model, what, engine, precision, sparsity, milliseconds, fraction_of_byte_bound, ...}],
                   ...}
    report.html   the same as tables with the picture inside; opens without a network
    accuracy.png  accuracy against sparsity and against speed
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console

from sparse_train import artifacts
from sparse_train.bench.tables import SPEED_HEADER, notes, print_measured, speed_cells
from sparse_train.extras import require
from sparse_train.jobs.job import Job
from sparse_train.jobs.stage import Kind
from sparse_train.registry import TASKS
from sparse_train.tables import print_table
from sparse_train.tasks import Task
from sparse_train.tasks.general_text import in_tables

_RUNTIME = ("runtime: each token as generate computes it, new ones by the sparse kernels; int8, int4: "
            "weights have so many bits and activations 8 in every product of a sparse weight")


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """Lines below the table."""


def run(job: Job) -> dict[str, Any]:
    data = _collect(job)
    artifacts.write_json(job.out / "report.json", data)
    _plot(job.out / "accuracy.png", data)
    artifacts.write_text(job.out / "report.html", _page(data, job.out / "accuracy.png"))
    return {"num_scores": len(data["scores"]), "num_speeds": len(data["speed"])}


def _collect(job: Job) -> dict[str, Any]:
    config, scores = job.config, []
    evaluated = artifacts.read_json(Path(job.path_of(Kind.EVALUATE)) / "scores.json")
    for row in evaluated:
        engine = row.get("precision", "fp32")  # older scores do not tell it
        scores += _score_rows(config.name, row["loss"], engine, row["sparsity"], row["metrics"])
    # In a chain, the row of the last level.
    sparsity = next(row["sparsity"] for row in reversed(evaluated) if row["loss"] == config.compressed_loss)
    compressed = artifacts.read_json(Path(job.path_of(Kind.COMPRESS)) / "scores.json")
    for precision, metrics in compressed["scores"].items():
        scores += _score_rows(config.name, compressed["loss"], f"runtime {precision}", sparsity, metrics)
    benchmarks = [artifacts.read_json(Path(source.path) / "rows.json") for source in job.inputs
                  if source.stage.kind is Kind.BENCHMARK]
    return {"run": config.name, "about": config.about, "task": config.task.name,
            "metric": TASKS.load(config.task.name).metric, "prune": config.prune.model_dump(mode="json"),
            "finetune": {"num_examples": config.finetune.num_examples, "steps": config.finetune.steps},
            "compressed_loss": compressed["loss"], "scores": scores,
            "speed": [row for benchmark in benchmarks for row in benchmark["rows"]],
            "machines": [benchmark["machine"] for benchmark in benchmarks], "num_bytes": compressed["num_bytes"],
            "seconds": {source.stage.id: manifest["seconds"] for source in job.inputs
                        if (manifest := artifacts.read_manifest(Path(source.path)))}}


def _score_rows(model: str, loss: str, engine: str, sparsity: float, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"model": model, "loss": loss, "engine": engine, "sparsity": round(sparsity, 4), "metric": metric,
             "value": value} for metric, value in metrics.items()]


def _plot(path: Path, data: dict[str, Any]) -> None:
    require("plots")
    from sparse_train.bench.plots import plot_accuracy

    exact = [row for row in data["scores"] if row["metric"] == data["metric"]]
    value = {row["engine"]: row["value"] for row in exact if _is_runtime(row["engine"])}
    dense = next(row["value"] for row in exact if row["loss"] == "dense")
    speeds = [{"label": f"{row['engine']} {row['precision']}", "speedup": row["speedup"],
               "value": dense if row["engine"] == "torch" else value[f"runtime {row['precision']}"]}
              for row in data["speed"] if row["what"] == "decode" and row["model"] == data["run"]]
    plot_accuracy(path, table_name(data["metric"]), [row for row in exact if not _is_runtime(row["engine"])], speeds)


def read_tables(path: Path) -> list[Table]:
    """Scores, sizes and speed of a report.json."""
    return _tables(artifacts.read_json(path))


def _tables(data: dict[str, Any]) -> list[Table]:
    speeds = [speed_cells(row) for row in data["speed"]]
    return [_score_table(data), _size_table(data), Table(
        f"Batch-1 speed {_machine_line(data)}", SPEED_HEADER, speeds, "\n".join(notes(speeds, _backends(data))))]


def _score_table(data: dict[str, Any]) -> Table:
    task = TASKS.load(data["task"])
    by_model: dict[tuple[str, str, float], dict[str, Any]] = {}
    for row in data["scores"]:
        by_model.setdefault((row["loss"], row["engine"], row["sparsity"]), {})[row["metric"]] = row["value"]
    columns = (task.metric, *task.extra_metrics)
    settings = next(iter(by_model.values()))  # all models have the same
    on_texts = in_tables(settings)
    rows = [[loss, engine, f"{sparsity:.2f}", *(_number(metrics[name], 3) for name in columns),
             _number(metrics["cross_entropy"], 4), *(_number(metrics.get(name), 3) for name in on_texts),
             str(metrics["num_examples"])]
            for (loss, engine, sparsity), metrics in by_model.items()]
    notes = _teacher_note(task, [row for row in data["scores"] if row["metric"] == task.metric])
    notes += [f"{table_name(name)}: {settings[name]}" for name in task.score_settings]
    if any(_is_runtime(engine) for _, engine, _ in by_model):
        notes.append(_RUNTIME)
    if num_left_out := settings.get("num_left_out"):
        notes.append(f"{num_left_out} test examples that do not fit the model are left out")
    notes += _notes_on_texts(settings)
    header = ["model", "computed in", "sparsity", *map(table_name, columns), "cross-entropy",
              *map(table_name, on_texts), "examples"]
    return Table("Scores on unseen examples", header, rows, "\n".join(notes))


def _notes_on_texts(settings: dict[str, Any]) -> list[str]:
    notes = []
    for name in (key.removesuffix("/num_tokens") for key in settings if key.endswith("/num_tokens")):
        num_left_out = settings[f"{name}/num_left_out"]
        left_out = f"; {num_left_out} texts that do not fit the model are left out" if num_left_out else ""
        notes.append(f"{table_name(name)}: {settings[f'{name}/num_tokens']:,} tokens of general text; kl: "
                     f"KL(dense || model) in nats per token{left_out}")
    return notes


def _size_table(data: dict[str, Any]) -> Table:
    dense = data["num_bytes"]["dense"]
    rows = [[name, f"{size:,}", f"{size / dense:.3f}"] for name, size in data["num_bytes"].items()]
    return Table(f"Size of the {data['compressed_loss']} model's files", ["folder", "bytes", "of dense"], rows)


def _teacher_note(task: type[Task], rows: list[dict[str, Any]]) -> list[str]:
    """A line where the dense model, the teacher, scores worse than a student."""
    scored = [row for row in rows if not _is_runtime(row["engine"]) and row["value"] is not None]
    if len(scored) < 2 or scored[0]["loss"] != "dense":
        return []
    dense, *students = scored
    pick_best = max if task.higher_is_better else min
    best = pick_best(students, key=lambda row: row["value"])
    if pick_best(dense["value"], best["value"]) == dense["value"]:
        return []
    return [f"the dense model, the teacher, is worse at the task ({_number(dense['value'], 3)}) than {best['loss']} "
            f"({_number(best['value'], 3)}); where that is more than chance, train it longer or give a better one"]


def _is_runtime(engine: str) -> bool:
    """Whether a score is one of the compressed model."""
    return engine.startswith("runtime")


def table_name(name: str) -> str:
    """What tables call a metric."""
    return name.replace("_", " ").replace("/", " ")


def _number(value: float | None, digits: int) -> str:
    """As text; "-" for None, where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def print_tables(path: Path, console: Console) -> None:
    """The tables of a report.json, for a terminal."""
    data = artifacts.read_json(path)
    if data["about"]:
        console.print(data["about"] + "\n", highlight=False, markup=False)
    for table in (_score_table(data), _size_table(data)):
        console.print(table.title, style="bold")
        print_table(console, table.header, table.rows)
        console.print(table.note + "\n" if table.note else "", highlight=False, markup=False)
    console.print("[bold]Batch-1 speed[/] " + _machine_line(data))
    print_measured(console, SPEED_HEADER, map(speed_cells, data["speed"]), _backends(data), num_left=3)


def _backends(data: dict[str, Any]) -> list[str]:
    return [machine.get("backend", "") for machine in data["machines"]]


def _machine_line(data: dict[str, Any]) -> str:
    descriptions = []
    for machine in data["machines"]:
        what = machine["device"]
        if "threads" in machine:
            what += f", {machine['threads']} threads, {machine['backend']} kernels"
        descriptions.append(f"{what}, streaming read {machine['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s")
    return f"({'; '.join(descriptions)})"


def _page(data: dict[str, Any], picture: Path) -> str:
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                   trim_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return templates.get_template("report.html.jinja").render(
        data=data, tables=_tables(data), picture=base64.b64encode(picture.read_bytes()).decode())
