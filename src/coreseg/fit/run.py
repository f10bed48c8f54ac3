"""A whole fit, step by step: train, evaluate, choose, export, report.

    OUT/fit.toml        the settings
    OUT/set/            the data set, where raw pictures were given; what the import left out is in OUT/import.log
    OUT/plan.json       what was measured before training, and how the minutes are shared
    OUT/sft/, OUT/grpo/ runs of the two stages
    OUT/unet/           the U-Net that is trained beside them for as much processor time
    OUT/figures/        the answers of the model as it came and after each stage, baselines inside
    OUT/model/          the fitted model, for `--model`
    OUT/overlays.png    its answers on rows of val
    OUT/report.md, .json

`coreseg.fit.plan.prepare` makes what comes before sft/, `fit` the rest. Each step leaves its folder when it is
finished, and the trainings go on from checkpoints of their own: a fit that was killed goes on where it stood.

Source: the paper's two stages. Our choice: everything else.
"""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coreseg import __version__
from coreseg.data.store import LesionSet, evenly, write_text
from coreseg.errors import DataError
from coreseg.fit.plan import STAGE_SHARES, STAGES, FitConfig, Plan, in_words, one_thread, stage_settings
from coreseg.fit.report import FIGURES, build_report, choose, markdown, minutes_answering

if TYPE_CHECKING:
    from coreseg.model.core_seg import CoreSeg
    from coreseg.model.processor import CoreSegProcessor

REPORT = "report.json"
SHOWN_ROWS = 12


