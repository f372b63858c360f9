"""The ``bpo`` command, with a file for each of its commands."""
