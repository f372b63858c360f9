"""Prompts to the prompts that are kept."""
