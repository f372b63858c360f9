"""Sketches of responses to pairs: their coefficients, clusters, scores and margins."""
