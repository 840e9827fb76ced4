"""Tokens as colours: their first three principal components (figure 2 of SRA, arXiv 2505.02831).

Made so that pictures compare. For each block the components are those of its tokens at all noise levels together, so
that a colour means the same along a row. A component's sign is chosen so that its map, summed over the levels, goes
with the brightness of the clean latents. Each component is scaled to [0, 1] between its 1st and 99th percentile over
the row.
"""

import numpy as np
from sklearn.decomposition import PCA

COMPONENTS = 3
PERCENTILES = (1.0, 99.0)


def token_colours(tokens: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Maps of the first three components.

    Args:
      tokens: (L,K,N,D) of one image at L noise levels after K blocks; N a square number, row-major.
      latents: the clean latents (H,W,C), H divisible by sqrt(N); they decide signs.

    Returns:
      (L,K,G,G,3) float32 in [0, 1], G = sqrt(N).
    """
    levels, blocks, count, width = tokens.shape
    grid = round(count**0.5)
    patch = latents.shape[0] // grid
    brightness = latents.mean(axis=-1).reshape(grid, patch, grid, patch).mean(axis=(1, 3)).ravel()
    brightness = brightness - brightness.mean()
    maps = np.zeros((levels, blocks, count, COMPONENTS), np.float32)
    for block in range(blocks):
        rows = tokens[:, block].reshape(-1, width).astype(np.float64)
        found = min(COMPONENTS, *rows.shape)
        projected = PCA(found, svd_solver="full").fit_transform(rows).reshape(levels, count, found)
        signs = np.where(np.einsum("lnc,n->c", projected, brightness) < 0, -1.0, 1.0)
        projected = projected * signs
        low, high = np.percentile(projected, PERCENTILES, axis=(0, 1))
        maps[:, block, :, :found] = np.clip((projected - low) / np.maximum(high - low, 1e-12), 0, 1)
    return maps.reshape(levels, blocks, grid, grid, COMPONENTS)
