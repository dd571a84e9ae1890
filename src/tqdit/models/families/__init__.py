"""Loaders, one file each: `matches(source)` and `load(source, heads)`, which returns a `LoadedModel`.

The first that matches, in alphabetical order, loads a source. A new family is a new file in this folder.
"""
