"""The method: statistics, order of channels, GPTQ. Pure functions over tensors."""
