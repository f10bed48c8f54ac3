"""A data set goes out without its pictures and comes back the same."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coreseg.data.manifest import pixel_hash, read_manifest, restore, write_manifest
from coreseg.data.store import METADATA, LesionSet, write_set
from coreseg.errors import DataError
from coreseg.testing import write_phantom_set


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_phantom_set(tmp_path / "source", count=8, seed=3, two_kinds=0.5)


@pytest.fixture
def built(source: Path, tmp_path: Path) -> LesionSet:
    """Part of the source's rows, with other words, another split and other file names."""
    root = tmp_path / "built"
    lesions = LesionSet.open(source)
    samples = []
    for number, sample in enumerate(lesions.samples[2:]):
        names = {"file_name": f"images/{number}.png", "mask_file_name": f"masks/{number}.png"}
        for field, name in names.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes((source / getattr(sample, field)).read_bytes())
        samples.append(replace(sample, **names, reasoning=f"Grüße {number}.", split="test"))
    write_set(root, samples)
    return LesionSet.open(root)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_it_comes_back_the_same(built: LesionSet, source: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(built, manifest)
    assert b"\x89PNG" not in manifest.read_bytes()
    report = restore(manifest, [source], tmp_path / "restored", progress=False)
    assert report.rows == len(built.samples) and report.missing == ()
    assert files(tmp_path / "restored") == files(built.root)


def test_what_is_told_of_its_sources_comes_back_too(source: Path, tmp_path: Path) -> None:
    name = LesionSet.open(source).samples[0].source
    told = {name: {"title": "Phantöme"}}
    (source / "sources.json").write_text(json.dumps({**told, "other": {"title": "Not in it"}}))
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(LesionSet.open(source), manifest)
    restore(manifest, [source], tmp_path / "restored", progress=False)
    assert json.loads((tmp_path / "restored" / "sources.json").read_text(encoding="utf-8")) == told


def test_pixels_count_not_bytes(built: LesionSet, source: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(built, manifest)
    for path in (source / "images").iterdir():
        Image.open(path).save(path, compress_level=0)
    assert restore(manifest, [source], tmp_path / "restored", progress=False).missing == ()


def test_what_no_source_has_is_named(built: LesionSet, source: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(built, manifest)
    sample = LesionSet.open(source).samples[-1]
    picture = np.array(Image.open(source / sample.file_name))
    picture[0, 0] ^= 1
    Image.fromarray(picture).save(source / sample.file_name)
    gone = sum(s.file_name == sample.file_name for s in LesionSet.open(source).samples)
    with pytest.raises(DataError, match=rf"{gone} of its {len(built.samples)} rows .* {gone} of {sample.source}\."):
        restore(manifest, [source], tmp_path / "restored", progress=False)
    assert not (tmp_path / "restored").exists()
    report = restore(manifest, [source], tmp_path / "restored", partly=True, progress=False)
    assert len(report.missing) == gone and report.rows == len(built.samples) - gone
    assert len(LesionSet.open(tmp_path / "restored").samples) == report.rows


def test_several_sources(built: LesionSet, source: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(built, manifest)
    samples = LesionSet.open(source).samples
    halves = [tmp_path / "first", tmp_path / "second"]
    for half, part in zip(halves, (samples[:5], samples[5:]), strict=True):
        half.mkdir()
        for folder in ("images", "masks"):
            (half / folder).symlink_to(source / folder)
        write_set(half, part)
    assert restore(manifest, halves, tmp_path / "restored", progress=False).missing == ()
    with pytest.raises(DataError, match="that no source given holds"):
        restore(manifest, halves[:1], tmp_path / "again", progress=False)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda row: row.pop("mask_sha256"), "row 2: image_sha256 or mask_sha256 is missing"),
        (lambda row: row.pop("case"), "row 2: the field 'case' is missing"),
        (lambda row: row.update(file_name="../../etc/x.png"), "expected a path inside the data set's folder"),
    ],
)
def test_a_broken_manifest_is_refused(
    built: LesionSet, source: Path, tmp_path: Path, change: object, complaint: str
) -> None:
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(built, manifest)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    change(rows[1])  # type: ignore[operator]
    manifest.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=complaint):
        restore(manifest, [source], tmp_path / "restored", progress=False)


def test_no_manifest(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows in it"):
        read_manifest(tmp_path / "empty.jsonl")
    (tmp_path / "taken").mkdir()
    write_manifest(LesionSet.open(source), tmp_path / "m.jsonl")
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(DataError, match="not empty"):
        restore(tmp_path / "m.jsonl", [source], tmp_path / "taken", progress=False)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["x"]


def test_a_hash_knows_shape_and_values() -> None:
    flat = np.arange(6, dtype=np.uint8)
    assert pixel_hash(flat.reshape(2, 3)) != pixel_hash(flat.reshape(3, 2))
    assert pixel_hash(flat.reshape(2, 3)) == pixel_hash(np.asfortranarray(flat.reshape(2, 3)))


def test_metadata_is_what_the_manifest_says(built: LesionSet, tmp_path: Path) -> None:
    write_manifest(built, tmp_path / "m.jsonl")
    assert [row.sample for row in read_manifest(tmp_path / "m.jsonl")] == list(built.samples)
    assert (built.root / METADATA).exists()
