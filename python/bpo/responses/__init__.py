"""More responses for a prompt, and their scores: sampling, reward models, functions and judges."""
