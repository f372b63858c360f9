"""The ``bpo`` command."""
