"""Speculation: drafted tokens, verified several at a time; answers stay the same."""
