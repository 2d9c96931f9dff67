"""Everything the three nouns (immunizers, attackers, metrics) run on."""

import os

# threads that wait for each other sleep: a spinning one would hold the core that a busy machine
# needs for the other (tests/benchmarks/busy_threads.py); read when torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# MKL, left to itself, chooses its kernels by processor and memory address, so that an interrupted
# SOAP attack ended elsewhere; read when MKL is first called
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
