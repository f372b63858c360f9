"""The gradient store: a directory with one row a response that no crash ruins."""
