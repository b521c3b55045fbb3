"""The caches of the engine: pools of blocks and rows, the prefix index, and its files on disk."""

from godwit.engine.cache.hybrid import HybridCache, StateSnapshot
from godwit.engine.cache.pools import BlockPool, CacheSize, StatePool, num_blocks

__all__ = ["BlockPool", "CacheSize", "HybridCache", "StatePool", "StateSnapshot", "num_blocks"]
