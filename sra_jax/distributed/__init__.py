"""Devices: chips and their rates, the mesh, where every array lies on it, several processes and preemption."""
