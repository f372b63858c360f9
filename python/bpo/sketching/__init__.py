"""Gradients to sketches, on the device where they are or beside the model."""
