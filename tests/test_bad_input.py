"""One table of what users give: the right result in the upright picture's own pixels, or one clear error."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from command import complaint, run
from PIL import ExifTags, Image

from coreseg.testing import write_phantom_set

QUESTION = "Where is the tumor?"
SQUARE = (6, 4, 16, 14)
"""Where the pictures below are bright, once upright."""


def grey(bright: int = 250, dark: int = 50) -> np.ndarray:
    """40x30 px with the bright square."""
    values = np.full((30, 40), dark, np.uint16)
    x1, y1, x2, y2 = SQUARE
    values[y1:y2, x1:x2] = bright
    return values


def plain() -> Image.Image:
    return Image.fromarray(grey().astype(np.uint8))


def truncated(path: Path) -> None:
    plain().resize((400, 300)).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def palette(path: Path) -> None:
    image = Image.fromarray((grey() > 200).astype(np.uint8), mode="P")
    image.putpalette([20, 20, 20, 250, 240, 230])
    image.save(path)


def alpha(path: Path) -> None:
    image = plain().convert("RGBA")
    # What is transparent must not count, however bright it is.
    image.paste((255, 255, 255, 0), (20, 20, 40, 30))
    image.save(path)


def exif_rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # shown by turning it clockwise, so it is stored turned the other way
    plain().transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def animated(path: Path) -> None:
    frames = [Image.fromarray(np.full((30, 40), value, np.uint8)) for value in (0, 120, 250)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def huge(path: Path) -> None:
    image = Image.new("L", (12_000, 9_000), 50)
    image.paste(250, SQUARE)
    image.save(path)


Make = Callable[[Path], object]
GOOD: dict[str, tuple[str, Make, tuple[int, int]]] = {
    "8-bit grey": ("a.png", lambda path: plain().save(path), (40, 30)),
    "16-bit": ("a.png", lambda path: Image.fromarray(grey(60_000, 2_000)).save(path), (40, 30)),
    "16-bit TIFF": ("a.tif", lambda path: Image.fromarray(grey(60_000, 2_000)).save(path), (40, 30)),
    "one bit": ("a.png", lambda path: plain().point(lambda v: 255 * (v > 200)).convert("1").save(path), (40, 30)),
    "CMYK": ("a.tif", lambda path: plain().convert("RGB").convert("CMYK").save(path), (40, 30)),
    "palette": ("a.png", palette, (40, 30)),
    "alpha": ("a.png", alpha, (40, 30)),
    "EXIF-rotated": ("a.png", exif_rotated, (40, 30)),
    "a name with spaces and dots": ("my scan.v2 ü.png", lambda path: plain().save(path), (40, 30)),
}
BAD: dict[str, tuple[str, Make, str]] = {
    "truncated": ("a.png", truncated, "cut off or damaged"),
    "truncated JPEG": ("a.jpg", truncated, "cut off or damaged"),
    "zero bytes": ("a.png", lambda path: path.write_bytes(b""), "empty (0 bytes)"),
    "text": ("a.png", lambda path: path.write_text("not a picture"), "not an image"),
    "1x1": ("a.png", lambda path: Image.new("L", (1, 1)).save(path), "1x1 px, expected at least 8 px a side"),
    "animated GIF": ("a.gif", animated, "3 frames"),
    "several pages": ("a.tif", animated, "3 frames"),
    "not there": ("a.png", lambda path: None, "no such file"),
    "too large": ("a.png", lambda path: Image.new("1", (20_000, 10_001)).save(path), "at most 200 million pixels"),
}


def assert_one_error(done: Result, message: str) -> None:
    error = complaint(done)
    assert done.stdout == "" and len(error) < 500, error
    assert message in error


def assert_found(path: Path, out: Path, size_wh: tuple[int, int]) -> None:
    done = run("segment", path, QUESTION, "--out", out)
    assert (done.exit_code, done.stderr) == (0, "")
    with Image.open(out / f"{path.stem}.mask.png") as mask, Image.open(out / f"{path.stem}.overlay.png") as overlay:
        assert mask.size == overlay.size == size_wh
        assert mask.getbbox() == SQUARE
    record = json.loads((out / f"{path.stem}.json").read_text(encoding="utf-8"))
    assert record["boxes"] == [list(SQUARE)]
    assert (record["width"], record["height"], record["mask_area_px"]) == (*size_wh, 100)


@pytest.mark.parametrize(("name", "make", "size_wh"), GOOD.values(), ids=GOOD)
def test_the_right_result(
    bright_segmenter: Any, tmp_path: Path, name: str, make: Make, size_wh: tuple[int, int]
) -> None:
    make(tmp_path / name)
    assert_found(tmp_path / name, tmp_path / "out", size_wh)


@pytest.mark.slow
def test_a_huge_picture(bright_segmenter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # only for the test's own look at the results
    huge(tmp_path / "a.png")
    assert_found(tmp_path / "a.png", tmp_path / "out", (12_000, 9_000))


@pytest.mark.parametrize(("name", "make", "message"), BAD.values(), ids=BAD)
def test_one_clear_error(bright_segmenter: Any, tmp_path: Path, name: str, make: Make, message: str) -> None:
    make(tmp_path / name)
    assert_one_error(run("segment", tmp_path / name, QUESTION, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists(), "nothing is left of a run that failed"


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "the question is empty"),
        (" \n ", "the question is empty"),
        ("Where is it? " * 800, "10,400 characters; expected at most 2,000"),
    ],
    ids=["empty", "blank", "10,000 characters"],
)
def test_questions(bright_segmenter: Any, tmp_path: Path, question: str, message: str) -> None:
    plain().save(tmp_path / "a.png")
    assert_one_error(run("segment", tmp_path / "a.png", question, "--out", tmp_path / "out"), message)
    assert bright_segmenter.loaded == [], "told before a model is loaded"


@pytest.mark.parametrize("model", ["nosuch", "./nosuch", ".", "a/b/c"])
def test_an_unknown_model(tmp_path: Path, model: str) -> None:
    plain().save(tmp_path / "a.png")
    assert_one_error(run("segment", tmp_path / "a.png", QUESTION, "--model", model), model)


def test_a_checkpoint_of_another_kind(tmp_path: Path) -> None:
    plain().save(tmp_path / "a.png")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert_one_error(run("segment", tmp_path / "a.png", QUESTION, "--model", tmp_path), "holds a 'bert'")
    (tmp_path / "config.json").write_text("{")
    assert_one_error(run("segment", tmp_path / "a.png", QUESTION, "--model", tmp_path), "not valid JSON")


@pytest.fixture
def misfit(tmp_path: Path) -> Path:
    """A data set in which one mask has another size than its picture."""
    root = write_phantom_set(tmp_path / "set", count=8, seed=0, size_wh=(48, 40), negatives=0.0, val_share=0.5)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["split"] == "val")
    Image.new("L", (40, 48)).save(root / row["mask_file_name"])
    return root


def test_a_mask_of_another_size_stops_an_evaluation(misfit: Path) -> None:
    assert_one_error(run("evaluate", misfit, "--model", "blind"), "the mask is 40x48 px, its image")


def test_a_mask_of_another_size_is_found_by_the_check(misfit: Path) -> None:
    done = run("data", "check", misfit)
    assert done.exit_code == 1
    assert "the mask is 40x48 px, its image" in done.stdout


FACTS = ("--modality", "ct", "--anatomy", "lung", "--category", "nodule")


def folder(root: Path, mask: Callable[[Path], object] | None = None, image: Make | None = None) -> Path:
    """A source for the importer, one picture and its mask in folders."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    (image or GOOD["8-bit grey"][1])(root / "images" / "läsion 1.png")
    (mask or (lambda path: Image.fromarray((grey() > 200).astype(np.uint8) * 255).save(path)))(
        root / "masks" / "läsion 1.png"
    )
    return root


