"""A machine's first hour: every part of the check and of the measuring in order of worth, each a process of its own."""
