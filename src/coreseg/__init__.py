"""CORE-Seg: ask a question about a medical image; get reasoning, boxes and one mask.

    from coreseg import Segmenter

    result = Segmenter.from_pretrained("nano").segment("scan.png", "Where is the breast tumor?")

The public names are `Segmenter`, `Result`, `Sample` and `CoreSegError`. They load on first use, so that
`import coreseg` costs nothing and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coreseg.errors import CoreSegError
    from coreseg.segmenter import Segmenter
    from coreseg.types import Result, Sample

__version__ = "0.1.0"

__all__ = ["CoreSegError", "Result", "Sample", "Segmenter", "__version__"]

_HOMES = {
    "CoreSegError": "coreseg.errors",
    "Result": "coreseg.types",
    "Sample": "coreseg.types",
    "Segmenter": "coreseg.segmenter",
}


def __getattr__(name: str) -> object:
    """Load a public name from the module it lives in, on first use.

    Raises:
        AttributeError: the package has no such public name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # so that the next use does not come here again
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not, beside the module's own."""
    return sorted({*globals(), *__all__})
