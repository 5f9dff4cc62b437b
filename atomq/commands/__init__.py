"""The commands, one module each: parse, build configs, call one function, print."""
