"""GPU kernels of Gated Sparse Attention. Knows nothing of `gsa`."""
