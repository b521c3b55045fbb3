"""The verbs of the command line: one file declares the options of each, and imports nothing heavy."""
