"""Tokens: text becomes token ids, ids become text, and a chat becomes a prompt."""
