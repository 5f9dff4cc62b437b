"""CUDA kernels: loading, checked fronts, torch twins."""
