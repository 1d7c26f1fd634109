"""
Peers that cannot be imported: an engine in an environment of its own, a program in C. Each runs in
a process that a benchmark talks to.
"""
