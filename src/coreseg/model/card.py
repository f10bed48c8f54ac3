"""The model card that lies beside a checkpoint's weights: what is known of it, and where its author has to go on."""

from pathlib import Path

from coreseg.model.confidence import Confidence
from coreseg.model.core_seg import CoreSeg
from coreseg.model.scope import Scope

FILE = "README.md"


def write_card(
    folder: Path, model: CoreSeg, *, trained: bool, scope: Scope | None = None, confidence: Confidence | None = None
) -> None:
    """Write the card of this model into its folder: front matter for the hub, then Markdown. It names no path.

    trained: whether the adapter ever was.
    """
    name = folder.resolve().name
    precision = str(model.dtype).removeprefix("torch.")
    parts = {"reasoner": model.reasoner, "adapter": model.adapter, "segmenter": model.segmenter}
    kinds = {
        "reasoner": model.reasoner.config.model_type,
        "adapter": "semantic-guided",
        "segmenter": model.segmenter.config.model_type,
    }
    table = "\n".join(
        f"| {part} | {kinds[part]} | {sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.1f} M |"
        for part, module in parts.items()
    )
    text = f"""---
library_name: coreseg
pipeline_tag: image-segmentation
tags: [medical, image-segmentation, reasoning]
---
# {name}

A CORE-Seg: asked for a lesion in a picture, it writes what it sees and where, and outlines it. In {precision};
the segmenter looks at squares of {model.config.segmenter_size_px} px.

| part | kind | parameters |
|---|---|---|
{table}

**Research only. Not a medical device.** Do not use it to diagnose, to treat or to triage.

## Use

```sh
coreseg segment IMAGE QUESTION --model {name}
```

## Trained on

{_trained_on(trained, scope)}

## How well it works

{_quality(trained, confidence)}

## Licence

Not stated yet: that of the parts it was made from and of the pictures it was trained on.
"""
    (folder / FILE).write_text(text, encoding="utf-8")


def _trained_on(trained: bool, scope: Scope | None) -> str:
    if not trained:
        return (
            "Nothing yet: reasoner and segmenter were just joined, so masks mean nothing. `coreseg train sft` is next."
        )
    if scope is None:
        return (
            "Not recorded. `coreseg merge --scope DATASET` records it, and the model then warns of what is unlike it."
        )
    rows = "\n".join(f"| {kind} | {', '.join(kind.categories)} |" for kind in scope.kinds)
    return (
        f"| pictures | lesions asked for |\n|---|---|\n{rows}\n\nIt warns of pictures and questions unlike these; on "
        "such, its answers mean nothing."
    )


def _quality(trained: bool, confidence: Confidence | None) -> str:
    if not trained:
        return "Not measured: there is nothing to measure."
    told = (
        "It tells how good it expects each mask to be."
        if confidence
        else "It does not tell how good it expects a mask to be; `coreseg merge --confidence FIGURES` teaches it."
    )
    return (
        "Not stated yet. `coreseg evaluate DATASET --model MODEL` measures it beside a blind guess, on rows that it "
        f"was not trained on.\n\n{told}"
    )
