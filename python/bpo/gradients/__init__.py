"""Policy and responses to sketches: the gradient of each response, exactly, at one model or several checkpoints."""
