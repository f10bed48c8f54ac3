"""`import coreseg` and `coreseg --help` are light, and the public surface is pinned."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import coreseg

HEAVY = ("torch", "torchvision", "transformers", "timm", "peft", "monai")
# These hold models or drive them; every other module must be usable without loading torch.
TORCH_PARTS = ("sam2", "model", "nano", "train", "evaluate", "segmenter")

SOURCE = Path(coreseg.__file__).parent
LIGHT_MODULES = sorted(
    ".".join(("coreseg", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if path.relative_to(SOURCE).with_suffix("").parts[0] not in TORCH_PARTS
)


def heavy_after(code: str) -> list[str]:
    """The heavy libraries that a fresh interpreter has loaded after running `code`."""
    program = f"import sys\n{code}\nprint('HEAVY', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def test_the_probe_sees_a_heavy_import() -> None:
    assert "torch" in heavy_after("import torch")


def test_import_coreseg_loads_nothing_heavy() -> None:
    assert heavy_after("import coreseg; coreseg.CoreSegError, coreseg.Sample, coreseg.Result") == []


def test_modules_outside_the_model_load_nothing_heavy() -> None:
    blamed = f"""
import importlib
for name in {LIGHT_MODULES!r}:
    importlib.import_module(name)
    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    assert not loaded, f"{{name}} loads {{loaded}} at import time"
"""
    assert heavy_after(blamed) == []


@pytest.mark.parametrize("arguments", [["--help"], ["segment", "--help"]])
def test_help_is_quick_and_loads_nothing_heavy(arguments: list[str]) -> None:
    started = time.perf_counter()
    heavy = heavy_after(f"""
from coreseg.cli import main
sys.argv = ["coreseg", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
""")
    assert heavy == []
    # Loading torch alone takes longer than this on a busy two-core machine; help takes a fraction of it.
    assert time.perf_counter() - started < 10


def test_public_surface() -> None:
    assert coreseg.__all__ == ["CoreSegError", "Result", "Sample", "Segmenter", "__version__"]
    assert set(coreseg.__all__) <= set(dir(coreseg))


def test_public_names_are_the_ones_of_their_modules() -> None:
    from coreseg.errors import CoreSegError
    from coreseg.segmenter import Segmenter
    from coreseg.types import Result, Sample

    assert (coreseg.CoreSegError, coreseg.Result, coreseg.Sample, coreseg.Segmenter) == (
        CoreSegError,
        Result,
        Sample,
        Segmenter,
    )


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Segmentor'"):
        coreseg.Segmentor  # noqa: B018 the access is what is tested
