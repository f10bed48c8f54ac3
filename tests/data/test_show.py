"""The contact sheet."""

import errno
from dataclasses import replace

import numpy as np
import pytest
import typer

from coreseg.cli_options import clear_errors
from coreseg.data.show import CELL_PX, contact_sheet
from coreseg.data.store import LesionSet
from coreseg.errors import DataError
from coreseg.testing import write_phantom_set


@pytest.fixture(scope="module")
def lesion_set(tmp_path_factory: pytest.TempPathFactory) -> LesionSet:
    return LesionSet.open(write_phantom_set(tmp_path_factory.mktemp("show") / "set", count=8, seed=1))


def test_the_sheet_has_a_cell_a_row(lesion_set: LesionSet) -> None:
    one = contact_sheet(lesion_set, lesion_set.samples[:1], columns=4)
    assert CELL_PX < one.width < 1.2 * CELL_PX
    assert CELL_PX < one.height < 1.4 * CELL_PX
    five = contact_sheet(lesion_set, lesion_set.samples[:5], columns=3)
    assert 3 * CELL_PX < five.width < 4 * CELL_PX
    assert 2 * CELL_PX < five.height < 3 * CELL_PX
    empty_cell = np.asarray(five)[-CELL_PX // 2 :, -CELL_PX // 2 :]
    assert (empty_cell == empty_cell[0, 0]).all()


def test_masks_and_stored_boxes_are_drawn(lesion_set: LesionSet) -> None:
    sample = next(sample for sample in lesion_set.samples if sample.boxes)
    drawn = np.asarray(contact_sheet(lesion_set, [sample])).astype(int)
    moved = np.asarray(contact_sheet(lesion_set, [replace(sample, boxes=((0, 0, 9, 9),))])).astype(int)
    assert (drawn != moved).any()
    cyan = (drawn[..., 0] < 30) & (drawn[..., 1] > 190) & (drawn[..., 2] > 230)
    assert cyan.any()


def test_the_caption_tells_category_absence_source_and_split(lesion_set: LesionSet) -> None:
    sample = next(sample for sample in lesion_set.samples if sample.boxes)
    long = "w" * 200
    changes = ({"category": "other"}, {"boxes": ()}, {"source": "elsewhere"}, {"split": "test"}, {"category": long})
    plain = np.asarray(contact_sheet(lesion_set, [sample]))
    for change in changes:
        changed = np.asarray(contact_sheet(lesion_set, [replace(sample, **change)]))
        assert changed.shape == plain.shape
        caption = slice(CELL_PX + 8, None)
        assert (changed[caption] != plain[caption]).any(), change
        assert (changed[caption, -8:] == plain[0, 0]).all()  # a long one is cut, not run over


def test_nothing_to_show_is_refused(lesion_set: LesionSet) -> None:
    with pytest.raises(DataError, match="0 rows in 5 columns"):
        contact_sheet(lesion_set, [])
    with pytest.raises(DataError, match="0 columns"):
        contact_sheet(lesion_set, lesion_set.samples, columns=0)


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @clear_errors
    def save(code: int) -> None:
        raise OSError(code, "What the system says")

    for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        with pytest.raises(typer.Exit):
            save(code)
        assert capsys.readouterr().err == "error: What the system says. Free some space, or write elsewhere.\n"
    with pytest.raises(OSError, match="What the system says"):
        save(errno.EPIPE)
