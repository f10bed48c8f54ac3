"""Settings of a fit, and everything before its trainings: import, check, measure, and share out the minutes.

Our choice throughout.
"""

import json
import math
import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coreseg import config as settings_files
from coreseg.config import GrpoConfig, SftConfig, require
from coreseg.data.build.scores import network_here, rows_digest
from coreseg.data.check import check_set
from coreseg.data.sources import ImportSettings, recognise
from coreseg.data.store import METADATA, LesionSet, require_empty, write_text
from coreseg.errors import ConfigError, DataError

SETTINGS, PLAN, IMPORT_LOG = "fit.toml", "plan.json", "import.log"
STAGES = ("start", "sft", "grpo")
"""What is measured: the model as it came, after stage 1, after stage 2."""
STAGE_SHARES = {"sft": 3, "grpo": 2}
"""How the minutes of training are shared; the U-Net gets as much as both."""
SMALL_REASONER = 100_000_000
"""Parameters under which a reasoner trains as a whole; above, LoRA does."""
KEPT_BYTES = 1_000_000_000
MOST_VERSIONS = 16
UNET_SIDE_PX = 256
TIME_DECIDES = 100_000
"""Steps that no run of minutes reaches."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of a fit.

    out: folder of the fit.                              data: the data set, used as it is, or
    import_: a table [import] with the options of `coreseg data import`, see `ImportSettings`: start from raw pictures.
    model: what is fine-tuned: "nano", a checkpoint or run folder, or a hub name.
    minutes: for all of it; trainings are counted in processor time, on a GPU in the time that passes.
    seed: of import and trainings.
    unet: whether a U-Net is trained for comparison.
    device: "cpu" or "cuda"; by default the GPU where there is one.
    """

    out: str
    data: str | None = None
    import_: ImportSettings | None = None
    model: str = "nano"
    minutes: float = 60.0
    seed: int = 0
    unet: bool = True
    device: str | None = None

    def __post_init__(self) -> None:
        require(0 < self.minutes < math.inf, "minutes", self.minutes, "a number above 0")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        devices = "cpu or cuda; to choose among several GPUs, set CUDA_VISIBLE_DEVICES"
        require(self.device in (None, "cpu", "cuda"), "device", self.device, devices)
        one = (self.data is None) != (self.import_ is None)
        require(one, "data", self.data, "a data set to train on, or a table [import], and not both")

    @property
    def set_folder(self) -> Path:
        """The data set, even if not yet imported."""
        return Path(self.data) if self.data is not None else Path(self.out) / "set"

    @property
    def command(self) -> str:
        """The call of `coreseg fit` that has these settings."""
        usual = FitConfig(out="", data="")
        given = {name: getattr(self, name) for name in ("model", "minutes", "seed", "device")}
        given = {name: value for name, value in given.items() if value != getattr(usual, name)}
        folder = self.data
        if self.import_:
            of_import, unset = asdict(self.import_), asdict(ImportSettings(source="", seed=self.seed))
            folder = of_import.pop("source")
            given = {name: value for name, value in of_import.items() if value != unset[name]} | given
        options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        words = ["coreseg", "fit", str(folder), "--out", self.out, *options]
        return shlex.join(words if self.unet else [*words, "--no-unet"])


def settings_for(folder: Path, imports: Mapping[str, Any], **others: Any) -> FitConfig:
    """The settings for a folder of raw pictures with these import options (None: not given), or for a data set.

    Raises ConfigError where import options were given with a data set.
    """
    given = {name: value for name, value in imports.items() if value is not None}
    if not (folder / METADATA).is_file():
        imported = ImportSettings(source=str(folder), seed=max(others["seed"], 0), **given)
        return FitConfig(import_=imported, **others)
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{folder} is a data set already and is used as it is; leave out {options}")
    return FitConfig(data=str(folder), **others)


