"""TRL's trainers on selected pairs: once, in rounds, weighted, or briefly as a warm-up."""
