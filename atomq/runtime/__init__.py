"""Text generation by the kernels alone: a decoder of stages over a paged KV cache."""
