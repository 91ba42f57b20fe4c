# SPDX-License-Identifier: BSD-3-Clause
"""The version of the package, read by pyproject.toml: it stands here alone."""

__version__ = "0.1.0"
