"""Making models smaller: quantised packed files, and random ones to measure with."""
