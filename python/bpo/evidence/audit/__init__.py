"""Which labels of the data look wrong, by what the gradients of all others say."""
