"""The native format in serving engines. Experimental: docs/serving.md says what was run."""
