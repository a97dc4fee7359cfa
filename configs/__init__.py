"""One file per model family: `get_config(arg)` returns the baseline with changes."""
