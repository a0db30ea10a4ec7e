"""Integrations: each an optional extra, imported when first asked for. Only here are the libraries of these extras known."""
