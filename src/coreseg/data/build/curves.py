"""The plot of one cut: scores with the hardest row first, the fitted law, the knee, and the threshold."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from coreseg.data.build.difficulty import Decision


def save_curve(path: Path, name: str, scores: Float[np.ndarray, " rows"], cut: Decision) -> None:
    """Write it as PNG: what the paper's figure of its filter shows, and the rule in words."""
    from matplotlib.figure import Figure

    curve = np.sort(scores[np.isfinite(scores)])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="rows, the hardest first", ylabel="out-of-fold Dice or ease")
    axes.plot(np.arange(1, len(curve) + 1), curve, ".-", color="tab:blue", markersize=3, linewidth=1, label="score")
    if cut.power_law:
        law = cut.power_law
        label = f"power law: x_min {law.x_min:.3f}, alpha {law.alpha:.2f}"
        axes.plot(np.arange(1, law.tail + 1), law.dice(), "--", color="tab:orange", label=label)
    if cut.knee:
        label = f"knee: row {cut.knee.rank}, Dice {cut.knee.dice:.3f}"
        axes.plot(cut.knee.rank, cut.knee.dice, "D", color="tab:green", label=label)
    if cut.threshold is not None:
        axes.axhline(cut.threshold, color="tab:red", linewidth=1, label=f"threshold: {cut.threshold:.3f}")
        axes.axvspan(0.5, cut.kept.sum() + 0.5, color="tab:red", alpha=0.08)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="lower right", fontsize=8)
    axes.set_title(f"{name}: {cut.kept.sum()} of {len(curve)} kept\n{cut.rule}", fontsize=9)
    figure.savefig(path)
