# SPDX-License-Identifier: BSD-3-Clause
"""Integrations that make other libraries' models use the operators: one file per library. Users import them."""
