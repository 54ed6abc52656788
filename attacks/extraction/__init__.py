"""Extraction: prompts that make a language model say what it should no longer know."""
