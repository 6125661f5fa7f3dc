"""The report's picture: accuracy against sparsity, and against speed."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_accuracy(path: Path, metric: str, scores: list[dict[str, Any]], speeds: list[dict[str, Any]]) -> None:
    """Write a PNG of two scatter plots to `path`.

    `scores` have loss, sparsity and value (of `metric`); `speeds` have label, speedup and value.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in scores:
        left.scatter(row["sparsity"], row["value"], s=60, label=row["loss"])
    left.set(xlabel="sparsity of the prunable weights", ylabel=metric, xlim=(-0.05, 1),
             title=f"{metric} against sparsity")
    for row in speeds:
        right.scatter(row["speedup"], row["value"], s=60, label=row["label"])
    right.set(xlabel="tokens/s relative to dense torch FP32", ylabel=metric,
              title=f"{metric} against decoding speed")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
