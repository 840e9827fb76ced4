"""Self-representation alignment (SRA) for diffusion transformers, in JAX.

The method: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide
Representation Guidance by Themselves" (arXiv 2505.02831, ICLR 2026).
"""

import os

# TensorFlow, which tensorflow-datasets imports, and gRPC greet with lines about what they were not built for.
# They read these when they are loaded: this package comes first.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
