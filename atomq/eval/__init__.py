"""Measuring: texts and perplexity."""
