"""The command line: programs, commands, help pages, overrides and their mistakes."""
