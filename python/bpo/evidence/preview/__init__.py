"""What a selection is worth, before training: strategies compared in the linearised regime."""
