"""Tokens: how text becomes token ids, how ids become text, and how a chat becomes a prompt."""
