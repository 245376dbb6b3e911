"""The bodies of all commands."""
