"""Kernels, chosen by device and type, that compute what a plain formula says."""
