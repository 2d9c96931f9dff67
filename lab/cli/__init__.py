"""Actions of the command line."""
