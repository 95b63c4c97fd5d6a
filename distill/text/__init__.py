"""English text of registry packages as training data, and what a model makes of it."""
