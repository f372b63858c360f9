"""Pages and figures, drawn from plain values."""
