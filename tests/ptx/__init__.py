"""Executes the PTX that kernels compile to, on a machine without a GPU.

Triton's interpreter runs a kernel's Python; here runs what its compiler made of it: real bf16,
real layouts in registers and shared memory, real barriers. Threads go in lockstep, so what depends
on their speed is looked for: accesses to shared memory that no barrier puts in order with those of
other warps (``memory``), accesses to global memory that no atomic operation puts in order with
those of other blocks (``blocks``), and to what the launch before writes where this one begins early
(``griddepcontrol``). Bytes that are copied asynchronously arrive only when they are waited for.

``program`` parses the text, ``machine`` executes it, ``arithmetic``, ``accesses`` and
``collectives`` say what instructions do, ``launches`` compiles what a test launches and hands it
over.

The semantics follow NVIDIA's PTX ISA, version 8.7. Not modelled: the rounding of approximate
instructions (they are exact here), what ``ptxas`` makes of PTX, what torch and its libraries launch
between kernels.
"""