def fit(config: FitConfig, plan: Plan, *, say: Callable[[str], None], progress: bool = True) -> dict[str, Any]:
    """Train, evaluate, choose, export and report what is not yet; the report, which is also on disk when this returns.

    `plan` is what `prepare` gave for these settings; `say` is told what begins. The fitted model is stage 2's, unless
    stage 1's is better on val (`coreseg.fit.report.choose`). Raises what the trainings raise; what is finished stays.
    """
    out = Path(config.out)
    if (out / REPORT).exists():
        told: dict[str, Any] = json.loads((out / REPORT).read_text(encoding="utf-8"))
        return told
    from coreseg.train.grpo import train_grpo
    from coreseg.train.sft import train_sft

    one_thread(plan.reasoner, plan.device)
    lesions = LesionSet.open(config.set_folder)
    first, second = stage_settings(config, plan)
    if not (out / "sft" / "best").exists():
        say(f"stage 1, SFT: {in_words(first.cpu_minutes)}")
        train_sft(first)
    if not (out / "grpo" / "best").exists():
        say(f"stage 2, GRPO: {in_words(second.cpu_minutes)}")
        train_grpo(second)
    if config.unet and not (out / "unet" / "config.json").exists():
        say(f"U-Net: {in_words(plan.minutes['unet'])}")
        _train_unet(config, plan, lesions, progress)
    say(f"evaluations: {in_words(plan.minutes['evaluation'])}")
    _evaluate(config, lesions, progress)
    choice = choose(out / FIGURES)
    if not (out / "model").exists():
        _export(out, choice.stage, plan, lesions, progress)
    _draw(out, config.device, lesions)
    report = {
        "coreseg": __version__,
        "command": config.command,
        "seed": config.seed,
        "rows": plan.rows,
        "settings": asdict(config),
        "plan": asdict(plan),
        "minutes": _minutes(out, plan),
        **build_report(out / FIGURES, choice, lesions, config.model, plan.notes),
        "next": _next(config, lesions),
    }
    write_text(out / "report.md", markdown(report))
    write_text(out / REPORT, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    return report


def _train_unet(config: FitConfig, plan: Plan, lesions: LesionSet, progress: bool) -> None:
    import torch

    from coreseg.train.baselines import build_unet, categories_of, even_draws, train_and_save
    from coreseg.train.loop import Budget

    torch.manual_seed(config.seed)
    rows = lesions.split("train")
    pretrained = plan.network == "pretrained"
    model, groups = build_unet(categories_of(rows), plan.unet_side_px, pretrained=pretrained)
    model.to(plan.device)
    minutes = plan.minutes["unet"]
    train_and_save(
        model,
        groups,
        [(lesions, sample) for sample in rows],
        even_draws(rows),
        Budget(minutes=minutes),
        Path(config.out) / "unet",
        {"cpu_minutes": minutes, "seed": config.seed},
        seed=config.seed,
        progress=progress,
    )


def _evaluate(config: FitConfig, lesions: LesionSet, progress: bool) -> None:
    """The model as it came and after each stage, each with its question-blind prompt and the blind guess beside it."""
    from coreseg.evaluate.predictors import ModelPredictor, QuestionBlind
    from coreseg.evaluate.report import evaluate_and_report
    from coreseg.evaluate.run import Predictor
    from coreseg.evaluate.trained import open_baseline

    out = Path(config.out)
    for stage in STAGES:
        model = config.model if stage == "start" else str(out / stage)
        predictor = ModelPredictor.load(model, config.device, None, constrained=True)
        beside: list[Predictor] = [QuestionBlind(predictor.segmenter, predictor.settings)]
        if config.unet and stage == STAGES[-1]:
            beside.append(open_baseline(out / "unet").to(predictor.segmenter.model.device))
        evaluate_and_report(lesions, predictor, out=out / FIGURES / stage, baselines=beside, progress=progress)


def _export(out: Path, stage: str, plan: Plan, lesions: LesionSet, progress: bool) -> None:
    """The stage's model as one folder; where the set is too small for a scope, without one."""
    from coreseg.model.assemble import export
    from coreseg.train.scope import fit_scope

    def scope(model: "CoreSeg", processor: "CoreSegProcessor") -> Any:
        return fit_scope(model, processor, [lesions], progress=progress)

    # A small model is kept as it was measured; a large one would take twice the room.
    write = partial(export, out / stage, out / "model.part", "float32" if plan.small else "bfloat16")
    shutil.rmtree(out / "model.part", ignore_errors=True)
    try:
        write(fit=scope)
    except DataError:
        write()
    (out / "model.part").rename(out / "model")


def _draw(out: Path, device: str | None, lesions: LesionSet) -> None:
    """Some rows of val as the exported model outlines them, their references beside."""
    from coreseg.imaging import overlay
    from coreseg.segmenter import Segmenter
    from coreseg.train.trainer import sheet

    segmenter = Segmenter.from_pretrained(out / "model", device)
    panels = []
    for sample in evenly(lesions.split("val"), SHOWN_ROWS):
        result = segmenter.segment(lesions.image(sample), sample.query)
        panels.append(overlay(result.image, result.mask, result.boxes, reference=lesions.mask(sample)))
    sheet(panels).save(out / "overlays.png")


def _minutes(out: Path, plan: Plan) -> dict[str, dict[str, float]]:
    """Planned and spent minutes by part, and the steps that a training took."""
    from coreseg.train.trainer import spent

    took: dict[str, dict[str, float]] = {"import and check": {"spent": plan.prepared_s / 60}}
    for stage in STAGE_SHARES:
        steps, minutes = spent(out / stage)
        took[stage] = {"planned": plan.minutes[stage], "spent": minutes, "steps": steps}
    if (log := out / "unet" / "log.jsonl").exists():
        last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        took["unet"] = {"planned": plan.minutes["unet"], "spent": last["cpu_minutes"], "steps": last["step"]}
    answering = minutes_answering(out / FIGURES)
    took["evaluations"] = {"planned": plan.minutes["evaluation"], "spent": answering}
    return took


def _next(config: FitConfig, lesions: LesionSet) -> list[str]:
    """Commands to go on with."""
    asked = [sample.category for sample in lesions.split("train") if sample.boxes]
    out = Path(config.out)
    model = shlex.quote(str(out / "model"))
    question = f"Where is the {max(sorted(set(asked)), key=asked.count)}?"
    commands = [
        f'coreseg segment IMAGE "{question}" --model {model}',
        shlex.join(["coreseg", "compare", *(str(out / FIGURES / stage) for stage in (STAGES[0], STAGES[-1]))]),
    ]
    if lesions.split("test"):
        commands.append(f"coreseg evaluate {shlex.quote(str(config.set_folder))} --split test --model {model}")
    return commands
