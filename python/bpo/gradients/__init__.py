"""Policy and responses to sketches: the gradient of each response, exactly, and the store that keeps them."""
