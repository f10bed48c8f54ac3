"""A nano-like CORE-Seg with random weights (LLaVA around nano's vision tower, EdgeTAM), and phantoms to train it on."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from coreseg.model.assemble import assemble
from coreseg.nano.vision import NanoVisionConfig
from coreseg.testing import write_phantom_set
from coreseg.testing_models import tiny_edgetam, tiny_llava, tiny_qwen_vl, tiny_sam2


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nano")
    segmenter = tiny_edgetam(root / "segmenter")
    vision = NanoVisionConfig(AutoConfig.from_pretrained(segmenter))
    reasoner = tiny_llava(root / "reasoner", vision)
    model = assemble(str(reasoner), str(segmenter), root / "joined")
    model.config.reasoning_budget = 6
    model.config.save_pretrained(root / "joined")
    return root / "joined"


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qwen")
    reasoner, segmenter = tiny_qwen_vl(root / "reasoner", tied=request.param), tiny_sam2(root / "segmenter")
    assemble(str(reasoner), str(segmenter), root / "joined")
    return root / "joined"


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_set(tmp_path_factory.mktemp("phantoms"), 16, seed=0, size_wh=(72, 64))
