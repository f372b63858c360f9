"""The processes of one job, as a launcher started them: who they are, and what one of them does for all."""
