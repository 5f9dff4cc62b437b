"""Numbers: quantizers, code books, packing, transforms, and the quantized linear."""
