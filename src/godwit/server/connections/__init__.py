"""Connections and clients: deadlines, limits, and whose turn it is."""
