"""Whether a selection is worth it: previews, comparisons, evaluations and their statistics."""
