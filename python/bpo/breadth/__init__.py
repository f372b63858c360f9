"""Prompts to embeddings, and to the prompts that are kept: those that stand for the others."""
