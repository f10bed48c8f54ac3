"""What nano-sft holds: the tensors of a stage-1 model that are not those of nano, under the modules' own names.

python recipes/nano/differences.py NANO STAGE_1 --out FILE

Both checkpoints in the precision that is shipped (`coreseg merge`).
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from coreseg.model.assemble import load_parts

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nano")
    parser.add_argument("stage_1")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    nano, stage_1 = (load_parts(model, torch.bfloat16)[0].state_dict() for model in (options.nano, options.stage_1))
    differ: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in stage_1.items():
        # A tied tensor goes by its first name.
        if not torch.equal(tensor, nano[name]) and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            differ[name] = tensor.contiguous()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(differ, options.out, metadata={"format": "pt"})
    print(f"{options.out}: {len(differ)} of {len(nano)} tensors, {options.out.stat().st_size / 1e6:.1f} MB")
