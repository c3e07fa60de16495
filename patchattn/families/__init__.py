"""Attention modules that do not speak transformers' AttentionInterface."""
