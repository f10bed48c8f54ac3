"""What a model was trained on, so that it can say when it is asked about something else.

A picture is told by its textures: how much each channel of the image encoder's maps varies over the picture. The
training pictures of each kind (a modality of an anatomy) are a cloud of such vectors; a picture far from every cloud
looks like nothing the model knows.

Source: distances to class means under one covariance, Lee et al. (arXiv 1807.03888). Our choice: the features, the
shrinkage, the limit, and what is said of the question.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.utils.hub import cached_file

from coreseg.errors import ModelError
from coreseg.questions import names_any
from coreseg.sentences import listed
from coreseg.types import Answer, Sample

FILE = "scope.safetensors"
SHRINKAGE = 0.3
"""How far the covariance is drawn to a multiple of one: there are hardly more pictures than it has entries."""
SHARE_WITHIN = 0.99
"""Of the training pictures, how many are within the limit."""
FAINT = 1e-3
"""A texture that hardly varies counts as varying by this share of the median one."""


@dataclass(frozen=True)
class Kind:
    """A kind of picture, and the lesions that were asked for in it."""

    modality: str
    anatomy: str
    categories: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.modality} of the {self.anatomy}"


@dataclass(frozen=True)
class Scope:
    """What a model was trained on.

    centres: of each kind, after whitening.  scale: each texture's deviation over all of them, divided by first.
    whitening: makes every direction of what is left equally likely.
    limit: the largest squared distance from the nearest centre that is not worth a word.
    """

    kinds: tuple[Kind, ...]
    centres: Float[torch.Tensor, "kinds channels"]
    scale: Float[torch.Tensor, " channels"]
    whitening: Float[torch.Tensor, "channels channels"]
    limit: float

    @classmethod
    def fit(
        cls, textures: Float[torch.Tensor, "pictures channels"], kinds: Sequence[str], known: Sequence[Kind]
    ) -> "Scope":
        """From the textures of training pictures and the kind that each of them is, by its name among the `known`."""
        vectors = textures.double()
        names = [str(kind) for kind in known]
        which = torch.tensor([names.index(kind) for kind in kinds])
        means = torch.stack([vectors[which == number].mean(0) for number in range(len(names))])
        scale = vectors.std(0)
        scale = scale.clamp(min=FAINT * float(scale.median()))
        inside = (vectors - means[which]) / scale
        covariance = inside.T @ inside / len(inside)
        even = torch.eye(len(covariance)).to(covariance) * covariance.diagonal().mean()
        shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * even
        whitening = torch.linalg.cholesky(torch.linalg.inv(shrunk))
        scope = cls(tuple(known), (means / scale) @ whitening, scale, whitening, 0.0)
        limit = float(torch.quantile(scope.distances(vectors).amin(1), SHARE_WITHIN))
        return cls(tuple(known), scope.centres.float(), scale.float(), whitening.float(), limit)

    def distances(self, textures: Float[torch.Tensor, "pictures channels"]) -> Float[torch.Tensor, "pictures kinds"]:
        """Squared distances from the kinds' centres."""
        offsets = ((textures.to(self.scale) / self.scale) @ self.whitening)[:, None] - self.centres
        return offsets.square().sum(-1)

    def warnings(
        self, texture: Float[torch.Tensor, " channels"], question: str, answer: Answer | None
    ) -> tuple[str, ...]:
        """What is to be said of a picture's texture, a question and its answer; None where that has no valid form."""
        distances = self.distances(texture[None])[0]
        nearest = self.kinds[int(distances.argmin())]
        told = []
        if distances.min() > self.limit:
            kinds = listed([str(kind) for kind in self.kinds])
            told.append(f"the picture looks like none that this model was trained on ({kinds})")
        if answer is None:
            return tuple(told)
        category, known = answer.category, {name for kind in self.kinds for name in kind.categories}
        if category not in known:
            told.append(f"this model does not know {category}; it knows {listed(sorted(known))}")
        elif not names_any(question, known):
            told.append(f"the question names no lesion that this model knows; it was taken to be about {category}")
        if not told and category not in nearest.categories:
            lesions = listed(nearest.categories)
            told.append(f"the picture looks like {nearest}, where this model knows {lesions} but no {category}")
        return tuple(told)

    def save(self, folder: Path) -> None:
        """Write it beside a checkpoint."""
        whitening = self.whitening.half().contiguous()  # of order one, unlike the others
        tensors = {"centres": self.centres.contiguous(), "scale": self.scale.contiguous(), "whitening": whitening}
        told = {"kinds": json.dumps([asdict(kind) for kind in self.kinds]), "limit": repr(self.limit)}
        (folder / FILE).write_bytes(save(tensors, metadata=told))

    @classmethod
    def load(cls, place: str | Path) -> "Scope | None":
        """That of a checkpoint, in a folder or at a hub; None where it has none. ModelError for a damaged one."""
        file = cached_file(str(place), FILE, _raise_exceptions_for_missing_entries=False)
        if file is None:
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                told = stored.metadata()
                tensors = {name: stored.get_tensor(name).float() for name in ("centres", "scale", "whitening")}
            kinds = (Kind(**{**each, "categories": tuple(each["categories"])}) for each in json.loads(told["kinds"]))
            return cls(kinds=tuple(kinds), limit=float(told["limit"]), **tensors)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{file}: damaged ({error}); copy it again, or write it anew: coreseg merge --scope"
            ) from error


def kinds_of(samples: Iterable[Sample]) -> list[Kind]:
    """The kinds of these rows' pictures, with the categories that are asked for in them."""
    found: dict[tuple[str, str], set[str]] = {}
    for sample in samples:
        found.setdefault((sample.modality, sample.anatomy), set()).add(sample.category)
    return [Kind(*where, tuple(sorted(categories))) for where, categories in sorted(found.items())]
