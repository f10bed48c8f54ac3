"""Is what a filter kept harder for a model that had no part in choosing?

    coreseg data filter LESIONS --out hard
    coreseg data filter LESIONS --out judge --network plain --folds 4 --seed 1
    python recipes/filter/harder.py LESIONS hard/scores.jsonl judge/scores.jsonl

Prints the second run's mean Dice (%) on the rows that the first kept and dropped, with 95 % intervals over cases:
pooled, and as the mean over the sources that have both, where a source's own level cannot make the difference. Below,
source by source, with the rank correlation of the two scores. The first run may be one with --proxy.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from coreseg.data.build.scores import read_scores
from coreseg.data.store import LesionSet
from coreseg.metrics import macro_bootstrap_interval, macro_mean


def figure(values: list[float], cases: list[str], sets: list[str]) -> str:
    """Mean over sets, interval and count."""
    interval = macro_bootstrap_interval(values, cases, sets)
    mean = macro_mean(values, sets)
    return f"{100 * mean:5.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}] ({len(values)} rows)"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("chosen_by", type=Path, help="scores.jsonl of the filter in question")
    parser.add_argument("judged_by", type=Path, help="scores.jsonl of a run with another network, folds and seed")
    options = parser.parse_args()
    case_of = {(row.file_name, row.category): row.case for row in LesionSet.open(options.dataset).samples}
    judged = {(score.file_name, score.category): score.dice for score in read_scores(options.judged_by)}
    rows = [score for score in read_scores(options.chosen_by) if score.group]
    sides = {side: [score for score in rows if score.kept == (side == "kept")] for side in ("kept", "dropped")}
    both = {score.source for score in sides["kept"]} & {score.source for score in sides["dropped"]}
    for side, scores in sides.items():
        for name, of_set in (("pooled", lambda score: ""), ("macro", lambda score: score.source)):
            taken = [score for score in scores if name == "pooled" or score.source in both]
            keys = [(score.file_name, score.category) for score in taken]
            values, sets = [judged[key] for key in keys], [of_set(score) for score in taken]
            print(f"{side:8s}{name:8s}", figure(values, [case_of[key] for key in keys], sets))
    for source in sorted({score.source for score in rows}):
        of_source = [score for score in rows if score.source == source]
        pairs = np.array([(score.value, judged[score.file_name, score.category]) for score in of_source])
        kept = np.array([score.kept for score in of_source])
        means = [f"{100 * pairs[side, 1].mean():5.1f}" if side.any() else "    -" for side in (kept, ~kept)]
        rank = f"{spearmanr(*pairs.T).statistic:5.2f}" if len(pairs) > 2 else "    -"
        print(f"{source:24s} kept {kept.sum():4d} of {len(kept):4d}: {means[0]}, dropped {means[1]}, rank {rank}")
