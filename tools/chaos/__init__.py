"""Workflows with effects whose processes are killed, and the bank that is asked afterwards what came of it."""
