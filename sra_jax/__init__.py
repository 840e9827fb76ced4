"""Self-representation alignment (SRA) for diffusion transformers, in JAX.

The method: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide
Representation Guidance by Themselves" (arXiv 2505.02831, ICLR 2026).
"""
