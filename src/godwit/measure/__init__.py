"""What models and machines amount to: sizes, memory, speed."""
