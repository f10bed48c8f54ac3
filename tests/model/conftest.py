"""Three tiny CORE-Segs with random weights, joined as `coreseg assemble` joins two checkpoints.

qwen     Qwen2.5-VL + SAM 2: the paper's pairing
nano     LLaVA around nano's own vision tower + EdgeTAM: the embedded default's pairing
smolvlm  SmolVLM + EdgeTAM: a processor that would cut pictures into tiles
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from coreseg.model.assemble import assemble
from coreseg.model.core_seg import CoreSeg
from coreseg.nano.vision import NanoVisionConfig
from coreseg.segmenter import Segmenter
from coreseg.testing_models import tiny_edgetam, tiny_llava, tiny_qwen_vl, tiny_sam2, tiny_smolvlm

PAIRINGS = ("qwen", "nano", "smolvlm")
Build = Callable[[str], Path]


def enliven(model: CoreSeg) -> None:
    """Weights large enough that the mask depends on the states: a fresh adapter's hardly does, by intention."""
    generator = torch.Generator().manual_seed(1)
    for part in (model.adapter, model.segmenter.mask_decoder):
        for parameter in part.parameters():
            if parameter.ndim > 1:
                spread = (parameter[0].numel()) ** -0.5
                parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    model.adapter.pool.norm.weight.data.fill_(1.0)
    model.adapter.pool.norm.bias.data.zero_()


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The folder of a tiny checkpoint, by the name of its builder; built once."""
    root, built = tmp_path_factory.mktemp("parts"), dict[str, Path]()

    def nano_reasoner(folder: Path) -> Path:
        tower = NanoVisionConfig(AutoConfig.from_pretrained(part("edgetam")))
        return tiny_llava(folder, tower)

    builders = {
        "qwen": tiny_qwen_vl,
        "qwen-tied": lambda folder: tiny_qwen_vl(folder, tied=True),
        "smolvlm": tiny_smolvlm,
        "llava-that-crops": lambda folder: tiny_llava(folder, crops=True),
        "nano": nano_reasoner,
        "sam2": tiny_sam2,
        "edgetam": tiny_edgetam,
    }

    def part(name: str) -> Path:
        if name not in built:
            built[name] = builders[name](root / name)
        return built[name]

    return part


@pytest.fixture(scope="session")
def joined(parts: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The checkpoint folder of a pairing: lively weights, and little room for reasoning, so that answers are short."""
    root, built = tmp_path_factory.mktemp("joined"), dict[str, Path]()

    def build(name: str) -> Path:
        if name not in built:
            model = assemble(str(parts(name)), str(parts("sam2" if name == "qwen" else "edgetam")), root / name)
            enliven(model)
            model.config.reasoning_budget = 6
            model.save_pretrained(root / name)
            built[name] = root / name
        return built[name]

    return build


@pytest.fixture(scope="session", params=PAIRINGS)
def segmenter(request: pytest.FixtureRequest, joined: Build) -> Segmenter:
    """Each pairing in turn, read from disk. Shared: tests that change a model take a copy."""
    return Segmenter.from_pretrained(joined(request.param), device="cpu")


@pytest.fixture(scope="session")
def qwen(joined: Build) -> Segmenter:
    return Segmenter.from_pretrained(joined("qwen"), device="cpu")


@pytest.fixture(scope="session")
def nano(joined: Build) -> Segmenter:
    return Segmenter.from_pretrained(joined("nano"), device="cpu")


@pytest.fixture(scope="session")
def pictures() -> list[np.ndarray]:
    """Three sizes, none of them square, all smaller or larger than what the models see."""
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((50, 71), (96, 40), (30, 90))
    ]


@pytest.fixture(scope="session")
def questions() -> list[str]:
    return ["Where is the cyst?", "Segment every nodule that you can see in this picture, please.", "Is there a polyp?"]
