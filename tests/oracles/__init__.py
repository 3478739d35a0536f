"""Trajectories of other libraries, and the scripts that recorded them."""
