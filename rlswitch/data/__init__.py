"""Prompts: rows of a file or a hub, tokenized; the models' directories; built-in tasks."""
