"""Models in: families, sources, GGUF, running block by block."""
