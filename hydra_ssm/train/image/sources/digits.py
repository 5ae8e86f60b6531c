"""The handwritten digits that scikit-learn carries."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


class Digits:
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.values = images.reshape(-1, 8, 8)
        self.labels = [int(label) for label in labels]
        self.classes = [str(i) for i in range(10)]

    def read(self, i: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray((self.values[i] * 255 / 16).round().astype(np.uint8)).convert("RGB").save(file, "PNG")
        return file.getvalue()

    def name(self, i: int) -> str:
        return f"digit {i}"
