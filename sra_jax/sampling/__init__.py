"""A trained model -> images: generation, grids, the flags of tools that sample."""
