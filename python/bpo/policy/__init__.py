"""The model as a function of tokens: loading it, its log-probabilities, and those of its reference."""
