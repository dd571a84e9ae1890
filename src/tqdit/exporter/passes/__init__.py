"""Passes over the float trace, one per file. A pass is a function that changes an `ir.Model` in place.

Each finds its nodes by module scope (`scopes`), never by the shape of the graph alone, says in its docstring what it
requires and ensures, and refuses with a reason if that does not hold.
"""