@dataclass(frozen=True)
class Plan:
    """What was measured before training, and the minutes that follow from it.

    rows: a digest of the data set's rows.                  train, val: rows of these splits.
    device: "cpu" or "cuda".                                reasoner, parameters: parameters of the reasoner, of all.
    question_s: one question on one picture took so long.   prepared_s: import and check took so long.
    versions: see `StageConfig`.                            unet_side_px, network: of the U-Net.
    minutes: of "sft", "grpo", "unet" (0 where there is none) and "evaluation".
    notes: what a reader should know of the data.
    """

    rows: str
    train: int
    val: int
    device: str
    reasoner: int
    parameters: int
    question_s: float
    prepared_s: float
    versions: int
    unet_side_px: int
    network: str
    minutes: dict[str, float]
    notes: tuple[str, ...]

    @property
    def small(self) -> bool:
        """Whether the reasoner trains as a whole."""
        return self.reasoner < SMALL_REASONER

    def text(self, config: FitConfig) -> str:
        """The plan for a reader, a line for each part."""
        of = f"{config.model}, {self.parameters / 1e6:.1f} M parameters, on {self.device}"
        answers = f"{len(STAGES)} x {self.val} questions of {self.question_s:.2f} s"
        unet = f"{self.network}, {self.unet_side_px} px, as long as both stages"
        times = [
            ("import and check", self.prepared_s / 60, "done"),
            ("stage 1, SFT", self.minutes["sft"], "the whole reasoner" if self.small else "LoRA"),
            ("stage 2, GRPO", self.minutes["grpo"], ""),
            *([("U-Net", self.minutes["unet"], unet)] if config.unet else []),
            ("evaluations", self.minutes["evaluation"], answers),
            ("in all", self.prepared_s / 60 + sum(self.minutes.values()), ""),
        ]
        lines = [
            f"{config.set_folder}: {self.train} rows to train on, {self.val} to measure on ({of})",
            *(f"  {name:<18}{in_words(minutes):>9}  {more}".rstrip() for name, minutes, more in times),
            "Trainings are limited by processor time: on a busy machine they take longer by the clock. Stopped, the "
            "same command goes on.",
        ]
        if sum(self.minutes.values()) > 1.01 * config.minutes:
            lines.append("The evaluations alone take more than half of --minutes, and are not cut short.")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def in_words(minutes: float) -> str:
    """A time for a reader."""
    return f"{minutes:.1f} min" if minutes >= 1 else f"{60 * minutes:.1f} s"


def share_minutes(minutes: float, evaluation: float, unet: bool) -> dict[str, float]:
    """The minutes of each part. What the evaluations need is taken off first, but never more than half."""
    left = minutes - min(evaluation, minutes / 2)
    parts = {**STAGE_SHARES, "unet": sum(STAGE_SHARES.values()) if unet else 0}
    shared = {name: left * part / sum(parts.values()) for name, part in parts.items()}
    return {**shared, "evaluation": evaluation}


def prepare(config: FitConfig, *, progress: bool = True) -> Plan:
    """Import and check what is not yet, measure, and make the plan; once training has begun it stays as it was.

    Until then other settings may follow, and an import with other options is made again. Raises MissingExtraError
    where a package is missing, ConfigError where `out` belongs to a fit with other settings, DataError where the rows
    cannot be trained or measured on (no train or val row with a lesion, patients in several splits, broken rows, other
    rows than before) and what the import raises, ModelError for a model that cannot be loaded.
    """
    out, folder = Path(config.out), config.set_folder
    if config.data is not None:
        LesionSet.open(folder)
    elif config.import_ and not config.import_.form and not folder.exists():
        recognise(Path(config.import_.source))
    from coreseg.model.assemble import find_checkpoint
    from coreseg.train.trainer import require_packages

    require_packages()
    find_checkpoint(config.model)
    stale = _claim(config)
    started = time.monotonic()
    if config.import_ and not folder.exists():
        report = config.import_.run(folder, progress=progress)
        write_text(out / IMPORT_LOG, "".join(f"{line}\n" for line in (*report.made(), *report.to_mind())))
    lesions = LesionSet.open(folder)
    if _has_begun(out):
        plan = _read_plan(out)
        if plan.rows != rows_digest(lesions):
            raise DataError(f"{folder} has other rows than the fit in {out} began with; give another --out")
        return plan
    again = ["imported again, since its options have changed"] if stale else []
    notes = [*again, *_import_notes(out), *_checked(lesions, progress)]
    plan = _measured(config, lesions, tuple(notes), time.monotonic() - started)
    write_text(out / PLAN, json.dumps(asdict(plan), indent=1) + "\n")
    return plan


