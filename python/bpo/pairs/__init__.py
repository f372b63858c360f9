"""Sketches of responses to pairs: their gradients, clusters, scores and margins, none of them ever formed."""
