"""report: one page on accuracy, size and speed, from what the other stages measured.

    report.json   {"scores": [{model, loss, sparsity, metric, value}],
                   "speed": [{model, what, engine, precision, sparsity, milliseconds, fraction_of_byte_bound, ...}],
                   ...}
    report.html   the same as tables with the picture inside; opens without a network
    accuracy.png  accuracy against sparsity and against speed
"""

import base64
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_train import artifacts
from sparse_train.bench.plots import plot_accuracy
from sparse_train.bench.tables import SPEED_HEADER, notes, print_measured, speed_cells
from sparse_train.jobs.job import Job
from sparse_train.registry import TASKS
from sparse_train.tables import print_table

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}img{max-width:100%}"""

_RUNTIME = ("runtime: each token as generate computes it, new ones by the sparse kernels; int8: weights and "
            "activations have 8 bits in every product of a sparse weight")


def run(job: Job) -> dict[str, Any]:
    data = _collect(job)
    artifacts.write_json(job.out / "report.json", data)
    _plot(job.out / "accuracy.png", data)
    artifacts.write_text(job.out / "report.html", _page(data, job.out / "accuracy.png"))
    return {"num_scores": len(data["scores"]), "num_speeds": len(data["speed"])}


def _collect(job: Job) -> dict[str, Any]:
    config, inputs = job.config, job.inputs
    scores = []
    for row in artifacts.read_json(inputs["evaluate"] / "scores.json"):
        scores += _score_rows(config.name, row["loss"], "fp32", row["sparsity"], row["metrics"])
        if row["loss"] == config.compressed_loss:
            sparsity = row["sparsity"]  # in the end that of the last level, which is compressed
    compressed = artifacts.read_json(inputs["compress"] / "scores.json")
    for precision, metrics in compressed["scores"].items():
        scores += _score_rows(config.name, compressed["loss"], f"runtime {precision}", sparsity, metrics)
    benchmarks = [artifacts.read_json(path / "rows.json") for stage, path in inputs.items()
                  if stage.partition("/")[0] == "benchmark"]
    return {"run": config.name, "about": config.about, "task": config.task.name,
            "metric": TASKS.load(config.task.name).metric, "prune": config.prune.model_dump(mode="json"),
            "finetune": {"num_examples": config.finetune.num_examples, "steps": config.finetune.steps},
            "compressed_loss": compressed["loss"], "scores": scores,
            "speed": [row for benchmark in benchmarks for row in benchmark["rows"]],
            "machines": [benchmark["machine"] for benchmark in benchmarks], "num_bytes": compressed["num_bytes"],
            "seconds": {stage: manifest["seconds"] for stage, path in inputs.items()
                        if (manifest := artifacts.read_manifest(Path(path)))}}


def _score_rows(model, loss, engine, sparsity, metrics):
    return [{"model": model, "loss": loss, "engine": engine, "sparsity": round(sparsity, 4), "metric": metric,
             "value": value} for metric, value in metrics.items()]


def _plot(path: Path, data: dict[str, Any]) -> None:
    exact = [row for row in data["scores"] if row["metric"] == data["metric"]]
    value = {row["engine"]: row["value"] for row in exact if row["engine"].startswith("runtime")}
    dense = next(row["value"] for row in exact if row["loss"] == "dense")
    speeds = [{"label": f"{row['engine']} {row['precision']}", "speedup": row["speedup"],
               "value": dense if row["engine"] == "torch" else value[f"runtime {row['precision']}"]}
              for row in data["speed"] if row["what"] == "decode" and row["model"] == data["run"]]
    plot_accuracy(path, data["metric"].replace("_", " "), [row for row in exact if row["engine"] == "fp32"], speeds)


def _tables(data: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]], str]]:
    """(title, header, rows, line below) of the score and size tables, as text."""
    task = TASKS.load(data["task"])
    found: dict[tuple, dict[str, Any]] = {}
    for row in data["scores"]:
        found.setdefault((row["loss"], row["engine"], row["sparsity"]), {})[row["metric"]] = row["value"]
    shown = (task.metric, *task.extra_metrics)
    settings = next(iter(found.values()))  # the same for all
    scores = [[loss, engine, f"{sparsity:.2f}", *(_number(m[name], 3) for name in shown),
               _number(m["cross_entropy"], 4), str(m["num_examples"])] for (loss, engine, sparsity), m in found.items()]
    dense = data["num_bytes"]["dense"]
    sizes = [[name, f"{size:,}", f"{size / dense:.3f}"] for name, size in data["num_bytes"].items()]
    told = _beaten(task, [row for row in data["scores"] if row["metric"] == task.metric])
    told += [f"{name.replace('_', ' ')}: {settings[name]}" for name in task.score_settings]
    if any(engine.startswith("runtime") for _, engine, _ in found):
        told.append(_RUNTIME)
    if left_out := settings.get("num_left_out"):
        told.append(f"{left_out} test examples that do not fit the model are left out")
    return [
        ("Scores on unseen examples", ["model", "computed in", "sparsity", *(name.replace("_", " ") for name in shown),
                                       "cross-entropy", "examples"], scores, "\n".join(told)),
        (f"Size of the {data['compressed_loss']} model's files", ["folder", "bytes", "of dense"], sizes, ""),
    ]


def _beaten(task, rows: list[dict[str, Any]]) -> list[str]:
    """A line where the teacher has less to teach than its students know."""
    (dense, *students) = [row for row in rows if row["engine"] == "fp32" and row["value"] is not None] or [None]
    if dense is None or dense["loss"] != "dense" or not students:
        return []
    pick_best = max if task.higher_is_better else min
    best = pick_best(students, key=lambda row: row["value"])
    if pick_best(dense["value"], best["value"]) == dense["value"]:
        return []
    return [f"the dense model, the teacher, is worse at the task ({_number(dense['value'], 3)}) than {best['loss']} "
            f"({_number(best['value'], 3)}); where that is more than chance, train it longer or give a better one"]


def _number(value: float | None, digits: int) -> str:
    """None: there was nothing to take it from."""
    return "-" if value is None else f"{value:.{digits}f}"


def print_tables(path: Path, console: Console) -> None:
    """The tables of a report.json, for a terminal."""
    data = artifacts.read_json(path)
    if data["about"]:
        console.print(data["about"] + "\n", highlight=False, markup=False)
    for title, header, rows, below in _tables(data):
        console.print(title, style="bold")
        print_table(console, header, rows)
        console.print(below + "\n" if below else "", highlight=False, markup=False)
    console.print("[bold]Batch-1 speed[/] " + _machine_line(data))
    print_measured(console, SPEED_HEADER, map(speed_cells, data["speed"]), _backends(data), num_left=3)


def _backends(data: dict[str, Any]) -> list[str]:
    return [machine.get("backend", "") for machine in data["machines"]]


def _machine_line(data: dict[str, Any]) -> str:
    told = []
    for machine in data["machines"]:
        what = machine["device"]
        if "threads" in machine:
            what += f", {machine['threads']} threads, {machine['backend']} kernels"
        told.append(f"{what}, streaming read {machine['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s")
    return f"({'; '.join(told)})"


def _page(data: dict[str, Any], picture: Path) -> str:
    speeds = [speed_cells(row) for row in data["speed"]]
    tables = [*_tables(data), (f"Batch-1 speed {_machine_line(data)}", SPEED_HEADER, speeds,
                               "; ".join(notes(speeds, _backends(data))))]
    image = base64.b64encode(picture.read_bytes()).decode()
    body = "".join(_html_table(*table) for table in tables)
    return (f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(data['run'])}</title>"
            f"<style>{_STYLE}</style><h1>{escape(data['run'])}: {escape(data['task'])}, "
            f"{data['scores'][-1]['sparsity']:.0%} sparse</h1><p>{escape(data['about'])}</p>"
            f"<img alt='accuracy against sparsity and speed' "
            f"src='data:image/png;base64,{image}'>{body}</html>\n")


def _html_table(title: str, header: list[str], rows: list[list[str]], below: str) -> str:
    def line(tag, cells):
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return (f"<h2>{escape(title)}</h2><table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>"
            + (f"<p style='white-space:pre-line'>{escape(below)}</p>" if below else ""))
