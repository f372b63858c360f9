"""Any rows to candidates: prompts, their responses, scores, candidate pairs and tokens."""
