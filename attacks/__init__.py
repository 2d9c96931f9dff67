"""Attackers: one file each; every one keeps its whole trajectory."""
