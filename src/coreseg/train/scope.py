"""Let a model know what it was trained on (`coreseg.model.scope`)."""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from coreseg.data.store import LesionSet
from coreseg.errors import DataError
from coreseg.model.core_seg import CoreSeg
from coreseg.model.processor import CoreSegProcessor
from coreseg.model.scope import Kind, Scope, kinds_of
from coreseg.sam2 import encode_image, texture


@torch.no_grad()
def fit_scope(
    model: CoreSeg, processor: CoreSegProcessor, sets: Sequence[LesionSet], *, progress: bool = True
) -> Scope:
    """The scope of the training rows of these sets, as this model's image encoder sees their pictures.

    Raises DataError where there are not two pictures of a kind.
    """
    rows = [(lesions, sample) for lesions in sets for sample in lesions.split("train")]
    # One picture may be of several kinds, an abdomen of one for each organ.
    pictures = {(lesions.root, row.file_name, row.modality, row.anatomy): (lesions, row) for lesions, row in rows}
    kinds = [str(Kind(modality, anatomy, ())) for _, _, modality, anatomy in pictures]
    few = sorted(kind for kind in set(kinds) if kinds.count(kind) < 2)
    if few or not kinds:
        told = f"only one training picture is a {few[0]}" if few else "there are no training pictures"
        raise DataError(f"{told}; expected two or more of every kind. Give more data, or leave the scope out")
    model.eval()  # type: ignore[no-untyped-call]
    textures = []
    for lesions, sample in tqdm(pictures.values(), desc="looking", unit="picture", disable=not progress):
        pixels = processor.segmenter_pixels(lesions.image(sample)).to(model.device, model.dtype)
        textures.append(texture(encode_image(model.segmenter, pixels))[0].cpu())
    return Scope.fit(torch.stack(textures), kinds, kinds_of(sample for _, sample in rows))
