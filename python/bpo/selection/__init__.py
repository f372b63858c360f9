"""The method: which pairs of which prompts are trained on, and what became of the others."""
