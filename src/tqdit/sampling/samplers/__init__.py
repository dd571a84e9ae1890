"""The samplers, one file each: `PROCESS`, the class of processes that it samples, and `schedule(process, steps)`.

The file's name is the sampler's, unless it says `NAME`. A new sampler is a new file in this folder; nothing else
changes.
"""
