"""Integrations that make other libraries' models use the operators: one file per library. Users import them."""
