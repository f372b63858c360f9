"""Weights of tokens and of pairs: estimated by models, and honoured in the batches of a training."""
