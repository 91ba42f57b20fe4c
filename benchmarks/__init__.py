# SPDX-License-Identifier: BSD-3-Clause
"""Benchmarks of ffn_ops: one harness, the dense layers' rows, and the targets they are held against."""
