"""The command line: parses, then calls one function. Heavy modules are imported inside the commands."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from coreseg.cli_data import data_app
from coreseg.cli_options import (
    CasePatternOption,
    ConfigArgument,
    DeviceOption,
    DtypeOption,
    LicenceOption,
    ModelOption,
    NameOption,
    SetOption,
    clear_errors,
)
from coreseg.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Ask a question about a medical image; get reasoning, boxes and a mask. Research only, not a medical device.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train a model. In a clone, first: pip install '.[train]'.")
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")

PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif"}


def main() -> None:
    """Entry point of the `coreseg` command."""
    app()


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
@clear_errors
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
    call with the same --out. Of a folder, pictures that this command wrote are left out. Values of more than 8 bits
    are stretched to reach from black to white, transparency shows black; either is said.

    Example: coreseg segment examples/fundus.jpg "Where are the retinal exudates?"
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
    from coreseg.metrics import GOOD_DICE

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
    expected, area = record["confidence"], f"{record['mask_area_px']:,} px"
    if expected is not None:
        doubt = f"the model expects little of this mask, a Dice of {expected:.2f}"
        if record["found"]:
            area += f", expected Dice {expected:.2f}"
        else:  # an empty mask's Dice is 1 where nothing is there and 0 where something is
            doubt = f"the model is not sure that nothing is there, its probability is {expected:.2f}"
            area += f", nothing there with probability {expected:.2f}"
        if expected < GOOD_DICE:
            typer.echo(f"warning: {doubt}", err=True)
    typer.echo(f"mask: {record['mask']} ({area}), overlay: {record['overlay']}, {record['seconds']:.1f} s")


def _quiet_transformers() -> None:
    """Loading bars of the library say nothing to a user of the command."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@app.command()
@clear_errors
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
@clear_errors
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
@clear_errors
def fit(
    folder: Annotated[Path, typer.Argument(help="Pictures and masks of any form of `data import`, or a data set.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for data set, runs, figures, model and report.")],
    modality: Annotated[str | None, typer.Option(help="Where the pictures do not tell, such as ultrasound.")] = None,
    anatomy: Annotated[str | None, typer.Option(help="Where the pictures do not tell, such as neck.")] = None,
    category: Annotated[str | None, typer.Option(help="Lesion category, where the pictures do not tell.")] = None,
    case_pattern: CasePatternOption = None,
    form: Annotated[
        str | None, typer.Option("--form", help="folder, coco, nnunet or dicom; default: what lies in FOLDER.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help='TOML or JSON file, label = "category".')] = None,
    name: NameOption = None,
    licence: LicenceOption = None,
    val_share: Annotated[float | None, typer.Option(help="Share of patients held back; default 0.15.")] = None,
    model: ModelOption = "nano",
    minutes: Annotated[float, typer.Option(help="For all of it; on a CPU training counts in processor time.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of split, wording and trainings.")] = 0,
    unet: Annotated[bool, typer.Option("--unet/--no-unet", help="Train a U-Net as long, to compare with.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Import, check, print the plan, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan or report as JSON instead of text.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; default: a GPU if there is one.")] = None,
) -> None:
    """A new category in an hour: fine-tune a model on your own pictures, and measure what that was worth.

    Imports and checks, prints a plan with times, trains stage 1 and stage 2, and evaluates on val beside the model as
    it came, a U-Net trained for equal time, the question-blind prompt and the blind guess. Reasoning is measured on
    the masks. The model is in OUT/model, what it is worth in OUT/report.md. Stopped, the same command goes on.

    Example: coreseg fit my_images --out nodules --modality ultrasound --anatomy neck --category nodule
    """
    from contextlib import redirect_stdout
    from dataclasses import asdict

    from coreseg.fit.plan import prepare, settings_for
    from coreseg.fit.report import markdown
    from coreseg.fit.run import fit as run

    imports = {
        "modality": modality, "anatomy": anatomy, "category": category, "case_pattern": case_pattern, "form": form,
        "labels": labels, "name": name, "licence": licence, "val_share": val_share,
    }  # fmt: skip
    settings = settings_for(
        folder, imports, out=str(out), model=model, minutes=minutes, seed=seed, unet=unet, device=device
    )
    _quiet_transformers()
    progress = sys.stderr.isatty()
    plan = prepare(settings, progress=progress)
    if dry_run or not as_json:
        typer.echo(json.dumps(asdict(plan), indent=1) if as_json else plan.text(settings))
    if dry_run:
        return
    with redirect_stdout(sys.stderr):  # what the trainings say of their steps
        report = run(settings, plan, say=partial(typer.echo, err=True), progress=progress)
    typer.echo(json.dumps(report, ensure_ascii=False, indent=1) if as_json else f"\n{markdown(report)}")


@app.command()
@clear_errors
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
@clear_errors
def merge(
    run: Annotated[Path, typer.Argument(help="Training run's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for the exported checkpoint.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 14MB.")] = "5GB",
    scope: Annotated[
        list[Path] | None,
        typer.Option("--scope", metavar="DATASET", help="Data it was trained on: it then warns of what is unlike it."),
    ] = None,
    confidence: Annotated[
        list[Path] | None,
        typer.Option(
            "--confidence",
            metavar="FIGURES",
            help="What `coreseg evaluate --out` wrote of this model, best on rows it was not trained on: it then tells "
            "how good it expects each mask to be.",
        ),
    ] = None,
) -> None:
    """Export a run's best state as one folder that `--model` and `from_pretrained` open."""
    _quiet_transformers()
    from coreseg.data.store import LesionSet
    from coreseg.evaluate.run import fit_confidence
    from coreseg.model.assemble import export

    fit = None
    if scope:
        from coreseg.train.scope import fit_scope

        fit = partial(fit_scope, sets=[LesionSet.open(path) for path in scope], progress=sys.stderr.isatty())
    export(run, out, dtype, shard_size, fit, fit_confidence(*confidence) if confidence else None)
    typer.echo(f"{out}: written; try: coreseg segment IMAGE QUESTION --model {out}")


@train_app.command("sft")
@clear_errors
def train_sft(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Stage 1: teach a CORE-Seg to describe, to place boxes and to prompt its segmenter.

    Run again with the same settings it goes on where it stopped. A file of settings needs model, data and out; see
    docs/howto/own_data.md for an example and for all of them.
    """
    from coreseg.config import SftConfig, load

    settings = load(SftConfig, config, overrides or [])
    _quiet_transformers()
    from coreseg.train.sft import train_sft as run

    _end_training(run(settings))


@train_app.command("grpo")
@clear_errors
def train_grpo(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Stage 2: sample several answers to each question, and reinforce those whose form, boxes and mask are better.

    Starts from a model that stage 1 has trained. Run again with the same settings it goes on where it stopped. Watch
    it: tensorboard --logdir RUN, and the sampled answers with their masks in RUN/samples. See docs/howto/own_data.md.
    """
    from coreseg.config import GrpoConfig, load

    settings = load(GrpoConfig, config, overrides or [])
    _quiet_transformers()
    from coreseg.train.grpo import train_grpo as run

    _end_training(run(settings))


def _end_training(run: Path) -> None:
    """Tell where the model is; of several processes the first does, and each ends here, everything being saved."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f'{run}: trained; try: coreseg segment IMAGE "QUESTION" --model {run}')
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        # PyTorch's DDP leaves threads of its process group, and one that frees a tensor while Python ends aborts it.
        os._exit(0)
