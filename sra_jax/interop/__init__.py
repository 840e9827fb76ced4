"""Tensors of PyTorch and safetensors files <-> parameter trees. Knows nothing of runs."""
