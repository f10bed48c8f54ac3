"""What every test shares: array shapes checked at run time, and the real images where a checkout has them."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before anything imports the package: from here on every call checks its shapes and types.
install_import_hook("coreseg", "beartype.beartype")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_lesions() -> Path:
    """The folder of real lesion sets that may lie beside a checkout; users do not have it."""
    folder = REPO.parent / "shared" / "data" / "lesions"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/lesions beside this checkout: the real images are not part of the project")
    return folder
