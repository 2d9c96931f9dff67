"""Write a folder of images as a user has it."""

import pandas as pd
from PIL import Image


def write_folder(folder, images, rows):
    """Write ``images`` uint8 [n, 3, h, w] as PNG with ``metadata.csv``."""
    folder.mkdir(parents=True)
    names = [f"{i:05d}.png" for i in range(len(rows))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(folder / name)
    pd.DataFrame(rows).assign(file_name=names).to_csv(folder / "metadata.csv", index=False)
    return folder
