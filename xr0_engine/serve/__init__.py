"""Chunks over the network: the wire, the server and the clients. The clients need no torch (docs/serving.md)."""
