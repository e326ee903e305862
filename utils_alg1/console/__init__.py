"""The command line, signals and the terminal."""