def labels(path: Path, values: tuple[int, ...], mode: str = "L", **save: Any) -> None:
    """A mask of one area a value, each of the size that labels have."""
    drawn = np.zeros((30, 40), np.uint8)
    for number, value in enumerate(values):
        drawn[4:26, 2 + 12 * number : 12 + 12 * number] = value
    image = Image.fromarray(drawn, mode="P" if mode == "P" else "L")
    if mode == "P":
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    image.save(path, **save)


def nifti(root: Path, told: dict[str, Any] | None = None, damaged: bool = False) -> Path:
    """The same as nnU-Net raw: one volume and its labels."""
    nibabel = pytest.importorskip("nibabel")
    for part, name in (("imagesTr", "fälle_0000.nii.gz"), ("labelsTr", "fälle.nii.gz")):
        (root / part).mkdir(parents=True)
        values = np.zeros((16, 16, 4), np.int16)
        values[4:10, 4:10, 1:3] = 1 if part == "labelsTr" else -400
        nibabel.save(nibabel.Nifti1Image(values, np.diag((1.0, 1.0, 1.0, 1.0))), root / part / name)
        if damaged:
            (root / part / name).write_bytes((root / part / name).read_bytes()[:40])
    whole = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(whole if told is None else told), encoding="utf-8")
    return root


