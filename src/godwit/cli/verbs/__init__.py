"""The commands: one file for the options of each, without slow imports."""
