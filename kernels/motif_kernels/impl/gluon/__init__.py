"""Attention for Hopper in Gluon, Triton's language of layouts, barriers and warp specialisation.

A producer warp brings tiles to shared memory by TMA; consumer warpgroups multiply. Where these
kernels cannot serve a call (``availability.py``), the Triton kernels do: these are launched from
there, never chosen by name.

Triton 3.6 and 3.7 have the interface these files are written in. Nothing outside this folder and
``triton/`` imports triton, and importing this package imports nothing.
"""
