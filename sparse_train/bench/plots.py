"""The report's plots: accuracy against sparsity, and against speed."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_accuracy(path: Path, metric: str, scores: list[dict[str, Any]], speeds: list[dict[str, Any]]) -> None:
    """Write a PNG of two scatter plots to `path`.

    `scores` have loss, sparsity and value (of `metric`); `speeds` have label, speedup and value.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_sparsity, by_speed = figure.subplots(1, 2)
    for row in scores:
        by_sparsity.scatter(row["sparsity"], row["value"], s=60, label=row["loss"])
    by_sparsity.set(xlabel="sparsity of the prunable weights", ylabel=metric, xlim=(-0.05, 1),
                    title=f"{metric} against sparsity")
    for row in speeds:
        by_speed.scatter(row["speedup"], row["value"], s=60, label=row["label"])
    by_speed.set(xlabel="tokens/s relative to dense torch FP32", ylabel=metric,
                 title=f"{metric} against decoding speed")
    by_speed.set_xlim(left=0)
    for axes in (by_sparsity, by_speed):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