def _has_begun(out: Path) -> bool:
    return (out / "sft" / "settings.toml").exists()


def _read_plan(out: Path) -> Plan:
    try:
        told = json.loads((out / PLAN).read_text(encoding="utf-8"))
        return Plan(**{**told, "notes": tuple(told["notes"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{out / PLAN}: cannot be read ({error}); give another --out, or delete that folder") from error


def _claim(config: FitConfig) -> bool:
    """Make `out` this fit's own. True where an earlier import is out of date and was deleted."""
    out = Path(config.out)
    file, stale = out / SETTINGS, False
    if not file.exists():
        require_empty(out)
        out.mkdir(parents=True, exist_ok=True)
    elif differ := settings_files.changed(settings_files.load(FitConfig, file), config):
        if _has_begun(out):
            raise ConfigError(
                f"{out} holds a fit with other settings ({', '.join(differ)} changed); give another --out, or delete "
                "that folder"
            )
        stale = "import" in differ and (out / "set").exists()
        if stale:
            shutil.rmtree(out / "set")
    settings_files.save(config, file)
    return stale


def _import_notes(out: Path) -> list[str]:
    log = out / IMPORT_LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    left_out = [line for line in lines if line.startswith(("set aside: ", "no mask for ", "no image for "))]
    return [f"{len(left_out)} files were not used: {log} says why"] if left_out else []


def _checked(lesions: LesionSet, progress: bool) -> list[str]:
    """What to tell of the data; refuses what cannot be trained or measured on."""
    root = lesions.root
    for split, what in (("train", "learned from"), ("val", "measured on")):
        rows = lesions.split(split)
        if any(sample.boxes for sample in rows):
            continue
        there = f"{len(rows)} rows in {split!r}, none of them with a lesion" if rows else f"no rows in {split!r}"
        mend = "import with another --val-share, such as 0.3" if split == "val" else "import with a smaller --val-share"
        raise DataError(
            f"{root}: {there}, so nothing can be {what}. Give pictures of more patients, {mend}, or set `split` to "
            f"{split} in metadata.jsonl for some patients with a lesion."
        )
    report = check_set(lesions, progress=progress)
    if report.case_leaks:
        cases = ", ".join(leak.case for leak in report.case_leaks[:5])
        raise DataError(
            f"{root}: {len(report.case_leaks)} patients are in several splits ({cases}), so figures on val would be "
            "too good. Give each patient one split in metadata.jsonl, or let the import draw them."
        )
    if report.problems:
        raise DataError(
            f"{root}: {len(report.problems)} rows or files have faults, the first: {report.problems[0]} "
            f"All of them: coreseg data check --all {root}"
        )
    notes = []
    if report.lookalikes:
        pair = report.lookalikes[0]
        notes.append(
            f"{len(report.lookalikes)} pairs of pictures in different splits look alike, such as {pair.first} and "
            f"{pair.second}: figures on val may be too good"
        )
    if report.unknown_case:
        notes.append(
            f"{report.unknown_case} rows name no patient: pictures of one may be trained on and measured on, and "
            "figures on val too good"
        )
    if report.burned_in:
        notes.append(f"{len(report.burned_in)} pictures seem to have text in them, perhaps a name or a date")
    return notes


def _measured(config: FitConfig, lesions: LesionSet, notes: tuple[str, ...], prepared_s: float) -> Plan:
    """The plan, from one question on one picture of val."""
    import torch

    from coreseg.evaluate.predictors import ModelPredictor
    from coreseg.sam2 import encode_image
    from coreseg.train.trainer import training_arguments

    predictor = ModelPredictor.load(config.model, config.device, None, constrained=True)
    segmenter, model = predictor.segmenter, predictor.segmenter.model
    reasoner, parameters = (sum(each.numel() for each in part.parameters()) for part in (model.reasoner, model))
    device = model.device.type
    one_thread(reasoner, device)
    train, val = lesions.split("train"), lesions.split("val")
    image = lesions.image(val[0])
    pixels = segmenter.processor.segmenter_pixels(image).to(model.device, model.dtype)
    with torch.no_grad():
        picture_bytes = 2 * sum(level.numel() for level in encode_image(model.segmenter, pixels))
    question_s = math.inf
    for _ in range(2):  # the first call is slow for reasons of its own
        started = time.perf_counter()
        predictor.predict([val[0]], [image], [val[0].query])
        question_s = min(question_s, time.perf_counter() - started)
    # Every picture is changed at random in so many ways as fit into memory with their maps, which are costly to make
    # again at each draw; where hardly any fit, each draw makes a new one.
    fit = KEPT_BYTES // (picture_bytes * len({sample.file_name for sample in train}))
    evaluation = len(STAGES) * len(val) * question_s / 60
    plan = Plan(
        rows=rows_digest(lesions),
        train=len(train),
        val=len(val),
        device=device,
        reasoner=reasoner,
        parameters=parameters,
        question_s=question_s,
        prepared_s=prepared_s,
        versions=min(fit, MOST_VERSIONS) if fit >= 2 else 0,
        unet_side_px=min(UNET_SIDE_PX, model.config.segmenter_size_px // 32 * 32),
        network=network_here("auto"),
        minutes=share_minutes(config.minutes, evaluation, config.unet),
        notes=notes,
    )
    training_arguments(stage_settings(config, plan)[0])
    return plan


def one_thread(reasoner: int, device: str) -> None:
    """A second thread costs a small model more processor time than it saves, and the trainings are limited by that."""
    if reasoner < SMALL_REASONER and device == "cpu":
        import torch

        torch.set_num_threads(1)


def stage_settings(config: FitConfig, plan: Plan) -> tuple[SftConfig, GrpoConfig]:
    """The settings of the two stages, by the size of the model and where it trains.

    Our choice: for small reasoners those of nano's recipe as far as they suit a model that has learned already, for
    large ones those of `recipes/paper` (untested at that size). Nothing is chosen on val: the last state counts.
    """
    out, on_gpu = Path(config.out), plan.device != "cpu"
    shared: dict[str, Any] = {
        "data": (str(config.set_folder),), "steps": TIME_DECIDES, "remeasure": True, "versions": plan.versions,
        "keep_maps": plan.versions > 0, "eval_samples": 0, "warmup_steps": 20, "seed": config.seed,
        "use_cpu": config.device == "cpu",
    }  # fmt: skip
    sft: dict[str, Any] = {"lora_rank": 0, "batch_size": 8, "learning_rate": 2e-4, "save_every": 50}
    grpo: dict[str, Any] = {
        "lora_rank": 0, "batch_size": 32, "learning_rate": 1e-4, "head_learning_rate": 2e-4, "weight_decay": 0.0,
        "save_every": 20,
    }  # fmt: skip
    if not plan.small:
        shared |= {
            "lora_rank": 32, "lora_alpha": 64, "precision": "bf16" if on_gpu else "fp32", "workers": 4 if on_gpu else 0,
            "gradient_checkpointing": True,
        }  # fmt: skip
        sft = {"batch_size": 2, "accumulation": 8, "learning_rate": 1e-4}
        grpo = {"batch_size": 4, "accumulation": 8, "save_every": 50}
    first = SftConfig(model=config.model, out=str(out / "sft"), cpu_minutes=plan.minutes["sft"], **{**shared, **sft})
    second = GrpoConfig(model=first.out, out=str(out / "grpo"), cpu_minutes=plan.minutes["grpo"], **{**shared, **grpo})
    return first, second
