"""A folder of pictures and masks, as one has them before `coreseg data import`: phantoms of two pictures a patient.

    python recipes/data/phantoms.py my_images

Pictures look like ultrasound and show one or two bright nodules, those of every eighth patient none. Dark cysts, which
are not in the masks, lie beside them. Files are named PATIENT_NUMBER.png.
"""

import argparse
from pathlib import Path

from PIL import Image

from coreseg.imaging import write_mask
from coreseg.testing import phantom

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--patients", type=int, default=32)
    options = parser.parse_args()
    for kind in ("images", "masks"):
        (options.out / kind).mkdir(parents=True)
    for patient in range(options.patients):
        for number in (1, 2):
            lesions = 0 if patient % 8 == 7 else number
            shown = phantom(2 * patient + number, "ultrasound", (256, 224), lesions, kinds=2)
            name = f"p{patient:02d}_{number}.png"
            Image.fromarray(shown.image).save(options.out / "images" / name)
            write_mask(options.out / "masks" / name, shown.masks["nodule"])
