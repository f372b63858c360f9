"""Any rows to :class:`~bpo.Candidates`: prompts, their responses, scores, candidate pairs and tokens."""
