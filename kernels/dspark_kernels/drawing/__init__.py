"""Distributions of tokens, and draws from them."""
