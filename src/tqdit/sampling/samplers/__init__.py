"""The samplers, one file each: `PROCESS`, the class of processes that it samples, and `schedule(process, timesteps)`,
the table of a chain that visits these timesteps, float64 (T,), indexed by the step.

Unless a user places them, the timesteps are `process.timesteps(steps)`, or `visits(process, steps)` if the file has
such a function. The file's name is the sampler's, unless it says `NAME`. A new sampler is a new file in this folder;
nothing else changes.
"""
