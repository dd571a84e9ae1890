"""What single classes need before they can be traced, one file each: `CLASSES` and `prepare(network)`, in place.

A new quirk is a new file in this folder. Without one a class is taken as it is.
"""
