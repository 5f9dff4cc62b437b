"""atomq: offline INT4 quantization of LLMs."""

__version__ = "0.1.0"
