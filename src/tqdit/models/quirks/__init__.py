"""What single classes need before they can be traced, one file each: `CLASSES` and `prepare(network, state)`, in place.

state: the shape of one row of the network's state. A new quirk is a new file in this folder; a class without one is
taken as it is.
"""