def coco(root: Path, file_name: str) -> Path:
    """The same as COCO; the picture is always called läsion 1.png."""
    root.mkdir()
    plain().save(root / "läsion 1.png")
    box = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[6, 4, 16, 4, 16, 14, 6, 14]]}
    told = {"images": [{"id": 1, "file_name": file_name, "width": 40, "height": 30}], "annotations": [box]}
    text = json.dumps({**told, "categories": [{"id": 1, "name": "nodule"}]}, ensure_ascii=False)
    (root / "annotations.json").write_text(text, encoding="utf-8")
    return root


def emptied(root: Path, part: str) -> Path:
    for path in (root / part).iterdir():
        path.unlink()
    return root


BAD_SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "mask without image": (lambda at: emptied(folder(at), "images"), "no image has a mask (0 images, 1 masks"),
    "image without mask": (lambda at: emptied(folder(at), "masks"), "no image has a mask (1 images, 0 masks"),
    "another size": (lambda at: folder(at, lambda path: Image.new("L", (41, 30), 9).save(path)), "mask is 41x30 px"),
    "labels": (lambda at: folder(at, lambda path: labels(path, (1, 2))), "2 values besides black (1, 2), expected one"),
    "palette": (lambda at: folder(at, lambda path: labels(path, (1, 2), "P")), "several colours"),
    "JPEG of labels": (lambda at: folder(at, lambda path: labels(path, (85, 170, 255), format="JPEG")), "grey areas"),
    "JPEG of 0 and 1": (lambda at: folder(at, lambda path: labels(path, (1,), format="JPEG")), "brighter than 1"),
    "truncated mask": (lambda at: folder(at, truncated), "cut off or damaged"),
    "truncated picture": (lambda at: folder(at, image=truncated), "cut off or damaged"),
    "damaged NIfTI": (lambda at: nifti(at, damaged=True), "fälle_0000.nii.gz is damaged"),
    "no labels in dataset.json": (lambda at: nifti(at, {"channel_names": {"0": "CT"}}), "the key labels is missing"),
    "empty dataset.json": (lambda at: nifti(at, {}), "the key channel_names"),
    "COCO without picture": (lambda at: coco(at, "gone.png"), "'gone.png', which is not in"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_a_source_that_cannot_be_imported(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    source = make(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    facts = FACTS[:4] if (source / "dataset.json").exists() else FACTS
    assert_one_error(run("data", "import", source, "--out", tmp_path / "new" / "out", *facts), message)
    assert sorted(tmp_path.rglob("*")) == before, "no folder of the new set, nor one above or beside it, is left"


@pytest.mark.parametrize("make", [folder, nifti, lambda at: coco(at, "läsion 1.png")], ids=["folder", "nnunet", "coco"])
def test_names_beyond_ascii_are_imported(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path / "Läsionen 病例")
    done = run("data", "import", source, "--out", tmp_path / "new" / "öut", *FACTS)
    assert (done.exit_code, done.stderr) == (0, "") and "lesion-free" in done.stdout
    assert run("data", "check", tmp_path / "new" / "öut").exit_code == 0


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    source = folder(tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    assert_one_error(run("data", "import", source, "--out", tmp_path / "file" / "out", *FACTS), "cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_jpeg_mask_of_black_and_white_is_imported(tmp_path: Path) -> None:
    """Its edges are grey and noisy, which labels are not told by."""
    soft = Image.fromarray((grey() > 200).astype(np.uint8) * 255).resize((400, 300)).resize((40, 30))
    for quality in (30, 60, 95):
        source = folder(tmp_path / f"at{quality}", partial(soft.save, format="JPEG", quality=quality))
        done = run("data", "import", source, "--out", tmp_path / f"out{quality}", *FACTS)
        assert (done.exit_code, done.stderr) == (0, "")
        (row,) = (tmp_path / f"out{quality}" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        assert np.abs(np.subtract(json.loads(row)["boxes"], [SQUARE])).max() <= 1


WEIGHTS = Path(__file__).resolve().parent.parent / "src" / "coreseg" / "nano" / "weights"


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="a checkout without nano's weights")
@pytest.mark.parametrize("name", ["16-bit", "CMYK", "palette", "alpha", "EXIF-rotated"])
def test_nano_takes_them_too(tmp_path: Path, name: str) -> None:
    file_name, make, size_wh = GOOD[name]
    make(tmp_path / file_name)
    done = run("segment", tmp_path / file_name, QUESTION, "--out", tmp_path / "out", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    warnings = " ".join(json.loads(done.stdout)["warnings"])
    assert "looks like none that this model was trained on" in warnings
    assert ("stretched" in warnings, "transparent" in warnings) == (name == "16-bit", name == "alpha")
    with Image.open(tmp_path / "out" / "a.mask.png") as mask:
        assert mask.size == size_wh
