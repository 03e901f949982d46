"""Gated Sparse Attention in plain PyTorch: the definition that every faster backend is held to."""
