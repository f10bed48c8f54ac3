"""Settings: TOML and overrides in, one clear error for every slip, and the same settings back from the saved file."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreseg.config import GrpoConfig, RewardSettings, SftConfig, StageConfig, build, load, save
from coreseg.errors import ConfigError

NEEDED: dict[str, Any] = {"model": "nano", "data": ("set",), "out": "run"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sft.toml"
    path.write_text('model = "nano"\ndata = ["set"]\nout = "run"\nsteps = 7\n')
    return path


def test_a_table_of_settings(tmp_path: Path) -> None:
    path = tmp_path / "grpo.toml"
    path.write_text('model = "m"\ndata = "d"\nout = "o"\n[reward]\nplain_dice = true\nbeta = 3\n')
    config = load(GrpoConfig, path)
    assert config.reward == RewardSettings(plain_dice=True, beta=3.0)
    assert load(GrpoConfig, path, ["reward={alpha = 0.5}"]).reward == RewardSettings(alpha=0.5)
    save(config, tmp_path / "again.toml")
    assert load(GrpoConfig, tmp_path / "again.toml") == config
    with pytest.raises(ConfigError, match="'reward': unknown setting 'plaindice'; did you mean 'plain_dice'"):
        load(GrpoConfig, path, ["reward={plaindice = true}"])
    with pytest.raises(ConfigError, match=r"reward.detect_weight is -1.0; expected 0 or more"):
        load(GrpoConfig, path, ["reward={detect_weight = -1}"])
    with pytest.raises(ConfigError, match="'reward' is 3; expected a table"):
        load(GrpoConfig, path, ["reward=3"])


def test_the_file_then_the_overrides(file: Path) -> None:
    assert load(SftConfig, file) == SftConfig(**NEEDED, steps=7)
    overridden = load(SftConfig, file, ["steps=9", "learning_rate = 1", "out=runs/other", 'data=["a", "b"]'])
    assert overridden == SftConfig(model="nano", data=("a", "b"), out="runs/other", steps=9, learning_rate=1.0)
    assert type(overridden.learning_rate) is float


def test_the_last_override_counts(file: Path) -> None:
    assert load(SftConfig, file, ["steps=1", "steps=2"]).steps == 2


def test_one_folder_may_stand_without_a_list(file: Path) -> None:
    assert load(SftConfig, file, ["data=elsewhere"]).data == ("elsewhere",)


def test_a_file_says_what_differs_from_another(file: Path, tmp_path: Path) -> None:
    longer = tmp_path / "trials" / "longer.toml"
    longer.parent.mkdir()
    longer.write_text('extends = "../sft.toml"\nsteps = 70\n')
    seeded = tmp_path / "seeded.toml"
    seeded.write_text('extends = "trials/longer.toml"\nseed = 5\n')
    assert load(SftConfig, seeded, ["out=other"]) == SftConfig(**NEEDED | {"out": "other"}, steps=70, seed=5)
    save(load(SftConfig, seeded), tmp_path / "resolved.toml")
    assert load(SftConfig, tmp_path / "resolved.toml") == load(SftConfig, seeded)


@pytest.mark.parametrize(
    ("extended", "message"),
    [
        ("3", r"extends is 3; expected the name of a TOML file"),
        ('"nowhere.toml"', r"nowhere\.toml: cannot be read"),
        ('"sft.toml"', r"extends 'sft.toml', which extends this file in turn"),
        ('"loop.toml"', r"extends 'sft.toml', which extends this file in turn"),
        ('"slip.toml"', r"sft\.toml, extending .*slip\.toml: unknown setting 'stepps'; did you mean 'steps'"),
    ],
)
def test_a_file_that_cannot_be_extended_is_named(file: Path, extended: str, message: str) -> None:
    (file.parent / "loop.toml").write_text('extends = "sft.toml"\n')
    (file.parent / "slip.toml").write_text("stepps = 3\n")
    file.write_text(f"extends = {extended}\n{file.read_text()}")
    with pytest.raises(ConfigError, match=message):
        load(SftConfig, file)


def test_weights_by_source(file: Path) -> None:
    absent = load(SftConfig, file, ['known_absent={stroke = ["brain tumor"], cyst = "nodule"}']).known_absent
    assert absent == {"stroke": ("brain tumor",), "cyst": ("nodule",)}
    weights = load(SftConfig, file, ['source_weights={busi = 2, "foot ulcer" = 0.5}']).source_weights
    assert weights == {"busi": 2.0, "foot ulcer": 0.5}
    assert type(weights["busi"]) is float


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("step=1", "unknown setting 'step'; did you mean 'steps'"),
        ("zzz=1", "unknown setting 'zzz'; known settings: model, data"),
        ("group_size=4", "'group_size' is a setting of `coreseg train grpo`"),
        ("steps", "expected KEY=VALUE"),
        ("steps=many", "setting 'steps' is 'many'; expected a whole number"),
        ("steps=1.5", "expected a whole number"),
        ("steps=true", "expected a whole number"),
        ("learning_rate=true", "expected a number"),
        ("learning_rate='1'", "expected a number"),
        ("remeasure=1", "expected true or false"),
        ("model=1", "expected text"),
        ("data=[1]", "expected text or a list of texts"),
        ("source_weights=2", "expected a table of numbers"),
        ("known_absent=2", "expected a table of lists"),
        ("known_absent={stroke = 2}", "'stroke', is 2; expected text or a list of texts"),
        ("own_words_share=0.5", "0 where own_words names no file"),
        ("source_weights={busi = 'much'}", "expected a table of numbers"),
        ("source_weights={busi = true}", "expected a table of numbers"),
        ("source_weights={busi = {a = 1}}", "expected a table of numbers"),
        ("source_weights={busi = -1}", "0 or more"),
        ("steps=0", "setting steps is 0; expected at least 1"),
        ("learning_rate=0", "above 0"),
        ("learning_rate=nan", "above 0"),
        ("head_learning_rate=inf", "above 0"),
        ("text_weight=-1", "0 or more"),
        ("mask_weight=inf", "0 or more"),
        ("balance=-0.1", "0 or more"),
        ("several_weight=0", "above 0"),
        ("attribute_share=1.1", "between 0 and 1"),
        ("absent_share=nan", "between 0 and 1"),
        ("precision=fp8", "fp32, bf16 or fp16"),
        ("data=[]", "at least one data-set folder"),
    ],
)
def test_a_slip_is_one_clear_error(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SftConfig, file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"steps = ", b"\xff\xfe", b"steps = 1\nsteps = 2"])
def test_what_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load(SftConfig, file)


def test_a_missing_file_and_missing_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(SftConfig, tmp_path / "nosuch.toml")
    with pytest.raises(ConfigError, match="data, out missing"):
        build(SftConfig, {"model": "nano"}, "here")


def test_every_setting_is_explained() -> None:
    for kind, base in ((SftConfig, StageConfig), (GrpoConfig, StageConfig), (RewardSettings, RewardSettings)):
        explained = set[str]()
        for names in re.findall(r"((?:\b\w+, )*\b\w+):", f"{base.__doc__} {kind.__doc__}"):
            explained |= set(names.split(", "))
        assert {field.name for field in fields(kind)} <= explained


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ANY_SETTINGS = st.fixed_dictionaries(
    {
        "model": TEXT,
        "data": st.lists(TEXT, min_size=1, max_size=3).map(tuple),
        "out": TEXT,
        "steps": st.integers(1, 10**9),
        "learning_rate": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        "balance": st.floats(0, 1e30),
        "several_weight": st.floats(1e-9, 1e9),
        "remeasure": st.booleans(),
        "known_absent": st.none() | st.dictionaries(TEXT, st.lists(TEXT, max_size=2).map(tuple), max_size=3),
        "own_words": st.none() | TEXT,
        "source_weights": st.none() | st.dictionaries(TEXT, st.floats(0, 1e9), max_size=3),
    }
)


@given(ANY_SETTINGS)
def test_saved_settings_load_as_they_were(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    settings = SftConfig(**values)
    file = tmp_path_factory.getbasetemp() / "resolved.toml"
    save(settings, file)
    assert load(SftConfig, file) == settings
