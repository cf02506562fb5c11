"""Benchmark policies on a user's model and machine: all contenders interleaved in one run.

Hugging Face's own model runs alongside on the same weights, and so does our dense model, which is
the baseline for all others.
"""
