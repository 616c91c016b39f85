"""A program that misuses every call there is, run under `softcvm exec` seed after seed.

    python -m tools.hostile --seconds 3600 --seed 1

Whatever it does, softcvm must give errors of Linux's, end with the program's status, and leave a machine whose
invariants hold.  hostile.c is the program, build.py compiles it, run.py runs it and says what came of it.
"""
