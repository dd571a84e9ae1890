"""Diffusion transformers: loaders (`families`), the native DiT, and what a stage needs to know about a network."""
