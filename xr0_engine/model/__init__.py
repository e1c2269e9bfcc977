"""The network: vision tower, language model, action head, and their weights."""
