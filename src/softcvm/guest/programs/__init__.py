"""Scripted guests: each module a program, or scenes that programs are made of."""
