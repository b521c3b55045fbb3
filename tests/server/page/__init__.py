"""A package, so that its tests can share a browser that is closed before other tests begin."""
