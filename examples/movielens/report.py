"""Held-out metrics, the final table, the plot and metrics.json."""

from __future__ import annotations

import json
import platform
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import cupy_sparse_adamw

LABELS = {
    "sparse_adamw": "HashTable + SparseAdamW",
    "sparse_adam": "nn.Embedding(sparse=True) + torch SparseAdam",
    "adamw": "nn.Embedding + torch AdamW",
}

NOTES = """optimizer s: the tables' step() and zero_grad(), without the first step's compilation.
peak table MB: weights and both moments, as allocated; a HashTable's index and spare rows included.
"""

# Okabe and Ito's palette, told apart by the color-blind too; markers tell them apart in gray.
STYLES = {
    "sparse_adamw": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "sparse_adam": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "adamw": {"color": "#009E73", "marker": "^", "linestyle": ":"},
}


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of scores [N] for boolean labels [N]; NaN with only one class.

    The Mann-Whitney U statistic from ranks; tied scores share their mean rank.
    """
    _, group, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum(0).double() - (counts.double() - 1) / 2
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    u = mean_rank[group][labels].sum().item() - positives * (positives + 1) / 2
    return float(u / (positives * negatives))


def rmse(predictions: Tensor, ratings: Tensor) -> float:
    """Root mean squared error of predictions [N] for ratings [N]."""
    return float((predictions.double() - ratings.double()).square().mean().sqrt())


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    installed = {
        name: version(name)
        for name in ("torch", "numpy", "numba", "cupy-cuda12x", "cupy-cuda13x")
        if any(distributions(name=name))
    }
    return {
        "python": platform.python_version(),
        "cupy_sparse_adamw": cupy_sparse_adamw.__version__,
        **installed,
    }


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The last epoch of every run, side by side."""
    width = max(map(len, runs))
    lines = [f"{'run':{width}}     AUC    RMSE   optimizer s   peak table MB"]
    for name, run in runs.items():
        lines.append(
            f"{name:{width}}  {run['auc'][-1]:.4f}  {run['rmse'][-1]:.4f}  "
            f"{run['optimizer_seconds']:12.2f}  {run['table_bytes'] / 1e6:14.2f}"
        )
    return "\n".join(lines)


def write(out: Path, runs: dict[str, dict[str, Any]], device: str, data: str) -> None:
    """Write metrics.json and curves.png."""
    metrics = {"runs": runs, "versions": versions(), "device": device}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    plot(out / "curves.png", runs, data)


def plot(path: Path, runs: dict[str, dict[str, Any]], data: str) -> None:
    """Training loss and held-out AUC per epoch."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (
        ("loss", "training loss (mean squared error)"),
        ("auc", "held-out AUC (rating ≥ 4)"),
    )
    for axis, (key, title) in zip(axes, panels, strict=True):
        for order, (name, run) in enumerate(runs.items()):
            epochs = range(1, len(run[key]) + 1)
            axis.plot(epochs, run[key], label=LABELS[name], zorder=5 - order, **STYLES[name])
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"DeepFM on {data}")
    figure.savefig(path, dpi=150)
