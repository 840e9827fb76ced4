"""Images side by side."""


import numpy as np

SMALLEST_TILE = 48
GAP = 2


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Images (N,H,W,C) uint8, C 1 or 3, row by row in `columns` columns on white -> (H',W',C) uint8.

    Images smaller than 48 pixels are enlarged by a whole factor without interpolation.
    """
    factor = max(1, SMALLEST_TILE // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 255, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas

