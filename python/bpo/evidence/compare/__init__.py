"""The same training on the pairs of several strategies, over several seeds, and what it was good for."""
